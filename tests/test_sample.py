"""The sample command: what the network says, guidance, what is written, and what is refused."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    animation,
    both_modes,
    clips,
    fails_with_one_line,
    gamma_sigma,
    pyramid_of,
    run_training,
    save_hostile,
    small_model,
)
from PIL import Image

import sample
import train
from checkpoint import FORMAT, SHIPPED, find_weights, load_weights, make_pyramid
from data import save_gif
from tpdiff import Pyramid

# ---- What the network says, and what a clip costs


def test_guidance_is_the_line_through_both_predictions():
    model, x, t, y = small_model(classes=3), torch.randn(2, 1, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    conditional, unconditional = (model(x, t, 1, *label) for label in ([y], []))
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


@both_modes
@pytest.mark.parametrize("stages", [1, 3])
def test_the_network_says_the_velocity(mode, stages):
    p, x0, k = pyramid_of(mode, stages), clips(3, 1, 8, 4, 4), stages - 1  # where the stage's clip is the clip itself
    noise = clips(3, 1, 8 // 2**k, 4, 4, seed=1)
    x_t, target, t = p.interpolate(*p.endpoints(x0, noise, k), k, torch.tensor([0.0, 0.4, 1.0]).double())
    x0 = x0[:, :, :: 2**k]
    for i in range(3):
        gamma, sigma = gamma_sigma(mode, t[i].item())
        torch.testing.assert_close(x_t[i], gamma * x0[i] + sigma * noise[i], rtol=1e-9, atol=1e-9)
        length = p[k].t_start - p[k].t_end
        velocity = length * (noise[i] - x0[i]) if mode == "flow" else gamma * noise[i] - sigma * x0[i]
        torch.testing.assert_close(target[i], velocity, rtol=1e-9, atol=1e-9)  # of ddim: arXiv 2202.00512


@pytest.mark.parametrize(
    "pyramid, frames, cost",
    [
        ("time", 16, 10 / 4 + 10 / 2 + 10),
        ("time", 21, 10 * 6 / 21 + 10 * 11 / 21 + 10),
        ("time", 1, 30),
        ("space", 21, 10 / 16 + 10 / 4 + 10),
        ("space-time", 21, 10 * 6 / 21 / 16 + 10 * 11 / 21 / 4 + 10),
    ],
)
def test_a_call_costs_as_many_tokens_as_its_stage_has(pyramid, frames, cost):
    p, shape = pyramid_of("flow", 3, pyramid), (2, 3, frames, 8, 12)
    assert sample.full_rate_steps([10, 10, 10], p, shape) == pytest.approx(cost)
    assert sample.full_rate_steps([10, 10, 10], p, shape, calls=2) == pytest.approx(2 * cost)
    uneven = sample.full_rate_steps([7, 1, 4], p, shape), sample.full_rate_steps([1, 1, 4], p, shape)
    assert uneven[0] - uneven[1] == pytest.approx(6 * math.prod(p.shape(shape, 2)) / math.prod(shape))


def test_21_frames_cost_1_66_times_less_on_three_stages_and_16_frames_1_71_times():
    p, vanilla = Pyramid("flow", 3), Pyramid("flow", 1)
    for frames, ratio in ((21, "1.66"), (16, "1.71")):
        shape = (1, 1, frames, 32, 32)
        full, ours = sample.full_rate_steps([30], vanilla, shape), sample.full_rate_steps([10, 10, 10], p, shape)
        assert full == 30 and f"{full / ours:.2f}" == ratio


def test_sampled_clip_is_the_same_in_any_batch(tmp_path):
    weights = load_weights(ROOT / "weights" / "flow-3.pt")
    p, labels = Pyramid("flow", 3), torch.arange(3)
    three = sample.generate(weights, p, labels, 3, steps=3, precision="fp32")
    one = sample.generate(weights, p, labels[:1], 1, steps=3, precision="fp32")
    torch.testing.assert_close(three[:1], one, rtol=1e-4, atol=1e-4)


def test_clips_in_batches_are_those_of_one_batch():
    weights = load_weights(SHIPPED / "flow-3.pt")
    labels, p = sample.choose_labels(weights.classes, 3), Pyramid("flow", 3)
    together = sample.generate(weights, p, labels, 3, steps=3)
    last = sample.generate(weights, p, labels[2:], 1, steps=3, first=2)
    torch.testing.assert_close(last, together[2:], rtol=1e-3, atol=1e-4)


# ---- Train, then sample


def test_train_on_a_folder_then_sample_writes_a_gif_with_every_frame(clip_folder, tmp_path, capsys):
    run_training(
        tmp_path / "run", "--steps", "2", "--data", str(clip_folder), "--mode", "ddim", "--sample-interval", "2"
    )
    assert (tmp_path / "run" / "step-0000002.gif").exists()
    assert "4 used" in capsys.readouterr().out
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 3, "--solver", "ab2"]
    sample.main([*map(str, words), "--mode", "ddim", "--steps", "4", "2", "1"])
    out = capsys.readouterr().out
    assert f"{4 / 4 + 2 / 2 + 1:.4g} full-rate network calls" in out and str(tmp_path / "it.gif") in out
    with Image.open(tmp_path / "it.gif") as gif:
        assert gif.n_frames == 8
    sampled = fails_with_one_line(capsys, sample.main, *words, "--mode", "ddim")
    assert "it.gif exists already" in sampled


def test_train_on_labels_then_sample_one_by_its_name(tmp_path, capsys):
    for name in ("cat", "dog"):
        animation(tmp_path / "clips" / name / "a.gif", 8)
    run_training(tmp_path / "run", "--steps", "2", "--data", str(tmp_path / "clips"), "--labels", "folder")
    assert torch.load(tmp_path / "run" / "weights.pt", weights_only=True)["classes"] == ["cat", "dog"]
    capsys.readouterr()
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 2, "--steps", 3]
    assert "its labels are cat, dog" in fails_with_one_line(capsys, sample.main, *words, "--label", "cow")
    sample.main([*map(str, words), "--label", "cat", "--guidance", "2"])
    assert sample.choose_labels(("ape", "cat", "dog"), 3, ["dog", "ape"]).tolist() == [2, 0, 2]
    assert sample.choose_labels(("ape", "cat"), 3).tolist() == [0, 1, 0]
    capsys.readouterr()
    animation(tmp_path / "clips" / "eel" / "a.gif", 8)
    resumed = fails_with_one_line(capsys, train.main, "--resume", "--out", tmp_path / "run", "--steps", 3)
    assert "other clips than when" in resumed


def test_train_on_latents_then_sample_some(tmp_path, capsys):
    (tmp_path / "latents").mkdir()
    np.save(tmp_path / "latents" / "a.npy", np.full((4, 8, 8, 8), 20, np.float32))
    words = ["--steps", "2", "--data", str(tmp_path / "latents"), "--latent-scale", "0.05", "--sample-interval", "2"]
    run_training(tmp_path / "run", *words, "--size", "8")
    assert np.load(tmp_path / "run" / "step-0000002.npy").shape == (10, 4, 8, 8, 8)
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 2, "--steps", 3]
    sample.main([*map(str, words)])
    assert "it.npy" in capsys.readouterr().out
    clips = np.load(tmp_path / "it.npy")
    weights = load_weights(tmp_path / "run" / "weights.pt")
    expected = sample.generate(weights, Pyramid("flow", 3), None, 2, 3) / 0.05
    assert clips.shape == (2, 4, 8, 8, 8) and np.allclose(clips, expected)
    assert "it.npy exists already" in fails_with_one_line(capsys, sample.main, *words)


def test_train_on_time_and_space_then_sample_by_the_pyramid_s_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--pyramid space-time --shift 2 --batch 8 4 2 --size 16 32 --frames 13 --patch 4 --steps 4"
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, *words.split()])
    assert stopped.value.code == 0 and "runs/flow-3-space-time" in capsys.readouterr().out
    path = find_weights("flow", 3, "space-time")
    assert str(path) == "runs/flow-3-space-time/weights.pt" and find_weights("flow", 3) == SHIPPED / "flow-3.pt"
    weights = load_weights(path)
    assert (weights.frames, weights.size, weights.pyramid, weights.shift) == (13, (16, 32), "space-time", 2)
    assert weights.model.config.factor == make_pyramid(weights).factor == (2, 2, 2)
    assert make_pyramid(weights).shift == 2
    clips = sample.generate(weights, make_pyramid(weights), None, 2, 3, precision="fp32")
    assert clips.shape == (2, 1, 13, 16, 32) and clips.isfinite().all()

    sample.main(["--pyramid", "space-time", "--number", "2", "--steps", "10", "--precision", "fp32"])
    out = capsys.readouterr().out
    cost = 5 * 4 / 13 / 16 + 3 * 7 / 13 / 4 + 2  # of 13 frames 7 and then 4 are left; a half and a quarter each way
    assert f"steps 5-3-2 (noisiest stage first) with euler: {cost:.4g} full-rate network calls" in out
    assert f"weights: {path} " in out and "wrote samples/flow-3-space-time-000.gif" in out
    with Image.open("samples/flow-3-space-time-000.gif") as gif:
        assert gif.n_frames == 13 and gif.size == (3 * (2 * (32 + 2) + 2), 3 * (16 + 2 + 2))
    sample.main(["--checkpoint", str(SHIPPED / "emoji.pt"), "--number", "1", "--steps", "3"])
    out = capsys.readouterr().out
    assert "wrote samples/emoji-000.gif" in out and "\n1 clip of 16 frames, " in out  # named after the weights
    refused = fails_with_one_line(capsys, sample.main, "--pyramid", "time", "--checkpoint", path)
    assert f"{path} was trained with --pyramid space-time, not --pyramid time" in refused


@both_modes
def test_21_frames_train_and_sample_on_three_stages(mode, tmp_path, capsys):
    run_training(tmp_path / "run", "--frames", "21", "--steps", "3", "--mode", mode)
    capsys.readouterr()
    words = ["--checkpoint", tmp_path / "run", "--out", tmp_path / "it", "--number", 1, "--steps", 30]
    sample.main([str(word) for word in words])
    with Image.open(tmp_path / "it.gif") as gif:
        assert gif.n_frames == 21
    assert f"{30 / 1.65789:.4g} full-rate network calls" in capsys.readouterr().out


# ---- What is refused


@pytest.mark.parametrize(
    "words, message",
    [
        ("--stages 1 --checkpoint {weights}", "trained with --stages 3, not --stages 1"),
        ("--mode ddim --checkpoint {weights}", "trained with --mode flow, not --mode ddim"),
        ("--checkpoint {tmp}/bare.pt", "lacks classes"),
        ("--checkpoint {tmp}/other.pt", "does not fit this version of the model"),
        ("--guidance nan", "--guidance"),
        ("--mode flow --stages 5", "train.py --mode flow --stages 5"),
        ("--steps 2", "3 stages need at least one whole step each"),
        ("--steps 5 5", "[5, 5]"),
        ("--steps 10 0 10", "--steps"),
        ("--label cat", "cat is unknown"),
        ("--solver heun", "heun"),
        ("--checkpoint {tmp}/gone.pt", "gone.pt does not exist"),
        ("--checkpoint {tmp}/hostile.pt", "not a whole checkpoint"),
        ("--number 0", "--number"),
        ("--stages 0", "--stages"),
        ("--seed -1", "--seed"),
        ("--seed 1e5", "--seed"),
        ("--steps -3", "--steps"),
        ("--steps 5 5 5 5", "[5, 5, 5, 5]"),
        ("--label 10", "its labels are 0, 1, 2"),
        ("--checkpoint {tmp}", "weights.pt does not exist"),
        ("--checkpoint {tmp}/empty.pt", "not a whole checkpoint"),
        ("--checkpoint {tmp}/text.pt", "not a whole checkpoint"),
        ("--checkpoint {tmp}/cut.pt", "not a whole checkpoint"),
        ("--checkpoint {tmp}/old.pt", "not a checkpoint of this version"),
        ("--checkpoint {tmp}/stages.pt", "'stages': 'three'"),
        ("--checkpoint {tmp}/mode.pt", "damaged: {{'mode': 'edm'"),
        ("--checkpoint {tmp}/pyramid.pt", "damaged: {{'mode': 'flow', 'stages': 3, 'pyramid': 'cube'"),
        ("--checkpoint {tmp}/shift.pt", "'shift': 0"),
        ("--checkpoint {tmp}/size.pt", "'size': (16, 0)"),
        ("--checkpoint {tmp}/sizes.pt", "'size': (16, 16, 16)"),
        ("--checkpoint {tmp}/no-size.pt", "'size': None"),
        ("--checkpoint {tmp}/shift-text.pt", "'shift': 'x'"),
        ("--checkpoint {tmp}/pyramids.pt", "'pyramid': ['time']"),
        ("--checkpoint {tmp}/space.pt", "its factor is not that of the pyramid in space"),
        ("--pyramid space-time --checkpoint {weights}", "trained with --pyramid time, not --pyramid space-time"),
        ("--pyramid space", "train.py --mode flow --stages 3 --pyramid space"),
        ("--pyramid cube", "--pyramid"),
        ("--checkpoint {tmp}/frames.pt", "'frames': -3"),
        ("--checkpoint {tmp}/classes.pt", "labels or stages are not those of its model"),
        ("--checkpoint {tmp}/nan.pt", "weights that are NaN or infinite"),
        ("--out {tmp}/text.pt/a", "File exists"),
        ("--out {tmp}/taken.gif", "taken.png exists already"),
    ],
)
def test_sample_refuses_bad_input_in_one_sentence(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_hostile(tmp_path / "hostile.pt")
    torch.save({"format": FORMAT}, tmp_path / "bare.pt")
    places = {"tmp": tmp_path, "weights": ROOT / "weights" / "flow-3.pt"}
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "text.pt").write_text("not weights")
    (tmp_path / "taken.png").write_text("precious")
    (tmp_path / "cut.pt").write_bytes(places["weights"].read_bytes()[:-1000])
    good = torch.load(places["weights"], weights_only=True)
    wrong = {"old": ("format", 3), "stages": ("stages", "three"), "mode": ("mode", "edm"), "frames": ("frames", -3)}
    wrong |= {"pyramid": ("pyramid", "cube"), "space": ("pyramid", "space"), "shift": ("shift", 0)}
    wrong |= {"size": ("size", (16, 0)), "sizes": ("size", (16, 16, 16)), "no-size": ("size", None)}
    wrong |= {"shift-text": ("shift", "x"), "pyramids": ("pyramid", ["time"])}
    wrong |= {
        "other": ("config", {"wings": 2}),
        "classes": ("classes", ["a"]),
        "nan": ("ema", {k: v * math.nan for k, v in good["ema"].items()}),
    }
    for name, (key, value) in wrong.items():
        torch.save(good | {key: value}, tmp_path / f"{name}.pt")
    words = [word.format(**places) for word in words.split()]
    assert message.format() in fails_with_one_line(capsys, sample.main, *words)
    assert not (tmp_path / "samples").exists() and not list(tmp_path.glob("*.gif"))
    assert (tmp_path / "taken.png").read_text() == "precious"


@pytest.mark.parametrize("fps", [12, 24.5])
def test_out_mp4_writes_a_video_that_plays_everywhere(tmp_path, capsys, fps):
    av = pytest.importorskip("av", reason="pip install av")
    words = ["--checkpoint", ROOT / "weights" / "flow-1.pt", "--number", "2", "--steps", "1", "--fps", fps]
    sample.main([str(word) for word in [*words, "--out", tmp_path / "a.mp4"]])
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream, frames = container.streams.video[0], list(container.decode(video=0))
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, len(frames)) == ("h264", "yuv420p", 16)
        assert float(stream.average_rate) == fps and [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    capsys.readouterr()
    assert "exists already" in fails_with_one_line(capsys, sample.main, *words, "--out", tmp_path / "a.mp4")


def test_gifs_last_as_long_as_fps_says(tmp_path):
    for fps in (12, 30):
        save_gif(torch.rand(1, 1, 30, 4, 4), tmp_path / "a.gif", fps=fps)
        with Image.open(tmp_path / "a.gif") as gif:
            durations = []
            for number in range(gif.n_frames):
                gif.seek(number)
                durations.append(gif.info["duration"])
        assert sum(durations) == pytest.approx(30_000 / fps, abs=10) and max(durations) - min(durations) <= 10
