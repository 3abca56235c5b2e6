"""The sample command: what the network says, guidance, what is written, and what is refused."""

import math

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    animation,
    both_modes,
    clips,
    fails_with_one_line,
    gamma_sigma,
    run_training,
    save_hostile,
    small_model,
)
from PIL import Image

import sample
import train
from checkpoint import FORMAT, SHIPPED, load_weights
from tpdiff import Pyramid, downsample

# ---- From the network to the pyramid's target


@both_modes
def test_guidance_is_the_line_through_both_predictions(mode):
    model, x, t, y = small_model(classes=3), torch.randn(2, 1, 4, 8, 8), torch.rand(2), torch.tensor([0, 2])
    p = Pyramid(mode)
    a, b = sample.output_coefficients(p, x, t)
    conditional, unconditional = (a * x + b * model(x, t, 1, *label) for label in ([y], []))
    torch.testing.assert_close(sample.make_predict(model, p, y, 1.0, False)(x, t, 1), conditional)
    guided = sample.make_predict(model, p, y, 3.0, False)(x, t, 1)
    torch.testing.assert_close(guided, unconditional + 3 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


@both_modes
@pytest.mark.parametrize("stages", [1, 3])
def test_the_network_says_the_velocity(mode, stages):
    p, x0, k = Pyramid(mode, stages), clips(3, 1, 8, 4, 4), stages - 1  # where the stage's clip is the clip itself
    noise = clips(3, 1, 8 // 2**k, 4, 4, seed=1)
    x_t, target, t = p.interpolate(*p.endpoints(x0, noise, k), k, torch.tensor([0.0, 0.4, 1.0]).double())
    a, b = sample.output_coefficients(p, x_t, t)
    output, x0 = (target - a * x_t) / b, downsample(x0, 2**k)
    for i in range(3):
        gamma, sigma = gamma_sigma("ddim", t[i].item())
        velocity = target[i] if mode == "flow" else gamma * noise[i] - sigma * x0[i]  # arXiv 2202.00512
        torch.testing.assert_close(output[i], velocity, rtol=1e-9, atol=1e-9)


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
        ("--checkpoint {tmp}/stages.pt", "damaged: mode 'flow', {{'stages': 'three'"),
        ("--checkpoint {tmp}/mode.pt", "damaged: mode 'edm'"),
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
