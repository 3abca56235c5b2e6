"""The sample command: guidance, what a clip costs, what is written, and what is refused."""

import io
import math
import sys
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY, animation, fails_with_one_line, run_training, small_model
from PIL import Image

import sample
import train
from checkpoint import FORMAT, SHIPPED, find_weights, load_weights, make_pyramid
from tpdiff import Pyramid


def run_sample(*words) -> None:
    sample.main([str(word) for word in words])


def test_guidance_is_the_line_through_both_predictions():
    model, x, t, y = small_model(classes=3), torch.randn(2, 1, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    conditional, unconditional = model(x, t, 1, y), model(x, t, 1)
    torch.testing.assert_close(sample.make_predict(model, y, 1.0, False)(x, t, 1), conditional)
    guided = sample.make_predict(model, y, 3.0, False)(x, t, 1)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_replayed_calls_say_what_the_model_says_at_every_stage_and_shape(guidance):
    model, y = small_model(classes=3).cuda(), torch.tensor([0, 2], device="cuda")
    plain = sample.make_predict(model, y, guidance, False)
    replayed = sample.replayed(plain)
    for k, frames in [(2, 2), (2, 2), (2, 2), (1, 4), (0, 8), (1, 4), (0, 8), (0, 8), (2, 2), (1, 4), (0, 6), (0, 6)]:
        x, t = torch.randn(2, 1, frames, 8, 8, device="cuda"), torch.rand(2, device="cuda")
        torch.testing.assert_close(replayed(x, t, k), plain(x, t, k), rtol=1e-4, atol=1e-5)


def test_a_clip_is_the_same_in_any_batch():
    weights, p = load_weights(SHIPPED / "flow-3.pt"), Pyramid("flow", 3)
    labels = sample.choose_labels(weights.classes, 3)
    together = sample.generate(weights, p, labels, 3, steps=3, precision="fp32")
    for n in (0, 2):
        alone = sample.generate(weights, p, labels[n : n + 1], 1, steps=3, precision="fp32", first=n)
        torch.testing.assert_close(alone, together[n : n + 1], rtol=1e-4, atol=1e-4)


def test_train_on_labels_then_sample_one_by_its_name_with_every_frame(tmp_path, capsys):
    for name in ("cat", "dog"):
        animation(tmp_path / "clips" / name / "a.gif", 8)
    options = "--steps 2 --frames 7 --mode ddim --sample-interval 2 --labels folder --data".split()
    run_training(tmp_path / "run", *options, str(tmp_path / "clips"))
    assert (tmp_path / "run" / "step-0000002.gif").exists()
    assert "2 used, 2 clips of 16 frames in all (2 animations); skipped: none\nlabels: 2\n" in capsys.readouterr().out
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 3, "--mode", "ddim"]
    run_sample(*words, "--list-labels")
    assert capsys.readouterr().out == "cat\ndog\n"
    run_sample(*words, "--label", "cat", "--guidance", 2, "--solver", "ab2", "--steps", 4, 2, 1)
    out = capsys.readouterr().out
    assert f"{2 * (4 * 2 / 7 + 2 * 4 / 7 + 1):.4g} network calls on the full clip (twice as many as without" in out
    assert str(tmp_path / "it.gif") in out and "12.5 frames a second" in out  # as the clips have it
    with Image.open(tmp_path / "it.gif") as gif:
        assert gif.n_frames == 7


def test_labels_are_taken_in_turn_and_an_emoji_stands_for_its_code_point():
    assert sample.choose_labels(("ape", "cat"), 3).tolist() == [0, 1, 0]
    assert sample.choose_labels(("ape", "cat", "dog"), 3, ["dog", "ape"]).tolist() == [2, 0, 2]
    assert sample.choose_labels(("1f3c4", "1f44b"), 3, ["1f44b", "🏄🏽"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="--label 🐳 is unknown"):
        sample.choose_labels(("1f3c4", "1f44b"), 1, ["🐳"])


@pytest.mark.parametrize("encoding, line", [("utf-8", "1f3c4  \N{SURFER}"), ("ascii", r"1f3c4  \U0001f3c4")])
def test_labels_that_are_emojis_are_listed_beside_them_escaped_where_a_terminal_cannot_show_them(
    encoding, line, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    run_sample("--checkpoint", SHIPPED / "emoji.pt", "--list-labels")
    sys.stdout.flush()
    lines = sys.stdout.buffer.getvalue().decode().splitlines()
    assert line in lines and len(lines) == 403


def test_train_on_latents_then_sample_some(tmp_path, capsys):
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents" / "a.npy", np.full((4, 8, 8, 8), 20, np.float32))
    words = "--steps 2 --latent-scale 0.05 --sample-interval 2 --size 8 --data".split()
    run_training(tmp_path / "run", *words, str(tmp_path / "latents"))
    assert np.load(tmp_path / "run" / "step-0000002.npy").shape == (10, 4, 8, 8, 8)
    assert "latents: 1 file found, 1 used, 1 clip of 8 frames in all (" in capsys.readouterr().out
    words = "--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 2, "--steps", 3
    assert "never trained with labels" in fails_with_one_line(capsys, sample.main, *words, "--guidance", 2)
    assert "makes latents" in fails_with_one_line(capsys, sample.main, *words[:2], "--out", tmp_path / "it.gif")
    run_sample(*words)
    assert "it.npy" in capsys.readouterr().out
    expected = sample.generate(load_weights(tmp_path / "run" / "weights.pt"), Pyramid("flow", 3), None, 2, 3) / 0.05
    run_sample(*words[:2], "--out", tmp_path / "IT.NPY", *words[4:])
    assert (tmp_path / "IT.NPY").read_bytes() == (tmp_path / "it.npy").read_bytes()
    assert not (tmp_path / "IT.NPY.npy").exists()
    clips = np.load(tmp_path / "it.npy")
    assert clips.shape == (2, 4, 8, 8, 8) and np.allclose(clips, expected)


def test_train_on_time_and_space_then_sample_by_the_pyramid_s_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--pyramid space-time --shift 2 --ends 0.5 0.25 0 --batch 8 4 2 --size 16 32 --frames 13 --patch 4"
    with pytest.raises(SystemExit, match="0"):
        train.main([*TINY, *words.split(), "--steps", "4", "--label-dropout", "0"])
    assert "runs/flow-3-space-time" in capsys.readouterr().out
    weights = load_weights(path := find_weights("flow", 3, "space-time"))
    assert (weights.frames, weights.size, weights.pyramid, weights.shift) == (13, (16, 32), "space-time", 2)
    p = make_pyramid(weights)
    assert weights.model.config.factor == p.factor == (2, 2, 2)
    assert p.shift == 2 and p.ends == (0, 0.25, 0.5)  # by index: the noisiest stage last
    run_sample(*"--pyramid space-time --number 2 --steps 10 --precision fp32".split())
    out = capsys.readouterr().out
    cost = 8 * 4 / 13 / 16 + 7 / 13 / 4 + 1  # of 13 frames 7 and then 4 are left; a half and a quarter each way
    assert f"weights: {path} " in out and "\nsteps 8-1-1 (noisiest stage first) with euler: a clip costs" in out
    assert f" as much as {cost:.4g} network calls on the full clip\n" in out
    assert "\nnote: after so few training steps samples may still look like noise\n" in out
    assert "wrote samples/flow-3-space-time-000.gif" in out
    with Image.open("samples/flow-3-space-time-000.gif") as gif:
        assert gif.n_frames == 13 and gif.size == (3 * (2 * (32 + 2) + 2), 3 * (16 + 2 + 2))
    words = "--pyramid", "space-time", "--guidance", 2
    assert "never trained without labels" in fails_with_one_line(capsys, sample.main, *words)
    run_sample("--number", 1, "--steps", 3, "--out", "samples", "--fps", 8)  # a folder that is there
    out, said = capsys.readouterr()
    assert out.endswith("wrote samples/flow-3-000.gif and samples/flow-3-000.png, 8 frames a second\n")
    assert "note: no run in runs/ has this mode, stages and pyramid; the newest is runs/flow-3-space-time" in said


@pytest.mark.parametrize("words, message", [
    ("--stages 1 --checkpoint {weights}", "trained with --stages 3, not --stages 1"),
    ("--mode ddim --checkpoint {weights}", "trained with --mode flow, not --mode ddim"),
    ("--pyramid space-time --checkpoint {weights}", "trained with --pyramid time, not --pyramid space-time"),
    ("--pyramid space", "train.py --mode flow --stages 3 --pyramid space"),
    ("--steps 2", "3 stages need 3 whole steps or more, or 3 counts"),
    ("--guidance nan", "argument --guidance: must be a number in [-100, 100]"),
    ("--label cat", "its labels are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
    ("--number 2 --label 1 2 3", "--label names 3 classes, and --number 2 makes fewer"),
    ("--checkpoint {tmp}", "weights.pt does not exist"),
    ("--checkpoint {tmp}/bare.pt", "lacks classes"),
    ("--checkpoint {tmp}/text.pt", "it is of another kind"),
    ("--checkpoint {tmp}/cut.pt", "not a whole checkpoint"),
    ("--out {tmp}/text.pt/a", "File exists"),
    ("--out {tmp}/taken", "taken.png exists already"),
    ("--out {tmp}/taken.png", "taken.png exists already"),
    ("--out {tmp}/a.npy", "makes pictures: .gif, .png, .mp4"),
    ("--out {tmp}/a.gif --fps 51", "a GIF has at most 50"),
    ("--out {tmp}/a.png --fps 7", "no meaning for .png files"),
    ("--number 6600", "makes a picture of 516x134646 pixels, and a .gif file has"),
    ("--frames 32", "--frames 32; --help lists all"),
])  # fmt: skip
def test_sample_refuses_bad_input_in_one_sentence(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    weights = SHIPPED / "flow-3.pt"
    torch.save({"format": FORMAT}, tmp_path / "bare.pt")
    (tmp_path / "text.pt").write_text("no")
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:-1000])
    (tmp_path / "taken.png").write_text("precious")
    words = words.format(tmp=tmp_path, weights=weights).split()
    assert message in fails_with_one_line(capsys, sample.main, *words)
    assert not (tmp_path / "samples").exists() and not list(tmp_path.glob("*.gif"))
    assert (tmp_path / "taken.png").read_text() == "precious"


@pytest.mark.parametrize("key, value, message", [
    ("mode", "edm", "damaged: {'mode': 'edm'"), ("stages", "three", "'stages': 'three'"),
    ("pyramid", ["time"], "'pyramid': ['time']"), ("shift", 0, "'shift': 0"), ("frames", -3, "'frames': -3"),
    ("size", (16, 0), "'size': (16, 0)"), ("size", None, "'size': None"), ("ends", [0.5, 0.25, 0.1], "'ends': [0.5"),
    ("pyramid", "space", "its factor is not that of the pyramid in space"),
    ("config", {"wings": 2}, "does not fit this version of the model"),
    ("format", 3, "not of this version"), ("ema", math.nan, "weights that are NaN or infinite"),
    ("classes", ["a"], "labels or stages are not those of its model"),
])  # fmt: skip
def test_weights_that_hold_what_cannot_be_are_refused(key, value, message, tmp_path, capsys):
    good = torch.load(SHIPPED / "flow-3.pt", weights_only=True)
    value = {name: weight * value for name, weight in good["ema"].items()} if key == "ema" else value
    torch.save(good | {key: value}, tmp_path / "wrong.pt")
    words = "--checkpoint", tmp_path / "wrong.pt", "--out", tmp_path / "it"
    assert message in fails_with_one_line(capsys, sample.main, *words)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.GIF"])
def test_out_with_a_suffix_writes_that_file_alone(name, tmp_path, capsys):
    words = "--checkpoint", SHIPPED / "flow-1.pt", "--number", 2, "--steps", 1, "--out", tmp_path / name
    run_sample(*words)
    out = capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [name] and f"wrote {tmp_path / name}" in out
    assert "like noise" not in out
    with Image.open(tmp_path / name) as picture:
        assert picture.format == name[2:].upper()


def test_a_file_that_cannot_be_written_whole_is_not_left_behind(tmp_path, monkeypatch, capsys):
    def half(_, path, *options) -> None:
        path.write_bytes(b"half")
        raise OSError("no room left")

    monkeypatch.setattr(sample, "save_gif", half)
    with pytest.raises(SystemExit, match="2"):
        run_sample("--checkpoint", SHIPPED / "flow-1.pt", "--number", 1, "--steps", 1, "--out", tmp_path / "a.gif")
    assert capsys.readouterr().err.endswith("\nsample.py: no room left\n") and not list(tmp_path.iterdir())


def test_every_label_that_is_asked_for_gets_a_clip_and_large_clips_are_not_enlarged(tmp_path, capsys):
    asked = [str(number % 10) for number in range(12)]
    run_sample("--checkpoint", SHIPPED / "flow-3.pt", "--steps", 3, "--label", *asked, "--out", tmp_path / "a.gif")
    assert "12 clips of 16 frames" in capsys.readouterr().out
    weights = load_weights(SHIPPED / "flow-3.pt")
    assert [sample.enlarged(replace(weights, size=size)) for size in (32, (96, 64), (32, 65), 256)] == [3, 3, 1, 1]
    assert [sample.frame_rate(replace(weights, fps=60.0), suffix) for suffix in (".gif", ".mp4")] == [50, 60]


COMPILER_ERROR = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})("no C++ compiler\nfound")


@pytest.mark.parametrize("error, code, said", [
    (KeyboardInterrupt(), 130, "sample.py: stopped\n"),
    (torch.OutOfMemoryError("CUDA"), 2, "not enough memory for so many clips at once: sample fewer with --number\n"),
    (COMPILER_ERROR, 2, "--compile failed (no C++ compiler): leave it out (with --resume: --no-compile)\n"),
])  # fmt: skip
def test_what_ends_the_sampling_is_said_in_a_sentence(error, code, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", Mock(side_effect=error))
    with pytest.raises(SystemExit) as stopped:
        run_sample("--checkpoint", SHIPPED / "flow-1.pt", "--out", tmp_path / "a")
    err = capsys.readouterr().err
    assert stopped.value.code == code and err.endswith(said) and err.count("\n") == 1


def test_a_training_that_lacks_a_compiler_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "optimize", Mock(side_effect=COMPILER_ERROR))
    with pytest.raises(SystemExit, match="compile failed .*: leave it out .with --resume: --no-compile.; start a new"):
        train.main([*TINY, "--out", str(tmp_path), "--steps", "3"])


def test_a_run_s_samples_are_numbered_whatever_its_name(tmp_path):
    for number in range(2):
        name = sample.free_name(tmp_path / "flow-3-clips.v2")
        assert name.name == f"flow-3-clips.v2-{number:03d}"
        (tmp_path / f"{name.name}.gif").touch()


@pytest.mark.parametrize("fps", [12, 24.5])
def test_out_mp4_writes_a_video_that_plays_everywhere(tmp_path, capsys, fps):
    av = pytest.importorskip("av", reason="pip install av")
    words = ["--checkpoint", SHIPPED / "flow-1.pt", "--number", 2, "--steps", 1, "--fps", fps]
    run_sample(*words, "--out", tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream, frames = container.streams.video[0], list(container.decode(video=0))
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, len(frames)) == ("h264", "yuv420p", 16)
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (6, 1)  # as it was converted
        assert float(stream.average_rate) == fps and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_model_that_never_saw_a_label_is_sampled_without_any(tmp_path, capsys):
    torch.save(torch.load(SHIPPED / "flow-3.pt", weights_only=True) | {"label_dropout": 1.0}, tmp_path / "weights.pt")
    weights = load_weights(tmp_path / "weights.pt")
    some, none = (sample.generate(weights, Pyramid("flow"), labels, 2, 3) for labels in (torch.tensor([3, 4]), None))
    assert torch.equal(some, none)
    said = fails_with_one_line(capsys, sample.main, "--checkpoint", tmp_path, "--label", "3")
    assert "was never trained with labels (--label-dropout 1)" in said
