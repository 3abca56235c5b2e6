"""A run on disk: resumed, whole or the one before, started from another, and never trusted."""

import itertools
import math
import os
import resource
import shutil
import signal
from pathlib import Path
from statistics import mean
from unittest.mock import Mock

import pytest
import torch
from conftest import TINY, animation, assert_same_weights, both_modes, fails_with_one_line, rows_of, run_training
from PIL import Image

import checkpoint
import cli
import sample
import train
from checkpoint import SHIPPED, find_weights, load_checkpoint, load_weights, make_pyramid, start_metrics, write_whole
from data import FolderClips
from experiments import metrics
from tpdiff import Pyramid


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of six steps that nothing disturbed."""
    run_training(run := tmp_path_factory.mktemp("whole"), "--steps", "6", "--save-interval", "3")
    return run


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(whole, tmp_path / "run")


def shipped(**changes) -> dict:
    """What the file of flow-3 holds, changed."""
    return torch.load(SHIPPED / "flow-3.pt", weights_only=True) | changes


BY_STAGE = "--pyramid space-time --shift 2 --ends 0.5 0.25 0 --batch 8 4 2 --size 16 32 --frames 13 --patch 4"


@pytest.mark.parametrize("options", ["--mode flow", "--mode ddim --accumulate 2", BY_STAGE])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(options, tmp_path, monkeypatch):
    words, halves = ["--steps", "7", *options.split()], tmp_path / "halves"
    whole = run_training(tmp_path / "whole", *words)
    signals = iter([0, 0, signal.SIGTERM])

    def stop_at_step_3(request):
        request.signal = next(signals)
        return request.signal

    with monkeypatch.context() as patch:
        patch.setattr(cli.StopRequest, "agreed", stop_at_step_3)
        assert run_training(halves, *words, code=128 + signal.SIGTERM)["step"] == 3
    with pytest.raises(SystemExit, match="0"):  # with the run's own options
        train.main(["--resume", "--out", str(halves), "--workers", "1"])
    resumed = load_checkpoint(halves / "checkpoint.pt")
    assert_same_weights(whole, resumed)
    states = ([optimizer["state"] for optimizer in content["optimizers"]] for content in (whole, resumed))
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert math.isfinite(best := whole["best"]) and resumed["best"] == pytest.approx(best)  # a stop is no candidate


def make_older(run: Path, **args) -> None:
    """Makes a run's checkpoint one from before some flags; a later version took --time-shift."""
    content = load_checkpoint(run / "checkpoint.pt")
    for name in ("stage_odds", "pyramid", "shift", "ends"):
        content["args"].pop(name, None)
        content.pop(name, None)
    content["config"].pop("factor", None)
    torch.save(content | {"args": content["args"] | args}, run / "checkpoint.pt")


def test_resuming_a_run_older_than_a_flag_takes_it_at_its_default_alone(run, capsys):
    make_older(run)
    for words in ("--stage-odds 4 2 1", "--pyramid space", "--batch 4 4 2", "--ends 0.5 0.25 0.0", "--data clips"):
        error = fails_with_one_line(capsys, train.main, "--resume", "--out", run, *words.split())
        flag, _, value = words.partition(" ")
        assert f"was trained with {flag} " in error and f"--resume cannot change it to {value}" in error
    make_older(run, time_shift=3.0)  # of each stage: is no more
    assert "was trained with --time-shift" in fails_with_one_line(capsys, train.main, "--resume", "--out", run)
    make_older(run, time_shift=3.0, stages=1)  # of all time: is --shift now
    assert train.parse_args(["--resume", "--out", str(run)])[0].shift == 3.0
    make_older(run, time_shift=1.0, stages=3)
    content = run_training(run, "--resume", "--steps", "7", "--pyramid", "time", "--shift", "1")
    assert (content["step"], content["pyramid"], content["shift"]) == (7, "time", 1.0)


@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint-previous.pt", "weights.pt", "weights-400.pt"])
def test_train_does_not_overwrite_what_is_left_of_a_run(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"precious")
    said = fails_with_one_line(capsys, train.main, *TINY, "--steps", 1, "--out", tmp_path)
    advice = "continue with --resume" if name == "checkpoint.pt" else "start a new run with another"
    assert f"{tmp_path / name} is there already: {advice}" in said
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_resume_says_how_far_a_run_is_and_refuses_other_processes_and_a_damaged_checkpoint(run, capsys, monkeypatch):
    train.parse_args(["--resume", "--out", str(run)])
    out = capsys.readouterr().out
    assert f"resuming {run}, which has 6 of 6 steps; a larger --steps trains it on" in out
    content = load_checkpoint(run / "checkpoint.pt")
    assert "numbers may differ" not in out and content["args"]["precision"] in ("bf16", "fp32")  # not "auto": kept
    torch.save(content | {"torch": "2.9.0"}, run / "checkpoint.pt")
    args, _ = train.parse_args(["--resume", "--out", str(run), "--precision", "auto"])
    assert args.precision == content["args"]["precision"]  # what "auto" chose at first
    assert f"; torch 2.9.0 saved it, {torch.__version__} goes on, so numbers may differ" in capsys.readouterr().out
    resume = capsys, train.main, "--resume", "--out", run
    with monkeypatch.context() as patch:
        patch.setattr(cli, "start_processes", lambda device: (0, 2, torch.device("cpu")))
        assert "must keep processes x --accumulate = 1, not 2 x 1" in fails_with_one_line(*resume)
    (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:10_000])
    error = fails_with_one_line(*resume)
    assert "not a whole checkpoint" in error and "previous.pt is the one before it" in error
    torch.save({"weights": 1}, run / "checkpoint.pt")
    assert "(format 4)" in fails_with_one_line(*resume)


def test_the_clips_of_a_run_may_have_moved_and_not_changed(tmp_path, capsys):
    run, clips = tmp_path / "run", tmp_path / "moved"
    animation(tmp_path / "clips" / "a.gif", 9)
    run_training(run, "--steps", "1", "--data", str(tmp_path / "clips"))
    (tmp_path / "clips").rename(clips)
    content = run_training(run, "--resume", "--steps", "2", "--data", str(clips))
    assert content["step"] == 2 and content["args"]["data"] == str(clips)
    capsys.readouterr()
    resume = capsys, train.main, "--resume", "--out", run, "--steps", "3"
    animation(clips / "b.gif", 9)
    assert f"--init {run} and another --out" in fails_with_one_line(*resume)
    (clips / "b.gif").unlink()
    animation(clips / "a.gif", 9, (64, 64))  # another clip of that name
    assert f"--init {run} and another --out" in fails_with_one_line(*resume)
    digest, older = FolderClips(clips, 8, 16).digests
    torch.save(load_checkpoint(run / "checkpoint.pt") | {"digest": older}, run / "checkpoint.pt")
    assert run_training(run, "--resume", "--steps", "3")["digest"] == digest


@pytest.mark.parametrize("links", [True, False])
def test_the_newest_two_checkpoints_and_the_best_are_kept(links, tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 1.0, 2.0, 3.0, 3.0, 9.0])

    def loss(model, *_):
        return 0 * sum(parameter.sum() for parameter in model.parameters()) + next(losses)

    monkeypatch.setattr(train, "training_loss", loss)
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=OSError("no links here")))
    run_training(tmp_path, "--stages", "1", "--steps", "7", "--save-interval", "2")
    names = ("checkpoint.pt", "checkpoint-previous.pt", "checkpoint-best.pt")
    contents = [load_checkpoint(tmp_path / name) for name in names]
    assert [content["step"] for content in contents] == [7, 6, 4] and contents[0]["best"] == 1.5
    assert {path.name for path in tmp_path.glob("checkpoint*")} == set(names)


def test_a_best_checkpoint_that_could_not_be_written_is_not_counted_as_one(tmp_path, monkeypatch):
    words, real, failures = "--stages 1 --save-interval 2".split(), checkpoint.write_whole, [OSError("full"), None]

    def write(content, path, also=None):
        if also and (error := failures.pop(0)):
            raise error
        real(content, path, also)

    monkeypatch.setattr(checkpoint, "write_whole", write)
    run_training(tmp_path, *words, "--steps", "2", code=2)  # then saved, as something failed
    assert load_checkpoint(tmp_path / "checkpoint.pt")["best"] == math.inf
    assert not (tmp_path / "checkpoint-best.pt").exists()
    best = run_training(tmp_path, *words, "--steps", "4", "--resume")["best"]
    assert load_checkpoint(tmp_path / "checkpoint-best.pt")["best"] == best < math.inf


@pytest.mark.parametrize("rename", range(4, 8))  # those of the save after step 4, which is the best
def test_a_run_that_is_killed_while_saving_goes_on_as_if_it_had_not(rename, tmp_path, monkeypatch):
    calls, real = itertools.count(), os.replace
    words = "--stages 1 --steps 6 --save-interval 2 --sample-number 0 --held-out 0.1".split()
    losses = [9.0, 1.0, 5.0]  # after steps 2, 4 and 6, each of which has a row
    monkeypatch.setattr(train, "held_out_loss", lambda *inputs: [losses[len(rows_of(inputs[3].out))]])
    undisturbed = run_training(tmp_path / "undisturbed", *words)

    def replace(*paths):
        if next(calls) == rename:
            raise KeyboardInterrupt
        return real(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", replace)
        run_training(tmp_path / "killed", *words)
    assert_same_weights(run_training(tmp_path / "killed", *words, "--resume"), undisturbed)
    assert load_checkpoint(tmp_path / "killed" / "checkpoint-best.pt")["step"] == 4


def test_what_a_kill_left_is_not_written_into(tmp_path):
    (tmp_path / "a.pt.tmp").write_bytes(b"the best")
    os.link(tmp_path / "a.pt.tmp", tmp_path / "best.pt")  # as if killed before the new file got its name
    write_whole({}, tmp_path / "a.pt")
    assert (tmp_path / "best.pt").read_bytes() == b"the best"


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(run, capsys):
    before, (soft, hard) = (run / "checkpoint.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # files cannot grow, as on a full disk
    try:
        with pytest.raises(SystemExit, match="2"):
            train.main(["--resume", "--out", str(run), "--steps", "8"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert f"{run / 'checkpoint.pt'} could not be written" in error and "continue with --resume" in error
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    assert run_training(run, "--resume", "--steps", "8")["step"] == 8


@pytest.mark.parametrize(
    "place, name, number, step",  # the call that fails, and the steps that are done by then
    [
        (train, "optimize", 3, 3),
        (train, "optimize", 4, 4),
        (train, "optimize", 5, 5),
        (train, "update_ema", 4, 3),  # half-way through a step, which is no step's end
        (cli.StopRequest, "agreed", 4, 5),
    ],
)
def test_a_run_that_fails_in_a_step_is_saved_and_goes_on_as_if_it_had_not(
    place, name, number, step, whole, tmp_path, capsys, monkeypatch
):
    real, calls = getattr(place, name), itertools.count()

    def call(*inputs):
        if next(calls) == number:
            raise MemoryError
        return real(*inputs)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, call)
        run_training(tmp_path, "--steps", "6", "--save-interval", "3", code=2)
    said = f"\nstep {step}: saved, as then something failed" in capsys.readouterr().err
    kept = {path.name: load_checkpoint(path) for path in tmp_path.glob("checkpoint*.pt")}
    assert kept["checkpoint.pt"]["step"] == step
    assert said == (step > 3) == ("checkpoint-previous.pt" in kept)  # none is saved twice
    if step == 5:  # after the last row
        assert kept["checkpoint.pt"]["seconds"] > rows_of(tmp_path)[-1]["seconds"]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": {}')  # a row that was being written
    assert_same_weights(run_training(tmp_path, "--resume"), load_checkpoint(whole / "checkpoint.pt"))
    one, other = ([(row["step"], row["loss_by_stage"]) for row in rows_of(run)] for run in (tmp_path, whole))
    assert one == other and [step for step, _ in one] == [2, 3, 4, 6]


@both_modes
def test_a_video_model_starts_from_an_image_model_whose_labels_go_by_name(mode, tmp_path):
    image, video = tmp_path / "image", tmp_path / "video"
    for name in ("old/cat", "old/dog", "new/ant", "new/dog"):
        animation(tmp_path / name / "a.gif", 8)
    words = ["--mode", mode, "--steps", "1", "--lr", "0", "--weight-decay", "0", "--labels", "folder", "--data"]
    content = run_training(image, *words, str(tmp_path / "old"), "--frames", "1", "--stages", "1")
    assert not content["config"]["temporal"] and (image / "step-0000001.gif").exists()
    content = torch.load(image / "weights.pt", weights_only=True)
    content["ema"]["unembed.weight"] += 1  # as after training: at first it is zero
    torch.save(content, image / "weights.pt")
    old = load_weights(image / "weights.pt").model.state_dict()
    new = run_training(video, *words, str(tmp_path / "new"), "--init", str(image))["model"]
    assert torch.equal(new["embed_patch.weight"], old["embed_patch.weight"])
    part = mean(stage.t_start - stage.t_end for stage in Pyramid("flow")) if mode == "flow" else 1  # a stage asks for
    assert torch.equal(new["unembed.weight"], old["unembed.weight"] * part)
    rows = [2, 1, 2]  # of ant, dog, none in cat, dog, none
    assert torch.equal(new["embed_label.weight"], old["embed_label.weight"][rows])
    (image / "weights.pt").unlink()  # is not needed any more
    run_training(video, "--resume", "--steps", "2")


@pytest.mark.parametrize("mode, prediction", [("flow", None), ("ddim", "velocity")])
def test_shipped_weights_are_the_paper_s_and_sample_in_a_fresh_clone(mode, prediction, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for stages in (1, 3):
        path = find_weights(mode, stages)
        assert path == SHIPPED / f"{mode}-{stages}.pt" and path.stat().st_size < 8e6
        p = make_pyramid(load_weights(path))
        assert (p.mode, p.stages, p.factor, p.shift, p.prediction) == (mode, stages, (2, 1, 1), 1.0, prediction)
    sample.main(["--mode", mode, "--stages", "3", "--number", "2", "--steps", "3", "--label", "7", "--guidance", "2"])
    out = capsys.readouterr().out
    assert "steps 1-1-1 (noisiest stage first) with euler: " in out and " as much as 3.5 network" in out  # two a step
    with Image.open(tmp_path / "samples" / f"{mode}-3-000.gif") as gif:
        assert gif.n_frames == 16
    sample.main(["--mode", mode, "--number", "1", "--steps", "3"])
    assert (tmp_path / "samples" / f"{mode}-3-001.png").exists()


def test_the_newest_matching_run_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = {name: Path("runs") / name / "weights.pt" for name in ("old", "new", "ddim", "space")}
    for age, (name, changes) in enumerate(zip(paths, ({}, {}, {"mode": "ddim"}, {"pyramid": "space"}), strict=True)):
        paths[name].parent.mkdir(parents=True)
        torch.save(shipped(**changes), paths[name])
        os.utime(paths[name], (age, age))
    assert find_weights("flow", 3) == paths["new"] and find_weights("ddim", 3) == paths["ddim"]
    assert find_weights("flow", 3, "space") == paths["space"]
    paths["new"].write_bytes(b"torn")
    assert find_weights("flow", 3) == paths["old"]
    assert "passed over: runs/new/weights.pt" in capsys.readouterr().err


class Hostile:
    """A pickle that makes the file `mark` when it is read by what runs the code in it."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_code_in_a_file_of_tensors_is_never_run(tmp_path, capsys):
    """Weights, checkpoints and latents. That it would run without weights_only shows that the test can fail."""
    hostile, mark = tmp_path / "hostile.pt", tmp_path / "run-by-hostile-code"
    torch.save(shipped(ema=Hostile(mark)), hostile)
    for path in ("run/checkpoint.pt", "run/weights.pt", "data/clip.pt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(hostile, tmp_path / path)
    for main, *words in (
        (sample.main, "--checkpoint", tmp_path / "run"),
        (metrics.main, "quality", "--checkpoint", tmp_path / "run"),
        (train.main, "--resume", "--out", tmp_path / "run"),
        (train.main, "--init", hostile, "--out", tmp_path / "other"),
        (train.main, "--data", tmp_path / "data", "--out", tmp_path / "other"),
    ):
        fails_with_one_line(capsys, main, *words)
        assert not mark.exists()
    torch.load(hostile, weights_only=False)
    assert mark.exists()


def test_labels_in_weights_are_never_paths(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save(shipped(classes=["../x", *"123456789"]), "names.pt")
    sample.main(["--checkpoint", "names.pt", "--label", "../x", "--number", "1", "--steps", "3"])
    assert sorted(path.name for path in Path("samples").iterdir()) == ["names-000.gif", "names-000.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_full_disk_costs_no_rows_of_losses_when_a_run_goes_on(tmp_path, monkeypatch):
    def fills(path: Path, text: str) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    rows = "".join(f'{{"step": {step}}}\n' for step in range(1, 9))
    (tmp_path / "metrics.jsonl").write_text(rows)
    monkeypatch.setattr(Path, "write_text", fills)
    with pytest.raises(OSError, match="No space left"):
        start_metrics(tmp_path / "metrics.jsonl", 5)
    assert (tmp_path / "metrics.jsonl").read_text() == rows
