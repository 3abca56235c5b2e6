"""Training: the loss of Algorithm 2, the steps, several processes, and what the command refuses."""

import functools
import gc
import itertools
import json
import math
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import (
    ROOT,
    TINY,
    animation,
    assert_same_weights,
    both_modes,
    command,
    decompression_bomb,
    fails_with_one_line,
    pyramid_of,
    run_training,
    save_hostile,
    small_model,
    small_state,
)
from torch._dynamo.testing import CompileCounter

import sample
import train
from checkpoint import load_checkpoint, load_weights, make_pyramid, save
from cli import TRAINING, choose_device, generator_for
from data import MovingDigits, open_data
from model import Block, Captured, DiT, DiTConfig
from tpdiff import Pyramid, align, draw_nearest, randn

# ---- What a step is trained on, and its loss (Algorithm 2)


@both_modes
@pytest.mark.parametrize("stages", [1, 3])
def test_loss_falls_on_one_batch(mode, stages):
    args = train.make_parser().parse_args([*TINY, "--mode", mode, "--stages", str(stages)])
    p, data, model = pyramid_of(mode, stages), MovingDigits(8, 16), small_model(10, live=False, stages=stages)
    x0, labels = torch.stack([data[n][0] for n in range(4)]), torch.tensor([data[n][1] for n in range(4)])
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for k in range(stages):
        losses = []
        for _ in range(80):
            batch = train.draw(x0, labels, 10, p, k, [0, 1, 2, 3], args)
            losses.append(train.training_loss(model, p, *batch, k, args))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.7 * losses[0], (k, losses[0], losses[-1])


class Spy(DiT):
    """Returns zeros, and keeps what it was asked."""

    def forward(self, x, t, stage, y=None):
        self.asked = x, t, stage, y
        return torch.zeros_like(x)


@both_modes
@pytest.mark.parametrize("alignment", ["assignment", "nearest", "none"])
def test_training_loss_is_that_of_algorithm_2(mode, alignment):
    args = train.make_parser().parse_args([*TINY, "--align", alignment, "--candidates", "3"])
    p, data, model = pyramid_of(mode, 3), MovingDigits(8, 16), Spy(DiTConfig(width=8, depth=1, heads=1))
    paper = Pyramid(mode, 3)  # whose target in ddim mode is eps_k
    x0 = torch.stack([data[n][0] for n in range(8)])
    for k in range(3):
        batch = train.draw(x0, torch.full((8,), -1), 0, p, k, list(range(8)), args)
        loss = train.training_loss(model, p, *batch, k, args)
        generators = [generator_for(0, TRAINING, n) for n in range(8)]
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
        for asked, expected in zip(model.asked, (x_t, t, k, None), strict=True):
            torch.testing.assert_close(asked, expected) if expected is not None else None
        assert model.asked[3] is None


def stage_args(seed, *options):
    return train.make_parser().parse_args(["--seed", str(seed), *options])


def test_noise_and_time_follow_the_seed_and_the_sample_number():
    draws = {
        torch.rand(4, generator=generator_for(*numbers)).sum().item()
        for numbers in itertools.product(range(3), repeat=3)
    }
    assert len(draws) == 27
    losses = set()
    for seed in ("0", "1"):
        args = train.make_parser().parse_args([*TINY, "--seed", seed])
        for numbers in ([0, 1], [2, 3]):
            x0, labels = torch.zeros(2, 1, 8, 16, 16), torch.tensor([-1, -1])
            batch = train.draw(x0, labels, 0, Pyramid("flow"), 0, numbers, args)
            losses.add(train.training_loss(small_model(live=False), Pyramid("flow"), *batch, 0, args).item())
    assert len(losses) == 4


def test_labels_are_dropped_at_the_given_rate():
    args = train.make_parser().parse_args([*TINY, "--label-dropout", "0.25"])
    x0, labels = torch.zeros(400, 1, 4, 8, 8), torch.full((400,), 7)
    labels = train.draw(x0, labels, 10, Pyramid("flow"), 2, list(range(400)), args)[3]
    assert set(labels.tolist()) == {7, 10} and 0.15 < (labels == 10).float().mean() < 0.35


def test_stages_are_drawn_evenly_or_as_the_odds_say_and_by_the_step_alone():
    drawn = [train.draw_stage(step, stage_args(0)) for step in range(3000)]
    assert drawn == [train.draw_stage(step, stage_args(0)) for step in range(3000)]
    assert drawn != [train.draw_stage(step, stage_args(1)) for step in range(3000)]
    assert all(900 < drawn.count(k) < 1100 for k in range(3))
    noisiest = [train.draw_stage(step, stage_args(0, "--stage-odds", "4", "1", "1")) for step in range(3000)]
    assert all(abs(noisiest.count(k) - expected) < 100 for k, expected in enumerate((500, 500, 2000)))


@both_modes
def test_shifted_times_have_the_given_median_and_a_shift_of_one_changes_nothing(mode, tmp_path):
    def times(count, stages, k, *options):
        words = ["--stages", str(stages), "--align", "none", "--mode", mode, *options]
        args = train.parse_args([*TINY, *words, "--out", str(tmp_path)])[0]
        p, model = make_pyramid(args), Spy(DiTConfig(width=8, depth=1, heads=1))
        x0, labels = torch.zeros(count, 1, 4, 4, 4), torch.full((count,), -1)
        train.training_loss(model, p, *train.draw(x0, labels, 0, p, k, range(count), args), k, args)
        return model.asked[1]

    draws = {shift: times(4000, 1, 0, "--shift", shift) for shift in ("1", "3")}
    assert torch.equal(times(9, 1, 0), draws["1"][:9]) and abs(draws["1"].median() - 0.5) < 0.03
    assert abs(draws["3"].median() - 0.75) < 0.03 and 0 <= draws["3"].min() and draws["3"].max() <= 1
    stage = pyramid_of(mode, 3, shift=3.0)[1]  # within a stage the middle of its unshifted times
    u = [t / (3 - 2 * t) for t in (stage.t_end, stage.t_start)]
    middle, drawn = sum(u) / 2, times(4000, 3, 1, "--shift", "3")
    assert abs(drawn.median() - 3 * middle / (1 + 2 * middle)) < 0.03
    assert stage.t_end <= drawn.min() and drawn.max() <= stage.t_start + 1e-6


# ---- The samples of a step


BY_STAGE = ["--batch", "8", "4", "2"]


@pytest.mark.parametrize("options", [["--batch", "3"], BY_STAGE, [*BY_STAGE, "--accumulate", "2"]])
def test_no_sample_number_is_left_out_or_drawn_twice_on_one_rank_or_two(options):
    args, data = stage_args(0, *options), MovingDigits(8, 16)
    alone, ranks = train.TrainingBatches(data, args, 0, 1), [train.TrainingBatches(data, args, r, 2) for r in (0, 1)]
    by_one = [alone.numbers(micro) for micro in range(60)]
    by_two = [[*ranks[0].numbers(micro), *ranks[1].numbers(micro)] for micro in range(60)]
    for taken in (by_one, by_two):
        numbers = list(itertools.chain(*taken))
        assert numbers == list(range(len(numbers)))
    sizes = (3, 3, 3) if "3" in options else (2, 4, 8)  # by stage, the flag has the noisiest first
    stages = [train.draw_stage(micro // args.accumulate, args) for micro in range(60)]
    assert set(stages) == {0, 1, 2} and [len(numbers) for numbers in by_one] == [sizes[k] for k in stages]
    assert [len(numbers) for numbers in by_two] == [2 * sizes[k] for k in stages]
    for micro in (59, 17, 0):  # as after --resume, in any order
        assert train.TrainingBatches(data, args, 0, 1).numbers(micro) == by_one[micro] == alone.numbers(micro)


def test_two_ranks_take_the_numbers_of_one_with_the_doubled_batch_at_every_stage():
    data, half = MovingDigits(8, 16), stage_args(0, "--batch", "4", "2", "1")
    ranks = [train.TrainingBatches(data, half, rank, 2) for rank in (0, 1)]
    whole = train.TrainingBatches(data, stage_args(0, *BY_STAGE), 0, 1)
    for micro in range(40):
        assert [*ranks[0].numbers(micro), *ranks[1].numbers(micro)] == list(whole.numbers(micro))


@pytest.mark.parametrize("pyramid", ["time", "space", "space-time"])
def test_a_batch_is_as_large_as_its_stage_asks_and_its_end_points_are_of_the_stage_s_shape(pyramid):
    options = ["--pyramid", pyramid, *BY_STAGE, "--patch", "4", "--frames", "13", "--size", "16", "32"]
    for k, (count, frames, divisor) in enumerate([(2, 13, 1), (4, 7, 2), (8, 4, 4)]):
        x_start, x_end, u, y = next(small_state(*options, stage=k)[2])
        rows, columns = (16, 32) if pyramid == "time" else (16 // divisor, 32 // divisor)
        assert u.shape == y.shape == (count,)
        assert x_start.shape == x_end.shape == (count, 1, 13 if pyramid == "space" else frames, rows, columns)


@pytest.mark.parametrize("pyramid", ["time", "space-time"])
def test_single_pictures_train_on_three_stages_and_are_sampled(pyramid, tmp_path):
    words = ["--pyramid", pyramid, "--patch", "4", "--steps", "8", "--log-interval", "8"]
    content = run_training(tmp_path, *words, "--frames", "1")
    (row,) = map(json.loads, (tmp_path / "metrics.jsonl").open())
    assert all(loss > 0 for loss in row["loss_by_stage"]) and not content["config"]["temporal"]
    weights = load_weights(tmp_path / "weights.pt")
    made = sample.generate(weights, make_pyramid(weights), None, 2, 3, precision="fp32")
    assert made.shape == (2, 1, 1, 16, 16) and made.isfinite().all()


@both_modes
def test_a_video_model_learns_from_single_pictures_at_every_stage_of_its_pyramid(mode):
    p, model = pyramid_of(mode, 3, "space-time"), small_model(factor=(2, 2, 2))
    args, x0 = stage_args(0), torch.stack([MovingDigits(1, 16)[n][0] for n in range(4)])
    for k in range(3):
        batch = train.draw(x0, torch.full((4,), -1), 0, p, k, range(4), args)
        loss = train.training_loss(model, p, *batch, k, args)
        model.zero_grad()
        loss.backward()
        assert batch[1].shape == (4, 1, 1, 16 // 2**k, 16 // 2**k)
        assert loss.isfinite() and model.embed_stage.weight.grad[k].abs().max() > 0


# ---- Steps


def gradient_of_first_step(*options: str) -> torch.Tensor:
    """The gradient that the optimizer sees."""
    state, args, batches = small_state("--optimizer", "adamw", *options, stage=0)
    gradients = []
    state.optimizers[0].register_step_pre_hook(
        lambda *_: gradients.append(torch.cat([p.grad.flatten() for p in state.model.parameters()]))
    )
    train.optimize(state, state.model, Pyramid("flow"), batches, 0, args)
    return gradients[0]


def test_the_reported_loss_is_the_mean_over_micro_batches():
    whole, accumulated = (
        small_state(*options, "--align", "none", stage=1) for options in (["--batch", "8"], ["--accumulate", "2"])
    )
    for state, args, batches in (whole, accumulated):
        train.optimize(state, state.model, Pyramid("flow"), batches, 1, args)
    assert accumulated[0].losses[1].tolist() == [0, 2, 0]
    means = [(state.losses[0, 1] / state.losses[1, 1]).item() for state, *_ in (whole, accumulated)]
    assert means[0] == pytest.approx(means[1], rel=1e-4)


def test_the_average_follows_the_weights_and_the_rate_its_schedule():
    state, args, batches = small_state("--steps", "100", "--warmup", "9", "--lr", "0.1", "--clip", "0.5")
    average = [parameter.clone() for parameter in state.ema.parameters()]
    stages = [train.draw_stage(step, stage_args(0)) for step in range(3)]
    for step, k in enumerate(stages):
        train.optimize(state, state.model, Pyramid("flow"), batches, k, args)
        decay = (1 + step) / (10 + step)
        new = [parameter.detach() for parameter in state.model.parameters()]
        average = [decay * old + (1 - decay) * now for old, now in zip(average, new, strict=True)]
    for ours, theirs in zip(state.ema.parameters(), average, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours.requires_grad
    assert [train.learning_rate(step, args) for step in (0, 50, 100)] == pytest.approx([0.01, 0.05, 0], abs=1e-9)
    assert state.losses[1].tolist() == [stages.count(k) for k in range(3)]
    assert ((state.losses[0] > 0) == (state.losses[1] > 0)).all() and len(set(stages)) > 1


def test_the_gradient_is_clipped_to_the_given_norm_and_not_at_zero():
    assert gradient_of_first_step("--clip", "1e-3").norm() == pytest.approx(1e-3, rel=1e-3)
    assert gradient_of_first_step("--clip", "0").norm() > 0.01


def test_accumulated_gradients_are_those_of_the_large_batch():
    options = "--clip", "0", "--align", "none", "--precision", "fp32"
    accumulated = gradient_of_first_step("--batch", "4", "--accumulate", "2", *options)
    torch.testing.assert_close(accumulated, gradient_of_first_step("--batch", "8", *options))


def test_compile_makes_one_graph_a_stage(tmp_path, monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    run_training(tmp_path, "--compile", "--depth", "3", "--steps", "12")
    drawn = {train.draw_stage(step, stage_args(0)) for step in range(12)}
    assert counter.frame_count == len(drawn) == 3


SPACE = "--pyramid space-time --shift 2 --batch 8 4 2 --patch 4 --size 16 32 --frames 13"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures CUDA graphs")
@pytest.mark.parametrize("option", ["--steps=10", "--compile", "--gradient-checkpointing", "--precision=bf16", SPACE])
@pytest.mark.parametrize("classes", [MovingDigits.classes, ()])
def test_captured_model_has_the_gradients_of_the_model(option, classes, monkeypatch):
    monkeypatch.setattr(MovingDigits, "classes", classes)
    args = train.make_parser().parse_args([*TINY, *option.split()])
    data, p = open_data(args), make_pyramid(args)
    state = train.make_state(train.make_model(data, args), args, choose_device(), None)
    captured, parameters = train.fast_form(state.model, args, choose_device()), list(state.model.parameters())
    assert isinstance(captured, Captured)
    with torch.no_grad():  # as steps of training will
        [parameter.add_(0.1 * torch.randn_like(parameter)) for parameter in parameters]
    for k in (2, 0, 1, 0):
        batch = next(train.make_batches(data, args, 0, 0, 1, choose_device(), k))
        gradients = []
        for model in (captured, state.model):
            loss = train.training_loss(model, p, *batch, k, args)
            loss.backward()
            gradients.append([loss.detach(), *(parameter.grad.clone() for parameter in parameters)])
            state.model.zero_grad()
        tolerance = {"rtol": 0.1, "atol": 1e-3} if "bf16" in option else {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(*gradients, **tolerance)
    args.accumulate = 2  # whose second backward pass would write over the gradients of the first
    assert train.fast_form(state.model, args, choose_device()) is state.model


def test_gradient_checkpointing_keeps_less_and_changes_nothing(tmp_path):
    plain = run_training(tmp_path / "plain", "--steps", "3")
    assert_same_weights(run_training(tmp_path / "less", "--steps", "3", "--gradient-checkpointing"), plain)
    model, x, kept = small_model(), torch.randn(2, 1, 8, 16, 16), {}
    for model.gradient_checkpointing in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            model(x, torch.rand(2), 0).sum()
        kept[model.gradient_checkpointing] = sum(sizes)
    assert kept[True] < 0.5 * kept[False]


def test_training_in_bf16_gives_finite_weights(tmp_path):
    content = run_training(tmp_path / "run", "--steps", "3", "--precision", "bf16")
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in content["model"].values())


LOSS = train.training_loss


def broken_loss(bad: set[int]):
    """training_loss that is NaN at these steps of a run of one micro-batch a step."""
    true_loss, steps = LOSS, itertools.count()

    def loss(*batch):
        value = true_loss(*batch)
        return value * math.nan if next(steps) in bad else value

    return loss


def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(tmp_path, monkeypatch):
    options = ["--steps", "6", "--log-interval", "1", "--stages", "1"]
    whole = run_training(tmp_path / "whole", *options)
    monkeypatch.setattr(train, "training_loss", broken_loss({0, 1, 4}))
    content = run_training(tmp_path / "run", *options)
    assert (content["skipped"], content["skipped_in_a_row"], whole["skipped"]) == (3, 0, 0)
    rows = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [row["skipped"] for row in rows] == [1, 2, 2, 2, 3, 3]
    assert [row["loss"] is None for row in rows] == [True, True, False, False, True, False]
    assert all(value.isfinite().all() for part in ("model", "ema") for value in content[part].values())
    states = [state for optimizer in content["optimizers"] for state in optimizer["state"].values()]
    assert {int(state["step"]) for state in states if "step" in state} == {3}  # of the six, AdamW took three


def test_ten_skipped_steps_in_a_row_end_the_run_and_the_message_says_where(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "training_loss", broken_loss(set(range(4, 13)) | set(range(14, 30))))
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, "--steps", "40", "--save-interval", "3", "--out", str(run)])
    stage = train.draw_stage(23, stage_args(0))  # steps count from 0 here, and from 1 in what is printed
    assert f"10 steps in a row, last at step 24, stage {stage}" in str(stopped.value)
    assert f"the last checkpoint is {run / 'checkpoint.pt'}" in str(stopped.value)
    content = torch.load(run / "checkpoint.pt", weights_only=True)
    assert content["step"] == 21 and all(value.isfinite().all() for value in content["model"].values())
    monkeypatch.setattr(train, "training_loss", broken_loss(set(range(40))))
    with pytest.raises(SystemExit, match="there is no checkpoint yet"):
        train.main([*TINY, "--steps", "40", "--out", str(tmp_path / "other")])


# ---- Processes, workers and signals


def train_as_rank(rank: int, world: int, port: int, out: Path, options: list[str]) -> None:
    """One process of a gloo group; each keeps a checkpoint of its own, for the test to compare."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    args, checkpoint = train.parse_args([*TINY, "--out", str(out / str(rank)), *options])
    dataset, state, *place = train.set_up(args, checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    destroy = train.dist.destroy_process_group

    def destroy_last():  # seen once: otherwise a rank may never end
        assert not any(type(thing) is train.DistributedDataParallel for thing in gc.get_objects())
        destroy()

    train.dist.destroy_process_group = destroy_last
    train.train(args, dataset, state, *place)
    save(state, dataset, args, world)


def test_two_processes_train_the_weights_of_one_with_the_doubled_batch(tmp_path):
    options, twice = ["--steps", "4", "--align", "none", "--batch", "4", "2", "1"], ["--batch", "8", "4", "2"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(train_as_rank, (2, port, tmp_path, options), nprocs=2)
    ranks = [torch.load(tmp_path / str(rank) / "checkpoint.pt", weights_only=True) for rank in (0, 1)]
    assert_same_weights(*ranks)
    one = run_training(tmp_path / "one", *options, *twice)
    assert_same_weights(ranks[0], one, atol=2e-5)
    accumulated = run_training(tmp_path / "accumulated", *options, "--accumulate", "2")
    assert_same_weights(accumulated, one, atol=2e-5)
    other = run_training(tmp_path / "other", *options, *twice, "--seed", "1")
    with pytest.raises(AssertionError):
        assert_same_weights(other, one, atol=1e-3)


def test_a_process_without_a_gpu_of_its_own_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        train.main(["--out", "nowhere"])
    assert stopped.value.code == 2
    assert "process 1 of this machine finds 1 GPU(s): start no more processes than GPUs" in capsys.readouterr().err


def test_digits_on_a_cpu_are_drawn_by_the_training_process_and_files_read_by_a_worker(monkeypatch):
    class Loader:
        def __init__(self, *_, num_workers, **__):
            asked.append(num_workers)

        def __iter__(self):
            return iter(())

    monkeypatch.setattr(train, "DataLoader", Loader)
    asked, digits = [], MovingDigits()
    for words, device in (([], "cpu"), (["--data", "clips"], "cpu"), (["--workers", "3"], "cpu"), ([], "cuda")):
        args = train.make_parser().parse_args([*words, "--steps", "1"])
        assert not list(train.make_batches(digits, args, 0, 0, 1, torch.device(device)))
    assert asked == [0, 1, 3, 4]


def test_workers_and_torchrun_of_one_process_change_nothing(tmp_path):
    whole = run_training(tmp_path / "whole", "--steps", "5")
    assert_same_weights(run_training(tmp_path / "workers", "--steps", "5", "--workers", "2"), whole)
    words = ["-m", "torch.distributed.run", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    process = command(*words, ROOT / "train.py", *TINY, "--steps", 5, "--out", tmp_path / "torchrun")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert_same_weights(torch.load(tmp_path / "torchrun" / "checkpoint.pt", weights_only=True), whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_first(number, tmp_path):
    """As Ctrl-C in a terminal and torchrun send it: the process that prepares the clips must live on meanwhile."""
    run = tmp_path / "run"
    process = command(ROOT / "train.py", *TINY, "--workers", 1, "--steps", 10**6, "--out", run, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in out and "Traceback" not in err
    assert torch.load(run / "checkpoint.pt", weights_only=True)["step"] > 0
    assert not list(run.glob("*.tmp"))


def test_when_one_of_two_processes_is_killed_the_other_ends_and_says_so(tmp_path):
    run = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    words = [ROOT / "train.py", *TINY, "--steps", 10**6, "--save-interval", 2, "--out", run]
    ranks = [
        command(*words, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"})
        for rank in (0, 1)
    ]
    deadline = time.monotonic() + 120
    while not (run / "checkpoint.pt").exists():
        assert ranks[0].poll() is None and time.monotonic() < deadline, ranks[0].communicate()
        time.sleep(0.1)
    ranks[1].kill()
    _, err = ranks[0].communicate(timeout=60)
    ranks[1].communicate()
    assert ranks[0].returncode == 1 and "Traceback" not in err
    assert "another process of the run has ended" in err and f"--resume --out {run}" in err
    assert load_checkpoint(run / "checkpoint.pt")["step"] > 0


# ---- What is refused


@pytest.mark.parametrize(
    "words, message",
    [
        ("--size 30", "--size 30 must divide by [4, 4]: --patch 4, 3 stages in time"),
        ("--size 16 30", "--size (16, 30) must divide by [4, 4]"),
        ("--size 24 --pyramid space", "--size 24 must divide by [16, 16]: --patch 4, 3 stages in space"),
        (
            "--size 24 16 --pyramid space-time",
            "--size (24, 16) must divide by [16, 16]: --patch 4, 3 stages in space-t",
        ),
        ("--size 30 --pyramid space --stages 2 --patch 6", "must divide by [12, 12]: --patch 6, 2 stages in space"),
        ("--size 16 16 16", "a size is one number, or height and width, not (16, 16, 16)"),
        ("--size 16 0", "--size"),
        ("--mode ddim --stages 40", "use fewer stages"),
        ("--batch 8 4", "--batch needs one number, or one for each of --stages 3, not (8, 4)"),
        ("--batch 8 4 2 1", "--batch needs one number, or one for each of --stages 3, not (8, 4, 2, 1)"),
        ("--batch 8 4 0", "--batch"),
        ("--pyramid cube", "--pyramid"),
        ("--stage-odds 2 1", "--stage-odds needs a number up to 1000 for each of --stages 3"),
        ("--stage-odds 2 1 0", "--stage-odds"),
        ("--ends 0.5 0", "--ends needs a time for each of --stages 3, noisiest first and the last 0"),
        ("--ends 0.5 0.25 0.1", "--ends needs a time"),
        ("--ends 0.25 0.5 0", "ends must be 3 times that begin with 0, rise and stay below 1"),
        ("--ends 1 0.5 0", "stay below 1"),
        ("--ends 0.5 0.5 0", "rise"),
        ("--shift 0", "--shift"),
        ("--shift nan", "--shift"),
        ("--time-shift 3", "--time-shift"),
        ("--stage-odds 2 1 5000", "--stage-odds needs a number up to 1000"),
        ("--steps 0", "--steps"),
        ("--stages -1", "--stages"),
        ("--mode edm", "edm"),
        ("--align no", "--align"),
        ("--candidates 4", "--candidates has no meaning with --align assignment"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr"),
        ("--width 30", "30"),
        ("--size 8 --patch 4", "size >= 16"),
        ("--size 8 32 --patch 4", "size >= 16, frames and digits >= 1, not (8, 32)"),
        ("--data {tmp}/gone", "gone is not a folder"),
        ("--data {tmp}/nothing", "0 files found"),
        ("--resume", "checkpoint.pt does not exist"),
        ("--frames 0", "--frames"),
        ("--frames -4", "--frames"),
        ("--frames 1.5", "--frames"),
        ("--size 0", "--size"),
        ("--patch 0", "--patch"),
        ("--depth 0", "--depth"),
        ("--heads 5", "heads, 5"),
        ("--batch 0", "--batch"),
        ("--accumulate 0", "--accumulate"),
        ("--steps 1e3", "--steps"),
        ("--seed -1", "--seed"),
        ("--seed 99999999999999999999", "--seed"),
        ("--stages 40 --pyramid space", "must divide by [2199023255552, 2199023255552]: --patch 4, 40 stages in space"),
        ("--ema 2", "--ema"),
        ("--clip -1", "--clip"),
        ("--label-dropout 1.5", "--label-dropout"),
        ("--precision fp8", "--precision"),
        ("--optimizer sgd", "--optimizer"),
        ("--labels yes", "--labels"),
        ("--labels folder", "--labels has no meaning without --data"),
        ("--latent-scale 0", "--latent-scale"),
        ("--frame-stride 0", "--frame-stride"),
        ("--align nearest --candidates 0", "--candidates"),
        ("--workers -1", "--workers"),
        ("--wings 2", "--wings"),
        ("--data {tmp}/file", "file is not a folder"),
        ("--data {tmp}/clips --labels folder", "skipped: 1 in no sub-folder"),
        ("--data {tmp}/clips --latent-scale 2", "latent scale is for latents"),
        ("--data {tmp}/clips --frames 32", "skipped: 1 shorter than 32 frames"),
        ("--data {tmp}/stills", "skipped: 1 stills"),
        ("--data {tmp}/empty", "skipped: 5 that cannot be decoded"),
        ("--data {tmp}/bomb", "skipped: 1 that cannot be decoded"),
        ("--init {tmp}/gone.pt", "gone.pt does not exist"),
        ("--init {tmp}/empty/d.pt", "not a whole checkpoint"),
        ("--init {tmp}/hostile.pt", "not a whole checkpoint"),
        ("--mode ddim --init {weights}", "trained with --mode flow, not ddim"),
        ("--data {tmp}/clips --init {weights}", "trained with labels, unlike this"),
        ("--data {tmp}/out", "is --data: the run's own GIFs would be trained on"),
    ],
)
def test_train_refuses_bad_input_in_one_sentence(words, message, tmp_path, capsys):
    places = {"tmp": tmp_path, "weights": ROOT / "weights" / "flow-3.pt"}
    (tmp_path / "file").write_text("not a folder")
    save_hostile(tmp_path / "hostile.pt")
    animation(tmp_path / "clips" / "a.gif", 16)
    animation(tmp_path / "stills" / "a.gif", 1)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("a.webp", "b.apng", "c.npy", "d.pt", "e.gif"):
        (tmp_path / "empty" / name).write_bytes(b"")
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb" / "a.png").write_bytes(decompression_bomb())
    words = [word.format(**places) for word in words.split()]
    assert message in fails_with_one_line(capsys, train.main, *words, "--out", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*")} <= {"index.json"} and not (
        tmp_path / "run-by-hostile-code"
    ).exists()


@pytest.mark.parametrize("out, message", [("file", "File exists"), ("file/run", "Not a directory")])
def test_train_says_so_when_its_folder_cannot_be_made(out, message, tmp_path, capsys):
    (tmp_path / "file").write_text("precious")
    assert message in fails_with_one_line(capsys, train.main, *TINY, "--out", tmp_path / out)
    assert (tmp_path / "file").read_text() == "precious"


def test_too_little_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    words = [*TINY, "--width", 2**40, "--heads", 4, "--out", tmp_path / "out"]
    assert "not enough memory" in fails_with_one_line(capsys, train.main, *words)

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(sample, "generate", refuse)
    words = ["--out", tmp_path / "clips"]
    assert "--number" in fails_with_one_line(capsys, sample.main, *words)
    assert not list(tmp_path.glob("clips*"))


# ---- What is measured and shown on the way, and must not cost the run


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_on_clips_held_out_is_measured_at_every_save_and_chooses_the_best(tmp_path, monkeypatch):
    words = ["--steps", "6", "--save-interval", "2", "--log-interval", "1", "--held-out", "0.1"]
    found = iter([[3.0, 3, 3], [1.0, 2, 3], [4.0, 1, 3]])
    measured = []
    real = train.held_out_loss

    def fake(state, pyramid, clips, args):
        measured.append((real(state, pyramid, clips, args), real(state, pyramid, clips, args)))
        return next(found)

    monkeypatch.setattr(train, "held_out_loss", fake)
    run_training(tmp_path / "run", *words)
    rows = rows_of(tmp_path / "run")
    assert [row.get("held_out_by_stage") for row in rows] == [None, [3, 3, 3], None, [1, 2, 3], None, [4, 1, 3]]
    assert torch.load(tmp_path / "run" / "checkpoint-best.pt", weights_only=True)["step"] == 4
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["best"] == 2
    assert all(once == again and len(once) == 3 for once, again in measured)  # the same noise and times every time
    assert measured[0][0] != measured[-1][0]  # of other weights


@pytest.mark.parametrize("names", [["a", "b"], []])
def test_held_out_clips_are_a_folder_s_or_digits_of_another_seed(tmp_path, names, capsys):
    for number, name in itertools.product(range(6), names):
        (tmp_path / "clips" / name).mkdir(parents=True, exist_ok=True)
        animation(tmp_path / "clips" / name / f"{number}.gif", 9)
    words = ["--data", str(tmp_path / "clips"), "--labels", "folder"] if names else []
    run_training(tmp_path / "run", "--steps", "2", "--held-out", "0.2", *words)
    assert len(rows_of(tmp_path / "run")[-1]["held_out_by_stage"]) == 3
    assert ("held out: 2 clips" in capsys.readouterr().out) == bool(names)
    args = train.parse_args([*TINY, "--held-out", "0.2", "--out", str(tmp_path / "other"), *words])[0]
    data = open_data(args)
    assert data.judged_on.classes == data.classes
    assert names or not torch.equal(data[0][0], data.judged_on[0][0])


ERRORS = {"odd": RuntimeError("odd"), "not enough memory": torch.OutOfMemoryError("CUDA"), "NaN": ValueError("NaN")}


@pytest.mark.parametrize("reason", ERRORS)
def test_a_preview_or_held_out_loss_that_fails_is_said_and_does_not_cost_the_run(tmp_path, monkeypatch, capsys, reason):
    def fail(*_, **__):
        assert (tmp_path / "run" / "checkpoint.pt").exists()  # saved before
        raise ERRORS[reason]

    with monkeypatch.context() as patch:
        patch.setattr(sample, "generate", fail)
        run_training(tmp_path / "run", "--steps", "2")
    assert f"step 2: no sample clips ({reason}); the run goes on" in capsys.readouterr().err
    monkeypatch.setattr(train, "training_loss", fail)
    state, args, _ = small_state()
    assert train.held_out_loss(state.ema, Pyramid("flow"), MovingDigits(8, 16), args) is None
    assert f"no held-out loss this time ({reason})" in capsys.readouterr().err


def test_a_preview_is_bounded_in_pixels_and_can_be_turned_off(tmp_path, monkeypatch):
    from PIL import Image

    run_training(tmp_path / "off", "--steps", "1", "--sample-number", "0")
    assert not list((tmp_path / "off").glob("*.gif"))
    sizes, generate = [], sample.generate
    monkeypatch.setattr(sample, "generate", lambda *a, **o: sizes.append(a[3]) or generate(*a, **o))
    monkeypatch.setattr(sample, "MOST_PIXELS", 5 * 8 * 16 * 16)
    run_training(tmp_path / "few", "--steps", "1", "--sample-number", "7", "--batch", "2")
    assert sizes == [2, 2, 1]  # five in all, as many at a time as training takes
    with Image.open(tmp_path / "few" / "step-0000001.gif") as gif:
        assert gif.size == ((5 * 18 + 2) * 3, 20 * 3)


def test_devices_that_are_not_there_are_refused(tmp_path, capsys):
    run_training(tmp_path / "run", "--steps", "1", "--device", "cpu")
    capsys.readouterr()
    for device in ("cuda", "mps"):
        if choose_device().type != device:
            for main in (train.main, sample.main):
                words = ["--device", device, "--out", tmp_path / "other"]
                assert f"--device {device}: this torch" in fails_with_one_line(capsys, main, *words)


def test_a_folder_that_has_grown_is_refused_with_what_to_do(tmp_path, capsys):
    animation(tmp_path / "clips" / "a.gif", 9)
    run_training(tmp_path / "run", "--steps", "1", "--data", str(tmp_path / "clips"))
    animation(tmp_path / "clips" / "b.gif", 9)
    capsys.readouterr()
    error = fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", "--steps", "2")
    assert f"--init {tmp_path / 'run'} and another --out" in error


def test_latents_are_trained_on_whole_where_no_size_is_given(tmp_path, capsys):
    (tmp_path / "clips").mkdir()
    torch.save(torch.randn(4, 9, 8, 16), tmp_path / "clips" / "a.pt")
    small = [word for word in TINY if word not in ("--size", "16")]
    words = [*small, "--data", str(tmp_path / "clips"), "--patch", "4", "--steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        train.main([*words, "--out", str(tmp_path / "run")])
    assert stopped.value.code == 0 and load_weights(tmp_path / "run" / "weights.pt").size == (8, 16)
    capsys.readouterr()
    error = fails_with_one_line(capsys, train.main, *words, "--patch", "3", "--out", tmp_path / "other")
    assert "--size (8, 16) must divide by [3, 3]" in error
