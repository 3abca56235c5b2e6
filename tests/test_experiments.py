"""Measuring: what a score means, what a claim trains and writes, what is timed, and how the page is made."""

import functools
import itertools
import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, animation, both_modes, fails_with_one_line, run_training, seeded, small_model
from torch import nn
from torch._dynamo.testing import CompileCounter

import sample
import train
from checkpoint import SHIPPED, load_weights
from data import FolderClips, bounce
from experiments import asked, claims, metrics, real, report, runs, speed, variants
from experiments.timing import in_milliseconds
from model import Block
from tpdiff import Pyramid

# ---- metrics.py: what a score means


def noisy(x: torch.Tensor, strength: float) -> torch.Tensor:
    return x + strength * torch.randn(x.shape, generator=seeded())


def blurred(x: torch.Tensor, sigma: float) -> torch.Tensor:
    weights = torch.exp(-torch.arange(-6, 7).float().square() / (2 * sigma**2))
    weights, frames = weights / weights.sum(), x.transpose(1, 2).flatten(0, 1)
    frames = nn.functional.pad(frames, (6, 6, 6, 6), mode="replicate")
    for shape in ((1, 1, 1, -1), (1, 1, -1, 1)):
        frames = nn.functional.conv2d(frames, weights.view(shape))
    return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


def with_frames_shuffled(x: torch.Tensor, swaps: int) -> torch.Tensor:
    random, shuffled = np.random.default_rng(0), x.clone()
    for clip in shuffled:
        for _ in range(swaps):
            i, j = random.choice(x.shape[2], 2, replace=False)
            clip[:, [i, j]] = clip[:, [j, i]]
    return shuffled


def with_frames_doubled(x: torch.Tensor, count: int) -> torch.Tensor:
    """Every second one of the first `count` frames is the one before it again."""
    numbers = torch.arange(x.shape[2])
    return x[:, :, numbers.where(numbers >= count, numbers // 2 * 2)]


def with_patches_permuted(x: torch.Tensor, count: int) -> torch.Tensor:
    """`count` pairs of the clip's 16 patches of 8 x 8 change places, the same in all frames: brightness is kept."""
    random, patches = np.random.default_rng(0), x.unflatten(4, (4, 8)).unflatten(3, (4, 8)).clone()
    for clip in patches:
        for _ in range(count):
            a, b, c, d = random.integers(4, size=4)
            clip[:, :, a, :, b], clip[:, :, c, :, d] = clip[:, :, c, :, d].clone(), clip[:, :, a, :, b].clone()
    return patches.flatten(5, 6).flatten(3, 4)


def with_phases_scrambled(x: torch.Tensor, share: float) -> torch.Tensor:
    """The strength of every spatial frequency is kept, its place is not."""
    spectrum = torch.fft.rfft2(x)
    phases = 2 * math.pi * share * torch.rand(len(x), 1, 1, *spectrum.shape[-2:], generator=seeded())
    phases[..., 0, 0] = 0
    return torch.fft.irfft2(spectrum * torch.exp(1j * phases), s=x.shape[-2:])


@pytest.fixture(scope="module")
def judged():
    judge = metrics.load_judge()
    return judge, judge.features(metrics.real_clips(0, 1000)), metrics.real_clips(1000, 500)


@pytest.mark.parametrize(
    "damage, strengths",
    [
        (noisy, (0.2, 0.4, 0.8)),
        (blurred, (1, 2, 4)),
        (with_frames_shuffled, (1, 2, 4)),
        (with_frames_doubled, (4, 8, 16)),
        (with_patches_permuted, (2, 8, 32)),
        (with_phases_scrambled, (0.1, 0.25, 0.5)),
    ],
)
def test_judge_distance_grows_with_damage_of_every_kind(damage, strengths, judged):
    judge, reference, clips = judged
    distances = [metrics.frechet_distance(judge.features(damage(clips, s)), reference) for s in strengths]
    real = metrics.frechet_distance(judge.features(clips), reference)
    assert real < 0.3  # near zero: the strongest damage is at 8 to 36, doubled frames at 0.6
    assert all(less < more for less, more in itertools.pairwise([1.2 * real, *distances])), (real, distances)


@pytest.mark.parametrize(
    "damage, strengths",
    [
        (noisy, (0.2, 0.8)),
        (blurred, (1, 2)),
        (with_frames_shuffled, (1, 4)),
        (with_frames_doubled, (4, 8)),
        (with_patches_permuted, (2, 32)),
        (with_phases_scrambled, (0.1, 0.5)),
    ],
)
def test_efficientnet_distance_grows_with_damage_of_every_kind(damage, strengths):
    pytest.importorskip("efficientnet_lite_pytorch")
    clips = metrics.real_clips(0, 16)[:, :, :8]  # their own reference: from so few clips others are far away
    features = functools.partial(metrics.picture_features, metrics.load_efficientnet())
    scores = metrics.distances_to(clips, {"distance": features})
    distances = [scores(damage(clips, strength))["distance"] for strength in strengths]
    assert scores(clips)["distance"] == pytest.approx(0, abs=1e-3) and 0.01 < distances[0] < distances[1]


class FewChannels(torch.nn.Module):
    """In place of an image network."""

    def __init__(self):
        super().__init__()
        self._conv_stem, self._bn0, self._swish, self._blocks = nn.AvgPool2d(32), nn.Identity(), nn.Identity(), []


def test_quality_of_a_run_on_real_clips_beside_held_out_ones(tmp_path, capsys, monkeypatch):
    (tmp_path / "clips").mkdir()
    for green in (0, 100, 250):
        animation(tmp_path / "clips" / f"{green}.webp", 12, (16, 16), green=green)
    run_training(tmp_path / "run", "--data", str(tmp_path / "clips"), "--steps", "1")
    monkeypatch.setattr(metrics, "load_efficientnet", FewChannels)
    words = ["quality", "--data", tmp_path / "clips", "--checkpoint", tmp_path / "run", tmp_path / "run" / "weights.pt"]
    words += ["--steps", "3", "--number", "6", "--json", tmp_path / "found.json"]
    metrics.main([str(word) for word in words])
    ((header, (made, again, real)),) = json.loads((tmp_path / "found.json").read_text())["tables"]
    assert report.markdown(header, [made, again, real]) in capsys.readouterr().out
    assert header == ["", "efficientnet_distance", "flicker"] and made[1:] == again[1:]
    assert float(made[1].split()[0]) > 2 * float(real[1].split()[0]) >= 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is, and the usual file of I3D is made by it
def test_i3d_is_given_clips_of_224_pixels_in_three_channels(tmp_path, capsys):
    class Stub(nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
            assert not rescale and not resize and return_features
            assert x.shape[1] == 3 and x.shape[3] == 224 and x.shape[4] == 224
            return x.mean((1, 3, 4))

    torch.jit.script(Stub()).save(str(tmp_path / "i3d.pt"))
    network, clips = metrics.load_i3d(tmp_path / "i3d.pt"), metrics.real_clips(0, 3)
    features = torch.stack([metrics.i3d_features(network, clip) for clip in clips])
    torch.testing.assert_close(features, clips.mean((1, 3, 4)), atol=1e-3, rtol=0)
    (tmp_path / "wrong.pt").write_text("no network")
    with pytest.raises(ValueError, match="wrong.pt is not a TorchScript file"):
        metrics.load_i3d(tmp_path / "wrong.pt")


def test_destroyed_structure_is_farther_from_real_than_any_damage_that_leaves_the_digit(judged):
    judge, reference, clips = judged
    distance = lambda x: metrics.frechet_distance(judge.features(x), reference)  # noqa: E731
    destroyed = min(distance(with_patches_permuted(clips, 32)), distance(with_phases_scrambled(clips, 0.5)))
    assert destroyed > 2 * max(
        distance(noisy(clips, 0.4)), distance(blurred(clips, 1)), distance(with_frames_doubled(clips, 16))
    )


def test_frechet_distance_of_gaussians_is_the_closed_form():
    a = torch.randn(100_000, 3, generator=seeded(), dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # mean 0, covariance 1, exactly
    scale, shift = torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, 0, 2]).double()
    assert metrics.frechet_distance(a, a * scale + shift) == pytest.approx(5 + 0 + 1 + 4)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_digit_scores_are_near_one_on_real_clips_and_know_what_is_wrong(judged):
    judge, _, clips = judged
    scores = {
        name: metrics.digit_scores(judge, damaged)
        for name, damaged in {
            "real": clips,
            "noise": torch.randn(clips.shape, generator=seeded()).clamp(-1, 1),
            "black": torch.full_like(clips, -1),
            "shuffled": with_frames_shuffled(clips, 4),
            "changing": torch.cat([clips[:, :, :8], clips.roll(1, dims=0)[:, :, 8:]], dim=2),
            "patches": with_patches_permuted(clips, 32),
        }.items()
    }
    off_track = {name: found.pop("off_track") for name, found in scores.items()}
    assert off_track["real"] < 0.5 and off_track["shuffled"] > 2
    assert min(scores["real"].values()) > 0.95
    assert max(scores["noise"].values()) < 0.01 and scores["black"]["one_digit"] < 0.01
    assert scores["patches"]["one_digit"] < 0.1
    assert scores["shuffled"]["one_digit"] > 0.9 and scores["shuffled"]["straight"] < 0.1
    assert scores["changing"]["legible"] > 0.95 and scores["changing"]["one_digit"] < 0.2


def test_flicker_is_the_mean_squared_second_difference():
    still_motion = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert metrics.flicker(still_motion) == 0 and metrics.flicker(still_motion % 2) == 4


@both_modes
def test_plain_noise_has_the_variance_of_the_paper_s_and_no_noise_has_none(mode):
    x = torch.zeros(2000, 1, 2, 3, 3, dtype=torch.float64)
    paper, plain, none = (
        kind(mode, 3).renoise(x, 1, seeded()) for kind in (Pyramid, runs.PlainNoise, runs.WithoutNoise)
    )
    assert paper.var() == pytest.approx(plain.var().item(), rel=0.03) and none.abs().max() == 0
    pairs = plain.unflatten(2, (2, 2))
    assert abs((pairs[:, :, :, 0] * pairs[:, :, :, 1]).mean()) < 0.03 * plain.var()
    torch.testing.assert_close(runs.HalfNoise(mode, 3).renoise(x, 1, seeded()), paper / 2)


def test_quality_of_the_shipped_weights_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no runs
    metrics.main("quality --number 3 --reference 20 --seeds 0 5 --steps 3 --batch 2".split())
    header, _, ours, real = capsys.readouterr().out.strip().splitlines()
    assert "judge_distance" in header and "off_track" in header
    assert "flow-3.pt (flow, 3 stages, step 12000)" in ours and real.startswith("| real | ")


def test_a_clip_off_a_straight_bouncing_path_by_a_pixel_is_said_to_be_so():
    path = bounce(3.0, 1.7, 16, 10.0)
    assert metrics.off_track(path, 10.0) < 0.3
    path[7] += 2.0
    assert 0.7 < metrics.off_track(path, 10.0) < 1.5


def test_time_to_a_distance_is_interpolated_and_none_if_never_reached():
    curve = [(1.0, [8.0, 8.0]), (2.0, [4.0, 4.0]), (3.0, [1.0, 1.0])]
    assert claims.time_to(8.0, curve) == 1.0 and claims.time_to(9.0, curve) == 1.0
    assert claims.time_to(2.0, curve) == pytest.approx(2.5)  # halfway from 4 to 1 in the logarithm
    assert claims.time_to(0.5, curve) is None


@both_modes
def test_alignment_removes_more_variance_in_a_larger_batch_and_none_without_a_choice(mode, monkeypatch):
    assert claims.variance_removed(mode, 1, batch=1, seed=0, clips=64) == 0
    small, large = (claims.variance_removed(mode, 1, batch, seed=0, clips=256) for batch in (2, 64))
    assert 0 < small < large < 0.1
    clips, generator_for = metrics.real_clips(0, 256), claims.generator_for
    with monkeypatch.context() as patch:  # other noise, and then other clips
        patch.setattr(claims, "real_clips", lambda *_: clips)
        assert claims.variance_removed(mode, 1, batch=64, seed=1, clips=256) != large
    monkeypatch.setattr(claims, "generator_for", lambda _, *rest: generator_for(0, *rest))
    assert claims.variance_removed(mode, 1, batch=64, seed=1, clips=256) != large


def test_milliseconds_are_the_median_and_the_quartiles():
    assert in_milliseconds([0.001 * n for n in range(1, 10)]) == "5.0 [3.0, 7.0]"


@pytest.fixture
def tiny_claims(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    words = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "results"), "--number", "3", "--reference", "20"]
    tiny = {run: f"{' '.join(words.split()[:4])} --steps 20" for run, words in runs.RUNS.items()}
    monkeypatch.setattr(runs, "RUNS", tiny)
    return lambda claim: claims.main([claim, *words, "--smoke", "--seeds", "0", "5", "--batch", "2"])


def test_a_claim_trains_what_it_needs_writes_its_table_and_does_nothing_twice(
    tiny_claims, tmp_path, capsys, monkeypatch
):
    tiny_claims("renoising")
    content = json.loads((tmp_path / "results" / "renoising.json").read_text())
    (header, rows) = content["tables"][0]
    assert content["command"].startswith("python -m experiments.claims renoising --runs")
    assert content["torch"] == torch.__version__
    assert len(rows) == 17 and all(len(row) == len(header) for row in rows)
    assert len({tuple(row[1:]) for row in rows}) == 9  # each way its own clips; here shipped weights are of short runs
    assert report.markdown(header, rows) in capsys.readouterr().out
    assert (tmp_path / "results" / "renoising.png").exists()
    cells = json.loads((tmp_path / "results" / "cells.json").read_text())
    monkeypatch.setattr(runs.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(runs, "scores_of", lambda *_: pytest.fail("measured again"))
    tiny_claims("renoising")
    assert json.loads((tmp_path / "results" / "cells.json").read_text()) == cells
    with open(tmp_path / "runs" / "ddim-3" / "weights-20.pt", "ab") as file:
        file.write(b" ")  # other weights: their numbers no longer count
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        tiny_claims("renoising")


def test_every_claim_has_its_table_and_its_figure_in_results():
    for claim in (*claims.CLAIMS, "real", "conversion"):
        assert (report.RESULTS / f"{claim}.json").exists() and list(report.RESULTS.glob(f"{claim}*.png")), claim


def test_the_page_of_the_experiments_is_up_to_date_and_a_changed_digit_makes_it_old(tmp_path):
    page, texts = report.PAGE.read_text(), report.TEXTS.read_text()
    assert page == report.make_page(texts, report.RESULTS), "python -m experiments.report makes it anew"
    shutil.copytree(report.RESULTS, tmp_path / "results")
    tabled = [path for path in sorted((tmp_path / "results").rglob("*.json")) if path.name != "cells.json"]
    assert len(tabled) > 15
    for path in tabled:
        before, content = path.read_text(), json.loads(path.read_text())
        content["tables"][-1][1][-1][-1] = "another number"
        path.write_text(json.dumps(content))
        assert report.make_page(texts, tmp_path / "results") != page, path
        path.write_text(before)


def test_the_front_page_has_the_numbers_of_the_results(tmp_path):
    page, claims = report.FRONT_PAGE.read_text(), report.CLAIMS.read_text()
    assert page == report.make_front_page(page, claims, report.RESULTS), "python -m experiments.report makes it anew"
    rows = [["flow", 1, "time", "1.5 [1.4, 1.6]"], ["flow", 10, "time", "1.7"]]
    report.write_json(tmp_path / "a.json", {"tables": [(["mode", "clips", "pyramid", "gain"], rows)]})
    page = report.make_front_page("x\n".join(("", *report.MARKS, "")), '{{a.json 0 "flow 1" gain}}!\n', tmp_path)
    assert page == f"x\n{report.MARKS[0]}1.5!\n{report.MARKS[1]}x\n"
    with pytest.raises(ValueError, match="begins with 'flow 2': there are 0"):
        report.make_front_page(page, '{{a.json 0 "flow 2" gain}}', tmp_path)


def test_a_table_is_asked_for_once_at_least_and_exists(tmp_path):
    tables = [[["x"], [[1]]], [["y"], [[2]]]]
    report.write_json(tmp_path / "a.json", {"command": "python bench.py step", "tables": tables})
    page = report.make_page("{{a.json}}\n", tmp_path)
    assert page == "`python -m experiments.speed step`:\n\n| x |\n| --- |\n| 1 |\n\n| y |\n| --- |\n| 2 |\n"
    wrong = {"{{a.json 0}}": "leaves out table 1", "{{a.json 2}}": "which has 2", "{{b.json}}": "no such file"}
    for texts, problem in wrong.items():
        with pytest.raises(ValueError, match=problem):
            report.make_page(texts, tmp_path)


def test_texts_hold_no_number_of_a_table():
    """Nothing with a decimal point, nor a percentage: those stand in the tables."""
    prose = re.sub(r"```.*?```|`[^`]*`|\]\(.*?\)|\{\{.*?\}\}", "", report.TEXTS.read_text(), flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+|\d+%", prose)


def test_scores_name_no_commit_where_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.commit.__wrapped__() == ""


def test_quality_refuses_what_the_judge_does_not_know(tmp_path, capsys):
    run_training(tmp_path / "run", "--steps", "1")
    capsys.readouterr()
    words = ["quality", "--checkpoint", tmp_path / "run"]
    assert "give real clips with --data" in fails_with_one_line(capsys, metrics.main, *words)
    shipped = [SHIPPED / "flow-3.pt", SHIPPED / "flow-1.pt"]
    words = ["quality", "--checkpoint", shipped[0]]  # of several runs each is looked at, not only the first
    assert "give real clips with --data" in fails_with_one_line(capsys, metrics.main, *words, tmp_path / "run")
    words = ["quality", "--checkpoint", *shipped, "--steps", "9", "9", "9"]
    assert "flow-1.pt: " in fails_with_one_line(capsys, metrics.main, *words)
    words = ["quality", "--data", tmp_path, "--checkpoint", shipped[0], tmp_path / "run"]
    assert "another shape" in fails_with_one_line(capsys, metrics.main, *words)


def test_a_file_of_results_is_whole_or_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("before")
    monkeypatch.setattr(report.os, "replace", lambda *_: None)  # stopped just before
    report.write_json(tmp_path / "a.json", {"tables": []})
    assert (tmp_path / "a.json").read_text() == "before"


@pytest.mark.parametrize("main, what", [(metrics.main, "quality"), (speed.main, "step")])
def test_tables_are_written_to_a_file_or_refused_at_once(main, what, tmp_path, capsys):
    assert "there is no folder" in fails_with_one_line(capsys, main, what, "--json", tmp_path / "no" / "a.json")
    for path in (tmp_path, "/dev/null", "a" * 300 + "/b"):
        fails_with_one_line(capsys, main, what, "--json", path)
    assert not list(tmp_path.iterdir())


def test_a_claim_is_refused_options_of_others_and_a_score_of_a_single_clip(capsys):
    assert "unrecognized arguments: --seeds" in fails_with_one_line(capsys, claims.main, "latency", "--seeds", "1")
    for main, what in ((metrics.main, "quality"), (claims.main, "training")):
        assert "at least 2" in fails_with_one_line(capsys, main, what, "--number", "1")


# ---- speed.py


@pytest.mark.parametrize("what", ["step", "peers"])
def test_benchmark_times_a_run_at_every_stage(what, tmp_path, capsys):
    tiny = ["--frames", "4", "--size", "16", "--width", "8", "--depth", "1", "--heads", "1", "--batch", "2"]
    speed.main([what, "--repeats", "1", *tiny, "--json", str(tmp_path / "found.json")])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "found.json").read_text())
    assert all(re.search(rf"^\| (ours, stage )?{k} \|", out, re.MULTILINE) for k in range(3))
    assert all(report.markdown(*table) in out for table in found["tables"])
    assert found["command"].startswith(f"python -m experiments.speed {what} --repeats 1 --frames 4")
    assert found["machine"] and found["precision"] in ("bf16", "fp32")


def test_benchmark_counts_the_flops_of_the_linear_layers():
    run = speed.Run(train.parse_args(["--out", "nowhere", "--batch", "2", "--frames", "4", "--width", "128"])[0])
    products, flops = speed.matrix_products(run, 0)
    second_attention = 2 * run.tokens(0) * 128 * (3 * 128 + 128)
    linear = 4 * (flops / 3 + second_attention)  # of four blocks, forward
    assert run.tokens(0) == 512 and linear < run.forward_flops(0) < 1.2 * linear


def test_benchmark_compiles_the_network_that_it_samples_with_and_counts_it_as_it_is(monkeypatch):
    counter = CompileCounter()
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    words = ["--out", "nowhere", "--frames", "4", "--width", "8", "--depth", "3", "--heads", "1", "--batch", "2"]
    plain, compiled = (speed.Run(train.parse_args([*words, *flag])[0]) for flag in ([], ["--compile"]))
    plain.sampling_step(0)
    assert counter.frame_count == 0
    compiled.sampling_step(0)
    assert counter.frame_count == 1
    assert compiled.forward_flops(0) == plain.forward_flops(0) > 0 and counter.frame_count == 1


def test_the_losses_of_runs_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from experiments import figures

    run_training(tmp_path / "run", "--steps", "6", "--save-interval", "2", "--held-out", "0.1")
    figures.main(["losses", str(tmp_path / "run"), "--out", str(tmp_path / "losses.png")])
    assert (tmp_path / "losses.png").stat().st_size > 10_000
    assert figures.smooth((1.0, 2.0), 0.5) == [1.0, 1.5]
    capsys.readouterr()
    assert "metrics.jsonl" in fails_with_one_line(capsys, figures.main, "losses", tmp_path / "none")


@pytest.mark.parametrize("what", ["windows", "stages"])
def test_the_pages_pictures_are_drawn(tmp_path, what):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    from experiments import figures

    figures.main([what, "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_emoji_become_clips_on_white_at_half_the_rate_in_one_part_a_code_point(tmp_path):
    import io
    import tarfile

    from PIL import Image

    from experiments import emoji

    def webp(count: int) -> bytes:
        pictures = [Image.new("RGBA", (256, 256), (3 * number, 0, 0, 255 if number else 0)) for number in range(count)]
        content = io.BytesIO()
        pictures[0].save(content, "WEBP", save_all=True, append_images=pictures[1:], duration=42, lossless=True)
        return content.getvalue()

    files = {"1f300.webp": webp(72), "1f468-1f3fb.webp": webp(70), "1f301.webp": webp(30), "README.md": b""}
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/assets/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert emoji.write_clips(package.getvalue(), tmp_path) == 2  # one is too short
    path = tmp_path / emoji.part_of("1f300") / "1f300" / "1f300.webp"
    with Image.open(path) as clip:
        assert clip.size == (64, 64) and clip.n_frames == 36 and clip.convert("RGB").getpixel((9, 9)) == (255,) * 3
        clip.seek(5)
        assert clip.convert("RGB").getpixel((9, 9)) == pytest.approx((30, 0, 0), abs=5)
    assert (tmp_path / "train" / "1f468" / "1f468-1f3fb.webp").exists()
    parts = [emoji.part_of(f"1f{number:03x}") for number in range(0x300, 0x700)]
    assert 0.8 < parts.count("train") / 1024 < 0.9 and 0.07 < parts.count("held-out") / 1024 < 0.13


def test_attention_and_training_are_measured_by_size(tmp_path, monkeypatch):
    from experiments import sizes

    for what in ("attention", "training"):
        words = ["--smoke", "--repeats", "1", "--json", str(tmp_path / f"{what}.json")]
        sizes.main([what, *words, *(["--width", "16", "--depth", "1", "--heads", "2"] if what == "training" else [])])
    content = json.loads((tmp_path / "training.json").read_text())
    ((header, rows),) = content["tables"]
    assert [row[2] for row in rows] == ["vanilla", "time", "space-time"] and len(header) == len(rows[0]) == 7
    assert all(0 <= float(row[3]) < 2 and float(row[4]) > 0 for row in rows)
    assert len(json.loads((tmp_path / "attention.json").read_text())["tables"]) == 2


# ---- real.py: four systems on real clips


def test_systems_train_in_equal_time_and_are_scored_on_clips_held_out(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for part, greens in (("train", (0, 250)), ("held-out", (100, 150)), ("settings", (50, 200))):
        for green in greens:
            animation(tmp_path / part / f"{green}" / "clip.webp", 18, (16, 16), green=green)
    monkeypatch.setattr(real, "load_efficientnet", FewChannels)
    there = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs")]
    tiny = "--width 8 --depth 1 --heads 2 --batch 2 --workers 0 --warmup 1"
    words = ["train", *there, "--seconds", "24", "--systems", "vanilla", "space-time", "--options", tiny]
    monkeypatch.setattr(real, "seconds_a_step", lambda words, _: 2 if "space-time" in words else 3)
    real.main(words)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/weights-*.pt")}
    assert len(files) == 4 * 2 * 2  # weights, systems, seeds
    steps = [train.make_parser().parse_args(f.read_text().split()).steps for f in tmp_path.glob("runs/vanilla*/*.txt")]
    assert steps == [8, 8]  # as many as fit into the time
    (note,) = tmp_path.glob("runs/space-time-seed-2/*.txt")
    assert "--steps 12 " in note.read_text()
    with pytest.raises(SystemExit) as stopped:
        real.main([*words[:-1], "--width 8 --depth 1 --heads 1"])
    assert stopped.value.code == 2 and "was begun with other options: move it away" in capsys.readouterr().err
    real.main(words)  # nothing is left to do
    assert files == {path: path.stat().st_mtime_ns for path in files}
    few = ["--number", "2", "--steps", "3", "--out", str(tmp_path / "out")]
    real.main(["scores", *there, *few, "--reference", "4"])
    trained, cost, gains = json.loads((tmp_path / "out" / "real.json").read_text())["tables"]
    assert [row[0] for row in trained[1]][:2] == ["space-time-seed-1", "space-time-seed-2"] and len(trained[1]) == 5
    assert len(cost[1]) == 2 * 2 * len(real.STEPS) and [row[2] for row in gains[1]][1] == "1.00"
    assert len(list((tmp_path / "out").glob("real-*.png"))) == 3
    weights = str(next(tmp_path.glob("runs/vanilla-seed-1/weights.pt")))
    real.main(["distance", "--data", str(tmp_path), *few[:-1], str(tmp_path / "new"), "--checkpoint", weights])
    ((_, rows),) = json.loads((tmp_path / "new" / "distance.json").read_text())["tables"]
    assert rows[0][0] == "none" and rows[-1][0] == f"samples of {weights}" and len(rows) == 15


def test_samples_that_repeat_training_clips_are_found(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for part, green in (("train", 0), ("train", 250), ("held-out", 100), ("settings", 50)):
        animation(tmp_path / part / f"{green}" / "clip.webp", 18, (64, 64), green=green, lossless=True)
    seen = FolderClips(tmp_path / "train", 16, 64)
    copied = torch.stack([seen[number][0] for number in range(3)])
    weights = SimpleNamespace(frames=16, size=64, classes=("0", "250"))
    monkeypatch.setattr(real, "load_weights", lambda *_: weights)
    monkeypatch.setattr(real, "sampled", lambda _, labels, *__, **___: copied[: len(labels)])
    real.main(["copies", "--data", str(tmp_path), "--number", "3", "--out", str(tmp_path / "out")])
    ((_, rows),) = json.loads((tmp_path / "out" / "copies.json").read_text())["tables"]
    assert [row[0] for row in rows] == ["samples", "held-out clips"] and (tmp_path / "out" / "copies.png").exists()
    assert max(map(float, rows[0][1:])) < 0.001 and min(map(float, rows[1][1:])) > 0.1


def test_gains_compare_means_over_the_seeds_at_the_end_and_in_time():
    vanilla = [
        [(25, [8.0]), (50, [4.0]), (75, [2.0]), (100, [1.5])],
        [(25, [8.0]), (50, [4.0]), (75, [2.0]), (100, [0.5])],
    ]
    fast, slow = [
        [(n, [v]) for n, v in zip((25, 50, 75, 100), vs, strict=True)] for vs in ((4, 1, 0.5, 0.25), (9, 8, 7, 6))
    ]
    _, rows = real.gains({"vanilla": vanilla, "fast": [fast], "slow": [slow]})
    assert [row[2] for row in rows] == ["1.00", "0.25", "6.00"]
    assert [row[3] for row in rows] == ["1.00", "0.50", "not reached"]
    assert real.gains({"fast": [fast]})[1] == []


def test_the_pace_of_a_run_counts_each_stage_as_often_as_it_is_trained(monkeypatch):
    def run_train(words, out):
        assert "--log-interval 1 " in " ".join(words)
        out.mkdir()
        seconds, lines = 0.0, []
        for step, k in enumerate((2, 2, 0, 0, 0, 1, 0, 0, 2)):  # the first third is slow
            seconds += 100 if step < 3 else (4, 2, 1)[k]
            loss = [0.5 if stage == k else None for stage in range(3)]
            lines.append(json.dumps({"step": step + 1, "seconds": seconds, "loss_by_stage": loss}) + "\n")
        (out / "metrics.jsonl").write_text("".join(lines))

    monkeypatch.setattr(runs, "run_train", run_train)
    assert runs.seconds_a_step([], 3) == pytest.approx((4 + 2 + 1) / 3)
    assert runs.seconds_a_step(["--stage-odds", "4", "2", "1"], 3) == pytest.approx((4 * 1 + 2 * 2 + 1 * 4) / 7)


def test_scores_of_other_numbers_do_not_replace_each_other(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(runs, "scores_of", lambda make, *_: made.append(make) or {"score": [float(len(made))]})
    few, many = (SimpleNamespace(out=tmp_path, number=number, seeds=[0], reference=9) for number in (2, 3))
    found = [runs.stored("x", "real", "make", "metrics", args) for args in (few, many, few, many)]
    assert found == [{"score": [1.0]}, {"score": [2.0]}] * 2 and len(made) == 2


def test_every_damage_changes_clips_more_the_stronger_it_is():
    clips = metrics.real_clips(0, 10).expand(-1, 3, -1, -1, -1)
    for damage, strengths in real.damages(seeded()).values():
        changes = [(damage(clips, strength) - clips).square().mean().item() for strength in strengths]
        assert 0 < changes[0] < changes[1] < changes[2], damage.__name__


# ---- asked.py


def test_frames_that_are_doubled_or_frozen_count_as_alike():
    clips = metrics.real_clips(0, 20)
    limit = clips.diff(dim=2).square().mean((1, 3, 4)).median().item() / 10
    doubled = clips[:, :, ::2].repeat_interleave(2, dim=2)
    assert max(asked.share_alike(clips, limit).values()) < 0.05
    assert asked.share_alike(doubled, limit)["within"] == 1 and asked.share_alike(doubled, limit)["between"] < 0.05
    assert set(asked.share_alike(clips[:, :, :1].expand_as(clips), limit).values()) == {1}


def test_coarse_to_fine_returns_the_clips_of_a_network_that_knows_them(monkeypatch):
    clip = metrics.real_clips(3, 1)[:, :, ::4].repeat_interleave(4, dim=2)  # the same at every rate
    begun = {}

    def predict(x, t, k):
        time, known = t.view(-1, 1, 1, 1, 1), clip[:, :, :: 2**k]
        begun.setdefault(k, (t[0].item(), ((x - (1 - time) * known) / time).square().mean().item()))
        return (x - known) / time

    monkeypatch.setattr(sample, "make_predict", lambda *_: predict)
    weights = load_weights(SHIPPED / "flow-1.pt")
    for shift in (1, 3):
        made = asked.coarse_to_fine(weights, shift, 9, 3, 0, 3)
        torch.testing.assert_close(made, clip.expand_as(made), rtol=1e-3, atol=1e-3)
        times, noises = zip(*(begun.pop(k) for k in (2, 1, 0)), strict=True)
        expected = [1.0, *(shift * end / (1 + (shift - 1) * end) for end in (2 / 3, 1 / 3))]
        assert times == pytest.approx(expected) and noises == pytest.approx([1, 1, 1], abs=0.05)


def test_traits_are_read_and_compared_with_those_of_real_clips():
    real, fresh = metrics.real_clips(0, 300), metrics.real_clips(1000, 300)
    tracks = [metrics.REAL.tracks(number)[0] for number in range(300)]
    traits = asked.traits(real)
    assert (traits["digits"] == torch.tensor([label for label, *_ in tracks])).double().mean() > 0.98
    low = torch.tensor([y[8] > 6 for _, y, _ in tracks])  # of 0 to 12
    assert ((traits["places"] >= 8) == low).double().mean() > 0.9
    own, others, alone = (asked.overlaps(clips, 300) for clips in (real, fresh, fresh[:1].expand_as(fresh)))
    assert min(own.values()) > 0.999 and min(others.values()) > 0.75
    assert alone.pop("legible") == 1 and max(alone.values()) < 0.3 and alone["digits"] < 0.15


def test_clips_without_a_label_have_the_null_label(monkeypatch):
    asked_for = []

    def predict(model, labels, *_):
        asked_for.extend(labels.tolist())
        return lambda x, t, k: x

    monkeypatch.setattr(sample, "make_predict", predict)
    clips = asked.unlabelled(load_weights(SHIPPED / "flow-3.pt"), 2, 0, 5)
    assert asked_for == [10] * 5 and len(clips) == 5 and not torch.equal(clips[0], clips[2])


# ---- variants.py


def test_a_variant_changes_one_thing_and_only_while_it_is_asked_for(tmp_path):
    def draws():
        network, x = small_model(), torch.randn(1, 1, 4, 8, 8, generator=seeded())
        data = train.open_data(train.make_parser().parse_args(["--frames", "4"]))
        return network(x, torch.tensor([0.5]), 1), network(x, torch.tensor([0.5]), 0), data[0][0]

    halved, whole, usual = draws()
    with variants.varied("plain"):
        plain = draws()
    with variants.varied("fast"):
        fast = draws()
    assert torch.equal(plain[1], whole) and torch.equal(plain[2], usual) and not torch.equal(plain[0], halved)
    assert torch.equal(fast[0], halved) and not torch.equal(fast[2], usual)
    assert torch.equal(fast[2][:, :1], usual[:, :1])  # they begin at the same place
    assert all(map(torch.equal, draws(), (halved, whole, usual)))
    losses = {}
    for name in ("plain", "fast"):
        with pytest.raises(SystemExit, match="0"):
            variants.main([name, *TINY, "--steps", "6", "--out", str(tmp_path / name)])
        losses[name] = (tmp_path / name / "metrics.jsonl").read_text()
    assert json.loads(losses["plain"].splitlines()[-1])["loss"] != json.loads(losses["fast"].splitlines()[-1])["loss"]
    assert runs.variant_of("flow-3-plain-seed-2") == "plain" and runs.variant_of("flow-3-seed-2") is None
