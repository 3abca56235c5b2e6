"""Training: the loss of Algorithm 2, the steps, several processes, and what the command refuses."""

import gc
import itertools
import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    animation,
    assert_same_weights,
    both_modes,
    command,
    fails_with_one_line,
    rows_of,
    run_training,
    small_model,
    small_state,
    start_two,
)
from torch._dynamo.testing import CompileCounter

import sample
import train
from checkpoint import load_checkpoint, make_pyramid
from cli import TRAINING, choose_device, generator_for, start_processes
from data import MovingDigits, open_data
from model import Block, Captured, DiT
from tpdiff import Pyramid, align, draw_nearest, randn


def arguments(*options: str):
    return train.make_parser().parse_args([*TINY, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The checkpoint of six steps in one process."""
    return run_training(tmp_path_factory.mktemp("whole"), "--steps", "6")


@both_modes
@pytest.mark.parametrize("frames, options", [(8, ""), (1, "--pyramid space-time --precision bf16")])
def test_loss_falls_on_one_batch_of_clips_or_pictures_at_every_stage(mode, frames, options):
    args, data = arguments("--mode", mode, *options.split()), MovingDigits(frames, 16)
    p = make_pyramid(args)
    model = small_model(10, live=False, factor=p.factor)
    x0, labels = torch.stack([data[n][0] for n in range(4)]), torch.tensor([data[n][1] for n in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for k in range(3):
        losses = []
        for _ in range(20):
            batch = train.draw(x0, labels, 10, p, k, range(4), args)
            losses.append(train.training_loss(model, p, *batch, k, args))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.7 * losses[0], (k, losses[0], losses[-1])


@both_modes
@pytest.mark.parametrize("alignment, shift", [("assignment", 1.0), ("nearest", 1.0), ("none", 3.0)])
def test_training_loss_is_that_of_algorithm_2(mode, alignment, shift):
    options = "--mode", mode, "--align", alignment, "--candidates", "3", "--shift", str(shift), "--seed", "5"
    args, data, model = arguments(*options), MovingDigits(8, 16), Mock(side_effect=lambda x, *_: torch.zeros_like(x))
    p, paper = make_pyramid(args), Pyramid(mode, 3, shift=shift)  # the paper's target in ddim mode is eps_k
    x0 = torch.stack([data[n][0] for n in range(8)])
    for k in range(3):
        batch = train.draw(x0, torch.full((8,), -1), 0, p, k, range(8), args)
        loss = train.training_loss(model, p, *batch, k, args)
        generators = [generator_for(5, TRAINING, n) for n in range(8)]
        u = torch.stack([torch.rand(2, generator=generator)[0] for generator in generators])
        if alignment == "nearest":
            noise = draw_nearest(x0[:, :, :: 2**k], 3, generators)
        else:
            noise = randn((8, 1, 8 // 2**k, 16, 16), generators)
            noise = align(x0[:, :, :: 2**k], noise) if alignment == "assignment" else noise
        x_t, target, t = paper.interpolate(*paper.endpoints(x0, noise, k), k, u)
        if mode == "ddim":  # the network's error in the velocity, eps_k = sigma x_t + gamma velocity
            gamma, sigma = (value.float().view(-1, 1, 1, 1, 1) for value in p.gamma_sigma(t))
            target = (target - sigma * x_t) / gamma
        torch.testing.assert_close(loss, target.square().mean())
        *asked, label = model.call_args.args
        torch.testing.assert_close(asked, [x_t, t, k])
        assert label is None


def test_random_draws_differ_with_each_number():
    draws = {torch.rand((), generator=generator_for(*n)).item() for n in itertools.product(range(3), repeat=3)}
    assert len(draws) == 27


def test_labels_are_dropped_at_the_given_rate():
    x0, labels, args = torch.zeros(400, 1, 4, 8, 8), torch.full((400,), 7), arguments("--label-dropout", "0.25")
    labels = train.draw(x0, labels, 10, Pyramid("flow"), 2, range(400), args)[3]
    assert set(labels.tolist()) == {7, 10} and 0.15 < (labels == 10).float().mean() < 0.35


def test_stages_are_drawn_evenly_or_as_the_odds_say_and_by_the_step_alone():
    runs = [arguments(*options) for options in ([], [], ["--seed", "1"], ["--stage-odds", "4", "1", "1"])]
    even, again, other, noisiest = ([train.draw_stage(step, args) for step in range(1200)] for args in runs)
    assert even == again != other
    for drawn, counts in ((even, (400, 400, 400)), (noisiest, (200, 200, 800))):
        assert all(abs(drawn.count(k) - expected) < 60 for k, expected in enumerate(counts))


BY_STAGE = ["8", "4", "2"]  # noisiest first, and so k = 2 first


@pytest.mark.parametrize("accumulate", ["1", "2"])
@pytest.mark.parametrize("half, batch, sizes", [(["3"], ["6"], (6, 6, 6)), (["4", "2", "1"], BY_STAGE, (2, 4, 8))])
def test_no_sample_number_is_left_out_or_drawn_twice_on_one_rank_or_two(half, batch, sizes, accumulate):
    args, halved = (arguments("--accumulate", accumulate, "--batch", *each) for each in (batch, half))
    alone = train.TrainingBatches(MovingDigits(), args, 0, 1)
    ranks = [train.TrainingBatches(MovingDigits(), halved, rank, 2) for rank in (0, 1)]
    taken = [list(alone.numbers(micro)) for micro in range(60)]
    assert list(itertools.chain(*taken)) == list(range(sum(map(len, taken))))
    assert taken == [[*ranks[0].numbers(micro), *ranks[1].numbers(micro)] for micro in range(60)]
    stages = [train.draw_stage(micro // args.accumulate, args) for micro in range(60)]
    assert set(stages) == {0, 1, 2} and [len(numbers) for numbers in taken] == [sizes[k] for k in stages]
    for micro in (59, 17, 0):  # as after --resume, in any order
        assert list(train.TrainingBatches(MovingDigits(), args, 0, 1).numbers(micro)) == taken[micro]


def first_step(*options: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient that the optimizer sees, and the state's losses after it."""
    state, args, batches = small_state("--optimizer", "adamw", *options, stage=0)
    gradients, parameters = [], list(state.model.parameters())
    state.optimizers[0].register_step_pre_hook(lambda *_: gradients.extend(p.grad.flatten() for p in parameters))
    train.optimize(state, state.model, Pyramid("flow"), batches, 0, args)
    return torch.cat(gradients), state.losses


def test_micro_batches_have_the_gradient_of_the_large_batch_which_is_clipped_as_asked():
    options = "--align", "none", "--clip"
    gradient, losses = first_step("--batch", "4", "--accumulate", "2", *options, "0")
    of_large, loss = first_step("--batch", "8", *options, "0")
    torch.testing.assert_close(gradient, of_large)
    assert losses[1].tolist() == [2, 0, 0] and gradient.norm() > 0.01
    torch.testing.assert_close(losses[0] / 2, loss[0])
    assert first_step("--batch", "8", *options, "1e-3")[0].norm() == pytest.approx(1e-3, rel=1e-3)


def test_the_average_follows_the_weights_and_the_rate_its_schedule():
    state, args, batches = small_state("--steps", "100", "--warmup", "9", "--lr", "0.1", "--clip", "0.5", stage=0)
    average = [parameter.clone() for parameter in state.ema.parameters()]
    for step in range(3):
        train.optimize(state, state.model, Pyramid("flow"), batches, 0, args)
        pairs, decay = zip(average, state.model.parameters(), strict=True), (1 + step) / (10 + step)
        average = [decay * old + (1 - decay) * new.detach() for old, new in pairs]
    torch.testing.assert_close([*state.ema.parameters()], average)
    assert [train.learning_rate(step, args) for step in (0, 50, 100)] == pytest.approx([0.01, 0.05, 0], abs=1e-9)


def test_compile_makes_one_graph_a_stage(tmp_path, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(Block, "compile", lambda block, **o: torch.nn.Module.compile(block, backend=counter, **o))
    torch._dynamo.reset()
    run_training(tmp_path, "--compile", "--depth", "2", "--steps", "6")
    assert counter.frame_count == len({train.draw_stage(step, arguments()) for step in range(6)}) == 3


SPACE = "--pyramid space-time --shift 2 --batch 8 4 2 --patch 4 --size 16 32 --frames 13"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("option", ["--steps=10", "--compile", "--gradient-checkpointing", "--precision=bf16", SPACE])
@pytest.mark.parametrize("classes", [MovingDigits.classes, ()])
def test_captured_model_has_the_gradients_of_the_model(option, classes, monkeypatch):
    monkeypatch.setattr(MovingDigits, "classes", classes)
    args, device = arguments(*option.split()), choose_device()
    data, p = open_data(args), make_pyramid(args)
    state = train.make_state(train.make_model(data, args), args, device, None)
    captured, parameters = train.fast_form(state.model, args, device), list(state.model.parameters())
    assert isinstance(captured, Captured)
    with torch.no_grad():  # as steps of training will
        [parameter.add_(0.1 * torch.randn_like(parameter)) for parameter in parameters]
    for k in (2, 0, 1, 0):
        batch = next(train.make_batches(data, args, 0, 0, 1, device, k))
        gradients = []
        for model in (captured, state.model):
            loss = train.training_loss(model, p, *batch, k, args)
            loss.backward()
            gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in parameters)])
            state.model.zero_grad()
        tolerance = {"rtol": 0.1, "atol": 1e-3} if "bf16" in option else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(*gradients, **tolerance)
    args.accumulate = 2  # whose second backward pass would write over the gradients of the first
    assert train.fast_form(state.model, args, device) is state.model


def test_gradient_checkpointing_keeps_less_and_changes_nothing(whole, tmp_path):
    assert_same_weights(run_training(tmp_path, "--steps", "6", "--gradient-checkpointing"), whole)
    resume = ["--resume", "--out", str(tmp_path), "--no-gradient-checkpointing", "--no-compile"]
    assert not train.parse_args(resume)[0].gradient_checkpointing  # what only changes speed can be turned off
    model, x, kept = small_model(), torch.randn(2, 1, 8, 16, 16), []
    for model.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            model(x, torch.rand(2), 0)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_ten_in_a_row_end_the_run(tmp_path, monkeypatch):
    true_loss, bad = train.training_loss, {0, 1, *range(4, 13), *range(14, 24)}  # steps, counted from 0
    scale = (math.nan if step in bad else 1 for step in itertools.count())
    monkeypatch.setattr(train, "training_loss", lambda *inputs: true_loss(*inputs) * next(scale))
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, "--steps", "40", "--save-interval", "11", "--log-interval", "1", "--out", str(tmp_path)])
    last = f"10 steps in a row, last at step 24, stage {train.draw_stage(23, arguments())}: "  # counted from 1
    assert last in str(stopped.value) and f"the last checkpoint is {tmp_path}/checkpoint.pt" in str(stopped.value)
    rows = rows_of(tmp_path)
    assert [row["loss"] is None for row in rows] == [step in bad for step in range(23)]
    assert [row["gradient_norm"] is None for row in rows] == [step in bad for step in range(23)]
    assert all(row["gradient_norm"] > 0 for row in rows if row["gradient_norm"] is not None)
    assert [row["skipped"] for row in rows] == [len(bad & {*range(step + 1)}) for step in range(23)]
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    assert (content["step"], content["skipped"], content["skipped_in_a_row"]) == (22, 19, 8)
    assert all(value.isfinite().all() for part in ("model", "ema") for value in content[part].values())
    states = [state for optimizer in content["optimizers"] for state in optimizer["state"].values()]
    assert {int(state["step"]) for state in states if "step" in state} == {3}  # of the 22, AdamW took three


def test_one_process_with_two_micro_batches_goes_on_with_what_two_processes_began(tmp_path):
    words = ["--steps", "6", "--device", "cpu", "--batch", *BY_STAGE, "--warmup", "0"]
    words += ["--save-interval", "3", "--log-interval", "1", "--convolution"]
    one, two = tmp_path / "one", tmp_path / "two"
    whole = run_training(one, *words, "--accumulate", "2")
    for process in start_two(train.__file__, *TINY, *words, "--out", two):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0 and "Warning" not in err, err
    (two / "checkpoint-previous.pt").replace(two / "checkpoint.pt")  # after step 3
    resumed = run_training(two, *words, "--resume", "--accumulate", "2")
    assert (resumed["step"], resumed["world"], resumed["args"]["accumulate"]) == (6, 1, 2)
    assert_same_weights(resumed, whole, atol=2e-5)
    losses = [[row["loss"] for row in rows_of(run)] for run in (one, two)]
    assert len(losses[0]) == 6 and losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_workers_and_a_group_of_one_process_change_nothing(whole, tmp_path, monkeypatch):
    assert_same_weights(run_training(tmp_path / "workers", "--steps", "6", "--workers", "2"), whole)
    destroy = train.dist.destroy_process_group

    def destroy_last():  # seen once: otherwise a rank may never end
        assert not any(type(thing) is train.DistributedDataParallel for thing in gc.get_objects())
        destroy()

    monkeypatch.setattr(train.dist, "destroy_process_group", destroy_last)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    assert_same_weights(run_training(tmp_path / "group", "--steps", "6"), whole)


def wait_for(path: Path, process) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or not path.stat().st_size:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(str(process.communicate()))
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_or_job_saves_first(number, tmp_path):
    """As Ctrl-C in a terminal sends it, and a scheduler to each process of a job: the one that prepares the clips must
    live on meanwhile."""
    words = [train.__file__, *TINY, "--workers", 1, "--steps", 10**6, "--out", tmp_path]
    process = command(*words, start_new_session=True)
    wait_for(tmp_path / "metrics.jsonl", process)
    if number == signal.SIGTERM:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            os.kill(int(child), number)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in out and "Traceback" not in err
    assert ("a second Ctrl-C ends at once" in err) == (number == signal.SIGINT)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] > 0 and not list(tmp_path.glob("*.tmp"))


def test_a_run_whose_process_that_prepares_clips_is_killed_ends_in_one_sentence(tmp_path, monkeypatch):
    optimize = train.optimize

    def kill_and_optimize(state, *inputs):
        for child in multiprocessing.active_children() if state.step == 9 else ():
            child.kill()
            child.join()
        optimize(state, *inputs)

    monkeypatch.setattr(train, "optimize", kill_and_optimize)
    with pytest.raises(SystemExit, match="^train.py: a process that prepares clips has ended, perhaps for lack of mem"):
        train.main([*TINY, "--workers", "1", "--steps", "100", "--out", str(tmp_path)])


def test_a_run_that_lacks_shared_memory_ends_in_one_sentence(tmp_path, monkeypatch):
    error = RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", Mock(side_effect=error))
    monkeypatch.setattr(train, "get_worker_info", object)  # as in a process that prepares clips
    with pytest.raises(SystemExit, match="^train.py: too little shared memory for --workers.*--shm-size"):
        train.main([*TINY, "--steps", "9", "--out", str(tmp_path)])


def test_when_one_of_two_processes_is_killed_the_other_ends_and_says_so(tmp_path):
    ranks = start_two(
        train.__file__, *TINY, "--steps", 10**6, "--save-interval", 2, "--device", "cpu", "--out", tmp_path
    )
    wait_for(tmp_path / "checkpoint.pt", ranks[0])
    ranks[1].kill()
    _, err = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "Traceback" not in err
    assert "another process of the run has ended" in err and f"--resume --out {tmp_path}" in err
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] > 0


def test_devices_that_are_not_there_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for device in ("cuda", "mps"):
        said = fails_with_one_line(capsys, train.main, "--out", tmp_path / "run", "--device", device)
        assert f"--device {device}: torch {torch.__version__} finds no such device" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "process 1 of this machine finds 1 GPU(s): " in fails_with_one_line(capsys, train.main, "--out", "nowhere")


def test_a_cluster_s_variable_of_processes_starts_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert start_processes("cpu")[:2] == (0, 1)


BAD_NUMBERS = "--size 16 0, --batch 8 4 0, --shift nan, --steps 1e3, --frames 1.5, --seed 99999999999999999999, --ema 2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data that cannot be trained on, and clips of 16 frames."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("empty/a.webp", "empty/b.apng", "empty/c.npy", "empty/d.pt", "empty/e.gif"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "latents").mkdir()
    torch.save(torch.randn(4, 9, 8, 16), folder / "latents" / "a.pt")
    (folder / "file").write_text("precious")
    animation(folder / "clips" / "a.gif", 16)
    return folder


@pytest.mark.parametrize(
    "words, message",
    [
        *[(words, f"argument {words.split()[0]}: must be a") for words in BAD_NUMBERS.split(",")],
        ("--size 30", "--size 30: height and width must be multiples of 4: --patch 4, 3 stages in time"),
        ("--size 24 16 --pyramid space-time", "--size 24 16: height and width must be multiples of 16: --patch 4, 3"),
        ("--frames 4 --stages 4", "--stages 4 is too many for --frames 4: take fewer, or --pyramid space"),
        ("--size 8 32", "a size of 16 or more, and at least one frame and digit, not 8, 16 and 1"),
        ("--batch 8 4", "--batch needs one number, or one for each of --stages 3, not 8 4"),
        ("--stage-odds 2 1", "--stage-odds needs a number up to 1000 for each of --stages 3"),
        ("--stage-odds 2 1 5000", "--stage-odds needs a number up to 1000"),
        ("--ends 0.5 0", "--ends needs a time below 1 for each of --stages 3, falling to 0"),
        ("--ends 0.25 0.5 0", "--ends needs a time below 1"),
        ("--candidates 4", "--candidates has no meaning with --align assignment"),
        ("--labels folder", "--labels has no meaning without --data"),
        ("--data {data} --label-dropout 0.5", "--label-dropout has no meaning without --labels"),
        ("--stages 1 --pyramid space", "--pyramid has no meaning with --stages 1"),
        ("--stages 1 --stage-odds 3", "--stage-odds has no meaning with --stages 1"),
        ("--data {data} --frames 1 --stages 1 --frame-stride 2", "--frame-stride has no meaning with --frames 1"),
        ("--width 30", "width 30 must be a multiple of 16, 4 times the number of heads"),
        ("--width 1099511627776", "not enough memory"),
        ("--mode ddim --ends 0.999 0.998 0", "use fewer stages, lower end times or a noisier schedule"),
        ("--out {data}/file", "--out {data}/file: {data}/file is no folder to write in (File exists)"),
        ("--resume", "checkpoint.pt does not exist: give the run's folder with --out"),
        ("--data {data}/gone", "gone is not a folder"),
        ("--out= --data {data}/clips", "the value of --out is empty"),
        ("--data '' --steps 1", "the value of --data is empty"),  # as a variable of the shell that was not set
        ("--data {data}/empty", "skipped: 5 unusable: cannot be decoded"),
        (
            "--data {data}/latents --frames 8 --patch 3",
            "--size 8 16: height and width must be multiples of 3: --patch 3, 3 stages in time; latents",
        ),
        ("--data {out}", "is --data: the run's own files would be trained on"),
        ("--init {data}/gone.pt", "gone.pt does not exist"),
        ("--init {weights} --depth 2", "a model of depth 2 cannot start from one of depth 4"),
        ("--mode ddim --init {weights}", "trained with --mode flow, not ddim"),
        ("--data {data}/clips --init {weights}", "trained with labels, unlike this"),
    ],
)
def test_train_refuses_bad_input_in_one_sentence(words, message, folder, tmp_path, capsys):
    weights = ROOT / "weights" / "flow-3.pt"
    out, message = tmp_path / "out", message.replace("{data}", str(folder))
    words = shlex.split(words.format(data=folder, weights=weights, out=out))
    assert message in fails_with_one_line(capsys, train.main, "--steps", 1, "--out", out, *words)
    assert {path.name for path in out.glob("*")} <= {"index.json", "lock"}
    assert (folder / "file").read_text() == "precious"


def test_a_second_process_in_a_run_s_folder_is_refused(tmp_path, capsys):
    hold = "import sys, checkpoint; checkpoint.claim(checkpoint.Path(sys.argv[1])); print(flush=True); input()"
    with command("-c", hold, tmp_path, cwd=ROOT, stdin=subprocess.PIPE) as other:
        other.stdout.readline()
        error = fails_with_one_line(capsys, train.main, *TINY, "--steps", 1, "--out", tmp_path)
        assert f"another process trains in {tmp_path}" in error and not (tmp_path / "metrics.jsonl").exists()
        for process in start_two(train.__file__, *TINY, "--steps", "1", "--device", "cpu", "--out", tmp_path):
            error = process.communicate(timeout=120)[1]
            assert process.returncode == 2 and error.count("\n") == 1 and "another process" in error, error
        other.kill()
    assert run_training(tmp_path, "--steps", "1")["step"] == 1


def test_a_run_that_went_on_after_it_was_read_is_not_gone_on_with(tmp_path):
    new = train.parse_args([*TINY, "--steps", "1", "--out", str(tmp_path)])
    run_training(tmp_path, "--steps", "1")  # as another process does meanwhile
    with pytest.raises(ValueError, match="checkpoint.pt is there already"):
        train.set_up(*new)
    resumed = train.parse_args(["--resume", "--steps", "3", "--out", str(tmp_path)])
    run_training(tmp_path, "--resume", "--steps", "2")
    with pytest.raises(ValueError, match="has gone on meanwhile: start --resume again"):
        train.set_up(*resumed)


def test_runs_are_named_by_mode_stages_pyramid_and_folder_and_have_as_many_stages_as_halve_something(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # there may be runs where the tests are called
    (tmp_path / "cats").mkdir()
    words = {"": "flow-3", f"--data {tmp_path}/cats/": "flow-3-cats", "--frames 5 --stages 4": "flow-4"}
    words |= {"--frames 1 --pyramid space": "flow-3-space", "--frames 1 --stages 1": "flow-1"}
    for given, name in words.items():
        assert train.parse_args(given.split())[0].out == Path("runs", name)


def test_the_loss_on_clips_held_out_is_measured_at_every_save_and_chooses_the_best(tmp_path, monkeypatch, capsys):
    for number, name in itertools.product(range(6), "ab"):
        animation(tmp_path / "clips" / name / f"{number}.gif", 9)
    losses = iter([[3.0, 3, 3], [1.0, 2, 3], [4.0, 1, 3]])
    monkeypatch.setattr(train, "held_out_loss", lambda *inputs: next(losses) if inputs[2] else None)
    words = ["--held-out", "0.2", "--data", str(tmp_path / "clips"), "--labels", "folder"]
    content = run_training(tmp_path, *words, "--steps", "6", "--save-interval", "2", "--log-interval", "1")
    assert content["best"] == 2 and load_checkpoint(tmp_path / "checkpoint-best.pt")["step"] == 4
    rows = [row.get("held_out_by_stage") for row in rows_of(tmp_path)]
    assert rows == [None, [3, 3, 3], None, [1, 2, 3], None, [4, 1, 3]]
    assert "12 files found, 10 used, 10 clips of 90 frames in all, 2 clips held out" in capsys.readouterr().out
    clips = open_data(arguments(*words))
    kept = (tmp_path / "held-out.txt").read_text().splitlines()
    assert kept == [str(source.files[0]) for source in clips.judged_on.sources] and len(kept) == 2
    assert not {*kept} & {str(source.files[0]) for source in clips.sources}


def test_a_held_out_loss_is_of_the_same_noise_every_time_and_without_labels_if_training_never_has_any(monkeypatch):
    model, p, data = small_model(10), Pyramid("flow"), open_data(arguments("--held-out", "0.1"))
    assert not torch.equal(data[0][0], data.judged_on[0][0])
    once, again = (train.held_out_loss(model, p, data.judged_on, arguments("--seed", seed)) for seed in "01")
    assert once == again and len(once) == 3
    seen = []
    monkeypatch.setattr(train, "training_loss", lambda *inputs: seen.append(inputs[5]) or torch.zeros(()))
    for dropout in ("0.9", "1"):
        train.held_out_loss(model, p, data.judged_on, arguments("--label-dropout", dropout))
    labels, none = torch.stack(seen).chunk(2)
    assert (labels < 10).all() and (none == 10).all()


def test_a_signal_ends_a_preview_and_then_saves_before_any_loss_is_measured(tmp_path, monkeypatch, capsys):
    calls, forward = [], DiT.forward

    def signalled(model, *inputs):
        if not model.training:  # a preview, or a loss on clips held out
            calls.append(inputs)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(model, *inputs)

    monkeypatch.setattr(DiT, "forward", signalled)
    words = "--steps 9 --sample-interval 2 --save-interval 9 --sample-number 8 --batch 2 --held-out 0.1".split()
    assert run_training(tmp_path, *words, code=128 + signal.SIGTERM)["step"] == 3 and len(calls) == 3
    assert not list(tmp_path.glob("*.gif")) and "no sample clips" not in capsys.readouterr().err


def test_ctrl_c_is_heeded_when_nobody_can_be_told(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(os, "write", Mock(side_effect=OSError("the terminal is closed")))
    stop = train.cli.StopRequest()
    stop._handle(signal.SIGINT, None)
    assert stop.signal == signal.SIGINT


@pytest.mark.parametrize("error, said", [(RuntimeError("odd"), "odd"), (MemoryError(), "not enough memory")])
def test_a_preview_or_held_out_loss_that_fails_is_said_and_does_not_cost_the_run(
    error, said, tmp_path, monkeypatch, capsys
):
    def break_off(clips, path, *_, **__):
        assert (tmp_path / "checkpoint.pt").exists()  # saved before
        path.write_bytes(b"GIF89a")
        raise error

    monkeypatch.setattr(sample, "save_gif", break_off)
    run_training(tmp_path, "--steps", "2")
    assert f"step 2: no sample clips ({said}); the run goes on" in capsys.readouterr().err
    assert not list(tmp_path.glob("step-*"))
    monkeypatch.setattr(train, "training_loss", Mock(side_effect=error))
    assert train.held_out_loss(small_model(10), Pyramid("flow"), MovingDigits(8, 16), arguments()) is None
    assert f"no held-out loss this time ({said})" in capsys.readouterr().err


def test_a_preview_is_bounded_in_pixels_and_can_be_turned_off(tmp_path, monkeypatch):
    sizes, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **o: sizes.append(a[3]) or generate(*a, **o))
    monkeypatch.setattr(sample, "MOST_PIXELS", 5 * 8 * 16 * 16)
    run_training(tmp_path / "few", "--steps", "1", "--sample-number", "7", "--batch", "2")
    assert sizes == [2, 2, 1] and (tmp_path / "few" / "step-0000001.gif").exists()  # five, a batch at a time
    run_training(tmp_path / "off", "--steps", "1", "--sample-number", "0")
    assert len(sizes) == 3 and not list((tmp_path / "off").glob("*.gif"))


def test_workers_are_as_many_as_the_help_says(monkeypatch):
    asked = []
    monkeypatch.setattr(train, "DataLoader", lambda *_, num_workers, **__: asked.append(num_workers) or ())
    for words, device in ((["--data", "clips"], "cpu"), (["--workers", "3"], "cpu"), ([], "cpu"), ([], "cuda")):
        args = train.make_parser().parse_args(words)
        assert not list(train.make_batches(MovingDigits(), args, 0, 0, 1, torch.device(device)))
    assert asked == [1, 3, 0, 4]
