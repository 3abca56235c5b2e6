"""A run on disk: resumed, whole or the one before, started from another, and never trusted."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
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
    fails_with_one_line,
    run_training,
    save_hostile,
)
from PIL import Image

import cli
import sample
import train
from checkpoint import find_weights, keep_as, load_checkpoint, load_weights, make_pyramid, start_metrics
from data import DataError
from experiments import metrics

# ---- Resuming


BY_STAGE = "--pyramid space-time --shift 2 --batch 8 4 2 --size 16 32 --frames 13 --patch 4".split()


@pytest.mark.parametrize("options", [["--mode", "flow"], ["--mode", "ddim", "--accumulate", "2"], BY_STAGE])
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(options, tmp_path, monkeypatch):
    whole = run_training(tmp_path / "whole", "--steps", "7", *options)
    asked = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:

        def stop_at_step_3(request):
            asked.append(0)
            request.signal = signal.SIGTERM if len(asked) == 3 else 0
            return request.signal

        patch.setattr(cli.StopRequest, "agreed", stop_at_step_3)
        train.main([*TINY, "--out", str(tmp_path / "halves"), "--steps", "7", *options])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "halves" / "checkpoint.pt", weights_only=True)["step"] == 3
    with pytest.raises(SystemExit) as finished:
        train.main(["--resume", "--out", str(tmp_path / "halves"), "--workers", "1"])
    assert finished.value.code == 0
    halves = torch.load(tmp_path / "halves" / "checkpoint.pt", weights_only=True)
    assert_same_weights(whole, halves)
    for a, b in zip(whole["optimizers"], halves["optimizers"], strict=True):
        for index, values in a["state"].items():
            assert all(torch.equal(values[name], b["state"][index][name]) for name in values)
    whole_rows, halves_rows = (
        {row["step"]: row["loss_by_stage"] for row in map(json.loads, (tmp_path / run / "metrics.jsonl").open())}
        for run in ("whole", "halves")
    )
    assert list(whole_rows) == [2, 4, 6, 7] and list(halves_rows) == [2, 3, 4, 6, 7]
    for step in (2, 6, 7):  # the row at 4 covers the steps since the stop at 3
        assert whole_rows[step] == halves_rows[step] and len(whole_rows[step]) == 3


def test_rows_after_the_checkpoint_and_a_half_written_one_are_dropped_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    start_metrics(path, 4)
    assert path.read_text() == '{"step": 2}\n{"step": 4}\n'


def test_resuming_a_run_older_than_a_flag_takes_it_at_its_default_alone(tmp_path, capsys):
    run_training(tmp_path / "run", "--steps", "1")
    content = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name in ("stage_odds", "pyramid", "shift", "ends"):
        del content["args"][name]
    del content["pyramid"], content["shift"], content["ends"], content["config"]["factor"]
    torch.save(content, tmp_path / "run" / "checkpoint.pt")
    capsys.readouterr()
    options = {"--stage-odds 4 2 1": "[4, 2, 1]", "--shift 3": "3.0", "--pyramid space": "space", "--batch 4 4 2": "("}
    options["--ends 0.5 0.25 0"] = "[0.5, 0.25, 0.0]"
    for words, now in options.items():
        error = fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", *words.split())
        assert f"--resume cannot change it to {now}" in error
    content = run_training(tmp_path / "run", "--resume", "--steps", "2", "--pyramid", "time", "--shift", "1")
    assert (content["step"], content["pyramid"], content["shift"]) == (2, "time", 1.0)


def test_a_run_with_a_shift_of_each_stage_is_not_resumed_and_one_stage_is_with_that_of_all_time(tmp_path, capsys):
    def as_older(run, time_shift):
        content = torch.load(run / "checkpoint.pt", weights_only=True)
        content["args"].pop("shift", None), content.pop("shift", None)
        content["args"]["time_shift"] = time_shift
        torch.save(content, run / "checkpoint.pt")

    three, one = tmp_path / "three", tmp_path / "one"
    run_training(three, "--steps", "1")
    run_training(one, "--steps", "1", "--stages", "1")
    as_older(three, 3.0), as_older(one, 3.0)
    capsys.readouterr()
    for words in ([], ["--shift", "3"]):
        error = fails_with_one_line(capsys, train.main, "--resume", "--out", three, "--steps", 2, *words)
        assert f"{three} was trained with --time-shift" in error
    assert "--shift 3.0" in fails_with_one_line(capsys, train.main, "--resume", "--out", one, "--shift", 1)
    content = run_training(one, "--resume", "--steps", "2")
    assert content["args"]["shift"] == content["shift"] == load_weights(one / "weights.pt").shift == 3.0
    run_training(one, "--resume", "--steps", "3")
    as_older(three, 1.0)
    assert run_training(three, "--resume", "--steps", "2")["shift"] == 1.0


def test_train_does_not_overwrite_a_run_nor_resume_it_as_another(tmp_path, capsys, monkeypatch):
    run_training(tmp_path / "run", "--steps", "1")
    capsys.readouterr()
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert "--resume" in fails_with_one_line(capsys, train.main, *TINY, "--out", tmp_path / "run")
    error = fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", "--width", "64")
    assert "--width 32" in error and "64" in error
    with monkeypatch.context() as patch:
        patch.setattr(cli, "start_processes", lambda device: (0, 2, torch.device("cpu")))
        assert "1 processes" in fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(before[: len(before) // 2])
    assert "not a whole checkpoint" in fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run")
    (tmp_path / "run" / "checkpoint-previous.pt").write_bytes(before)
    assert "previous.pt is the one before it" in fails_with_one_line(
        capsys, train.main, "--resume", "--out", tmp_path / "run"
    )
    torch.save({"weights": 1}, tmp_path / "run" / "checkpoint.pt")
    assert "format" in fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run")


# ---- Whole or the one before


def test_the_newest_two_checkpoints_and_the_best_are_kept(tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 1.0, 2.0, 3.0, 3.0, 9.0])

    def loss(model, *_):
        return 0 * sum(parameter.sum() for parameter in model.parameters()) + next(losses)

    monkeypatch.setattr(train, "training_loss", loss)
    run, names = tmp_path / "run", ("checkpoint.pt", "checkpoint-previous.pt", "checkpoint-best.pt")
    run_training(run, "--stages", "1", "--steps", "7", "--save-interval", "2")
    contents = [torch.load(run / name, weights_only=True) for name in names]
    assert [content["step"] for content in contents] == [7, 6, 4] and contents[0]["best"] == 1.5
    assert {path.name for path in run.glob("checkpoint*")} == set(names)


def test_a_second_name_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("one")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    keep_as(tmp_path / "a", "b")
    assert (tmp_path / "b").read_text() == "one" and len(list(tmp_path.iterdir())) == 2


def full_disk(room: int) -> None:
    """Lets no file of this process grow past `room` bytes; what a full disk does to a write, without a disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    run = tmp_path / "run"
    run_training(run, "--steps", "2")
    before = (run / "checkpoint.pt").read_bytes()
    words = ["--resume", "--out", run, "--steps", "4"]
    process = command(ROOT / "train.py", *words, preexec_fn=lambda: full_disk(len(before) // 2))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert f"{run / 'checkpoint.pt'} could not be written" in err and "continue with --resume" in err
    assert (run / "checkpoint.pt").read_bytes() == before and not list(run.glob("*.tmp"))
    assert run_training(run, "--resume", "--steps", "4")["step"] == 4


@pytest.mark.trial
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    """The same on a disk that is full, where one may be mounted."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path / "disk"], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        run = tmp_path / "disk" / "run"
        process = command(ROOT / "train.py", *TINY, "--steps", 40, "--save-interval", 2, "--out", run)
        while process.poll() is None:  # something else fills the disk
            if (run / "checkpoint.pt").exists():
                with contextlib.suppress(OSError), open(tmp_path / "disk" / "other", "ab") as file:
                    file.write(bytes(200_000))
            time.sleep(0.05)
        err = process.communicate()[1]
        assert process.returncode == 2 and "could not be written" in err and "Traceback" not in err, err
        assert "No space left" in err or "unexpected pos" in err, err
        (tmp_path / "disk" / "other").unlink()
        assert 0 < load_checkpoint(run / "checkpoint.pt")["step"] < 40
        assert run_training(run, "--resume")["step"] == 40
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def start_in_child(words: list[str], log: Path) -> None:
    torch.set_num_threads(1)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.main(words)


@pytest.mark.trial
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_killed_at_any_moment_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """At least 200 kills of short runs that save after every step; each finished run has the weights of one that no
    one killed, and after each kill the checkpoint is whole and no older than before."""
    words = ["--steps", "60", "--save-interval", "1", "--sample-interval", "25"]
    whole = run_training(tmp_path / "whole", *words)
    processes, random = mp.get_context("forkserver"), np.random.default_rng(0)
    processes.set_forkserver_preload(["test_checkpoint"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # where the server finds them
    for name in ("first", "second"):  # the first one waits for the server too
        start, options = time.perf_counter(), [*TINY, *words, "--out", str(tmp_path / name)]
        undisturbed = processes.Process(target=start_in_child, args=(options, tmp_path / "log"))
        undisturbed.start()
        undisturbed.join()
    usual, kills, writing, finished = time.perf_counter() - start, 0, 0, 0
    while kills < 200:
        run, step = tmp_path / f"run-{finished}", 0
        while True:
            resume = ["--resume"] if (run / "checkpoint.pt").exists() else []
            options = [*(resume or [*TINY, *words]), "--out", str(run)]
            process = processes.Process(target=start_in_child, args=(options, tmp_path / "log"))
            process.start()
            process.join(random.uniform(0, 0.8 * usual))
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL), (process.exitcode, (tmp_path / "log").read_text())
            if process.exitcode == 0:
                break
            kills += 1
            writing += bool(list(run.glob("*.tmp")))
            if (run / "checkpoint.pt").exists():
                now = load_checkpoint(run / "checkpoint.pt")["step"]
                assert now >= step
                step = now
        assert_same_weights(torch.load(run / "checkpoint.pt", weights_only=True), whole)
        for gif in run.glob("step-*.gif"):  # one is missing if the kill came after the save and before the preview
            assert gif.read_bytes() == (tmp_path / "whole" / gif.name).read_bytes()
        kept = {path.name: load_checkpoint(path)["step"] for path in run.glob("*-*.pt")}
        assert kept["checkpoint-previous.pt"] < 60 and 0 < kept.get("checkpoint-best.pt", 60) <= 60
        finished += 1
    print(f"{kills} kills, {writing} of them during the writing of a checkpoint, {finished} runs finished")
    assert writing >= 20 and finished >= 3


# ---- A run that starts from another


def test_train_from_an_image_model(tmp_path, capsys):
    image, video = tmp_path / "image", tmp_path / "video"
    run_training(image, "--steps", "2", "--frames", "1", "--stages", "1")
    options = ["--init", str(image), "--lr", "0", "--weight-decay", "0"]
    checkpoint = run_training(video, "--steps", "2", *options)
    ema = load_weights(image / "weights.pt").model.state_dict()
    assert all(torch.equal(checkpoint["model"][name], ema[name]) for name in ema if name != "embed_stage.weight")
    (image / "weights.pt").unlink()  # is not needed any more
    run_training(video, "--steps", "4", "--resume")
    capsys.readouterr()
    for words, message in ((options, "does not exist"), (["--init", str(video), "--mode", "ddim"], "--mode flow")):
        assert message in fails_with_one_line(capsys, train.main, *TINY, *words, "--out", tmp_path / "x")
    animation(tmp_path / "clips" / "a.gif", 8)
    words = [*TINY, "--init", str(video), "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "x")]
    assert "was trained with labels, unlike this" in fails_with_one_line(capsys, train.main, *words)
    options = ["--init", str(video), "--depth", "2"]
    assert "depth 2" in fails_with_one_line(capsys, train.main, *TINY, *options, "--out", tmp_path / "x")
    assert not (tmp_path / "x" / "metrics.jsonl").exists()


def test_labels_of_the_model_to_start_from_go_by_name(tmp_path):
    for name in ("cat/a.gif", "dog/a.gif"):
        animation(tmp_path / "old" / name, 8)
    for name in ("ant/a.gif", "dog/a.gif"):
        animation(tmp_path / "new" / name, 8)
    words = ["--steps", "1", "--lr", "0", "--weight-decay", "0", "--labels", "folder", "--data"]
    run_training(tmp_path / "a", *words, str(tmp_path / "old"))
    old = load_weights(tmp_path / "a" / "weights.pt").model.embed_label.weight  # cat, dog, none
    new = run_training(tmp_path / "b", *words, str(tmp_path / "new"), "--init", str(tmp_path / "a"))
    assert torch.equal(new["model"]["embed_label.weight"], old[[2, 1, 2]])  # ant, dog, none


# ---- Weights to sample from


@both_modes
def test_shipped_weights_sample_in_a_fresh_clone(mode, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert find_weights(mode, 3) == ROOT / "weights" / f"{mode}-3.pt"
    assert (ROOT / "weights" / f"{mode}-3.pt").stat().st_size < 8e6
    sample.main(["--mode", mode, "--stages", "3", "--number", "2", "--steps", "3", "--label", "7", "--guidance", "2"])
    assert "steps 1-1-1 (noisiest stage first) with euler: 3.5 full-rate" in capsys.readouterr().out  # two calls a step
    with Image.open(tmp_path / "samples" / f"{mode}-3-000.gif") as gif:
        assert gif.n_frames == 16
    sample.main(["--mode", mode, "--number", "1", "--steps", "3"])
    assert (tmp_path / "samples" / f"{mode}-3-001.png").exists()


@both_modes
@pytest.mark.parametrize("stages", [1, 3])
def test_shipped_weights_are_of_the_paper_s_pyramid_without_a_shift(mode, stages):
    weights = load_weights(find_weights(mode, stages))
    p = make_pyramid(weights)
    assert (weights.pyramid, weights.shift, weights.stages) == ("time", 1.0, stages)
    assert (p.mode, p.stages, p.factor, p.shift) == (mode, stages, (2, 1, 1), 1.0)
    assert p.prediction == {"flow": None, "ddim": "velocity"}[mode] and weights.model.config.factor == (2, 1, 1)


def test_the_newest_matching_run_is_sampled(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for index, (name, mode) in enumerate([("old", "flow"), ("new", "flow"), ("other", "ddim")]):
        run_training(Path("runs") / name, "--steps", "1", "--mode", mode)
        os.utime(Path("runs") / name / "weights.pt", (index, index))
    assert find_weights("flow", 3) == Path("runs/new/weights.pt")
    assert find_weights("ddim", 3) == Path("runs/other/weights.pt")
    run_training(Path("runs") / "newest", "--steps", "1", "--pyramid", "space", "--patch", "4")
    assert find_weights("flow", 3) == Path("runs/new/weights.pt")
    assert find_weights("flow", 3, "space") == Path("runs/newest/weights.pt")
    Path("runs/new/weights.pt").write_bytes(b"torn")
    assert find_weights("flow", 3) == Path("runs/old/weights.pt")
    assert "passed over: runs/new/weights.pt" in capsys.readouterr().err


# ---- Files from elsewhere


def test_code_in_a_file_of_tensors_is_never_run(tmp_path, capsys):
    """Weights, checkpoints and latents. That it would run without weights_only shows that the test can fail."""
    (tmp_path / "run").mkdir()
    (tmp_path / "data").mkdir()
    mark = tmp_path / "run-by-hostile-code"
    save_hostile(tmp_path / "hostile.pt")
    for path in (tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "weights.pt", tmp_path / "data" / "clip.pt"):
        path.write_bytes((tmp_path / "hostile.pt").read_bytes())
    for main, *words in (
        (sample.main, "--checkpoint", tmp_path / "run"),
        (sample.main, "--checkpoint", tmp_path / "hostile.pt"),
        (metrics.main, "quality", "--checkpoint", tmp_path / "run"),
        (train.main, "--resume", "--out", tmp_path / "run"),
        (train.main, "--init", tmp_path / "hostile.pt", "--out", tmp_path / "other"),
        (train.main, "--data", tmp_path / "data", "--out", tmp_path / "other"),
    ):
        fails_with_one_line(capsys, main, *words)
        assert not mark.exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert mark.exists()


def test_names_in_data_and_weights_are_never_paths(tmp_path, monkeypatch):
    """A mode or a class called ../x: nothing is written but where it was asked for."""
    good = torch.load(ROOT / "weights" / "flow-3.pt", weights_only=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    torch.save(good | {"classes": ["../x", "/y", *good["classes"][2:]]}, "names.pt")
    torch.save(good | {"mode": "../flow"}, "mode.pt")
    torch.save(good | {"pyramid": "../time"}, "pyramid.pt")
    sample.main(["--checkpoint", "names.pt", "--label", "../x", "--number", "1", "--steps", "3"])
    for name in ("mode.pt", "pyramid.pt"):
        with pytest.raises(SystemExit):
            sample.main(["--checkpoint", name, "--number", "1", "--steps", "3"])
    assert sorted(path.name for path in Path("samples").iterdir()) == ["names-000.gif", "names-000.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.mark.parametrize("error", [RuntimeError("a loader's process was killed"), DataError("gone"), MemoryError()])
def test_a_step_that_fails_does_not_lose_those_before_it(tmp_path, capsys, monkeypatch, error):
    whole = run_training(tmp_path / "whole", "--steps", "6")
    optimize = train.optimize

    def fail(state, *rest):
        if state.step == 4:
            raise error
        optimize(state, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "optimize", fail)
        with pytest.raises((SystemExit, RuntimeError)):
            train.main([*TINY, "--out", str(tmp_path / "run"), "--steps", "6"])
    assert "step 4: saved, as the next step failed" in capsys.readouterr().err
    assert_same_weights(run_training(tmp_path / "run", "--resume"), whole)


@both_modes
def test_stages_that_end_where_asked_are_trained_saved_resumed_and_sampled(mode, tmp_path, capsys):
    options = ["--mode", mode, "--ends", "0.5", "0.25", "0"]
    run_training(tmp_path / "run", *options, "--steps", "2")
    content = run_training(tmp_path / "run", "--resume", "--steps", "3")
    assert content["ends"] == content["args"]["ends"] == [0.5, 0.25, 0.0]
    weights = load_weights(tmp_path / "run" / "weights.pt")
    assert make_pyramid(weights).ends == (0, 0.25, 0.5)  # by index: the noisiest stage has the longer half
    asked = []
    make_pyramid(weights).sample(lambda x, t, k: asked.append((k, t[0].item())) or 0 * x, (1, 1, 8, 16, 16), 4)
    assert [k for k, _ in asked] == [2, 2, 1, 0] and asked[2][1] < 0.6
    capsys.readouterr()
    assert fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", "--ends", 0.6, 0.25, 0)
    content = torch.load(tmp_path / "run" / "weights.pt", weights_only=True)
    for wrong in ([0.5, 0.25], [0.25, 0.5, 0.0], "half", [0.5, 0.25, 0.1]):
        torch.save(content | {"ends": wrong}, tmp_path / "wrong.pt")
        with pytest.raises(ValueError, match="is damaged: .*ends"):
            load_weights(tmp_path / "wrong.pt")
