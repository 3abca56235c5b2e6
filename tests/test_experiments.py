"""Measuring: what a score means, what a claim trains and writes, what is timed, and how the page is made."""

import base64
import functools
import hashlib
import io
import itertools
import json
import re
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    animation,
    both_modes,
    command,
    fails_with_one_line,
    run_training,
    seeded,
    small_model,
    tables_of,
)
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter

import sample
import train
from checkpoint import SHIPPED, load_weights, make_pyramid
from data import FolderClips, bounce
from experiments import asked, claims, emoji, figures, metrics, real, report, runs, sizes, speed, trust, variants
from experiments.timing import in_milliseconds
from model import Block


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A short run on clips, which are in its folder clips/."""
    folder = tmp_path_factory.mktemp("run")
    for green in (0, 100, 250):
        animation(folder / "clips" / f"{green}.webp", 12, (16, 16), green=green)
    run_training(folder, "--data", str(folder / "clips"), *"--steps 6 --save-interval 2 --held-out 0.3".split())
    return folder


def with_frames_swapped(x: torch.Tensor, count: int) -> torch.Tensor:
    """`count` frames, every second one, change places with those half a clip later."""
    order, half = torch.arange(x.shape[2]), x.shape[2] // 2
    first = torch.arange(0, half, 2)[:count]
    order[first], order[first + half] = first + half, first
    return x[:, :, order]


BLURRED, SCATTERED, NOISY, FROZEN = trust.damages(seeded()).values()  # what damages clips, and how strongly
DAMAGES = {"noisy": (NOISY[0], (0.2, 0.4, 0.8)), "blurred": BLURRED, "scattered": SCATTERED, "frozen": FROZEN}
DAMAGES |= {"swapped": (with_frames_swapped, (1, 2, 4))}


@pytest.fixture(scope="module")
def judged():
    judge = metrics.load_judge()
    return judge, judge.features(metrics.real_clips(0, 1000)), metrics.real_clips(1000, 500)


def test_judge_distance_grows_with_damage_of_every_kind_and_most_where_no_digit_is_left(judged):
    judge, reference, clips = judged
    distance = lambda x: metrics.frechet_distance(judge.features(x), reference)  # noqa: E731
    unharmed, found = distance(clips), {}
    assert unharmed < 0.3  # near zero: the strongest damage is at 3 to 40
    for kind, (damage, strengths) in DAMAGES.items():
        found[kind] = [distance(damage(clips, strength)) for strength in strengths]
        assert all(less < more for less, more in itertools.pairwise([1.2 * unharmed, *found[kind]])), (kind, found)
    assert found["scattered"][-1] > 2 * max(found["noisy"][1], found["blurred"][0])


def test_efficientnet_distance_grows_with_damage_of_every_kind():
    pytest.importorskip("efficientnet_lite_pytorch")
    clips = metrics.real_clips(0, 16)[:, :, :8]  # their own reference: from so few clips others are far away
    features = functools.partial(metrics.picture_features, metrics.load_efficientnet())
    scores = metrics.distances_to(clips, {"distance": features})
    assert scores(clips)["distance"] == pytest.approx(0, abs=1e-3)
    for kind, (damage, (little, *_, much)) in DAMAGES.items():
        distances = [scores(damage(clips, strength))["distance"] for strength in (little, much)]
        assert 0.01 < distances[0] < distances[1], kind


def few_channels() -> nn.Module:
    """In place of an image network."""
    network = nn.Module()
    network._conv_stem, network._bn0, network._swish, network._blocks = nn.AvgPool2d(32), *[nn.Identity()] * 2, []
    return network


def test_quality_takes_the_clips_that_a_run_has_not_seen_or_says_that_it_saw_them(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "load_efficientnet", few_channels)
    labelled, sample_clips = [], metrics.sample_clips
    monkeypatch.setattr(metrics, "labels_like", lambda *inputs: inputs[2:])
    monkeypatch.setattr(metrics, "sample_clips", lambda *ins: labelled.append(ins[7:]) or sample_clips(*ins[:7]))
    content, clips = torch.load(run / "weights.pt", weights_only=True), run / "clips"
    old, all_seen = tmp_path / "old.pt", tmp_path / "all-seen.pt"
    torch.save({name: value for name, value in content.items() if name not in ("held_out", "digest")}, old)
    torch.save(content | {"held_out": 0.0, "digest": FolderClips(clips, 8, 16).digests[0]}, all_seen)
    torch.save(content | {"digest": "another"}, other := tmp_path / "other.pt")
    for paths, note, used in (
        ([run], f"note: {run} kept these clips from training:\n{clips}: 3 files found, 1 used", 1),
        ([all_seen], f"note: {all_seen} saw these clips in training:\n{clips}: 3 files found, 3 used", 3),
        ([run, all_seen], f"note: {run} {all_seen} saw these clips in training:\n{clips}: 3 files", 3),
        ([old], f"{clips}: 3 files found, 3 used", 3),
        ([other], f"note: {other} had other clips in training, or these with another --fps", 3),
    ):
        words = f"quality --data {clips} --checkpoint {' '.join(map(str, paths))} --steps 3 --number 6 --seeds 0"
        metrics.main([*words.split(), "--json", str(tmp_path / "a.json")])
        said, found = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
        ((header, (*made, real)),) = found["tables"]
        assert said.startswith(note) and report.markdown(header, [*made, real]) in said
        assert found["real"] == 4 * used and header == ["", "efficientnet_distance", "flicker"]
        assert len(made) == len(paths) and len({tuple(row[1:]) for row in made}) == 1  # all are the same weights
        assert float(made[0][1]) > 2 * float(real[1]) >= 0
    assert {*labelled} == {((0, 6),)}  # the labels for seed 0 and six clips


def test_quality_of_the_shipped_weights_is_measured(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no runs
    metrics.main("quality --number 3 --reference 20 --seeds 0 5 --steps 3 --batch 2".split())
    header, _, ours, real = capsys.readouterr().out.strip().splitlines()
    assert "judge_distance" in header and "off_track" in header
    assert "flow-3.pt (flow, 3 stages, step 12000)" in ours and real.startswith("| real | ")


def test_i3d_is_given_clips_of_224_pixels_in_three_channels():
    def network(x, **options):
        assert options == {"rescale": False, "resize": False, "return_features": True}
        assert x.shape == (1, 3, 16, 224, 224)
        return x.mean((1, 3, 4))

    clip = metrics.real_clips(0, 1)[0]
    torch.testing.assert_close(metrics.i3d_features(network, clip), clip.mean((0, 2, 3)), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="test_experiments.py is not a TorchScript file"):
        metrics.load_i3d(Path(__file__))


def test_digit_scores_are_near_one_on_real_clips_and_know_what_is_wrong(judged):
    judge, _, clips = judged
    made = [clips, torch.randn(clips.shape, generator=seeded()).clamp(-1, 1), torch.full_like(clips, -1)]
    made += [with_frames_swapped(clips, 4), SCATTERED[0](clips, 1.0)]
    made += [torch.cat([clips[:, :, :8], clips.roll(1, dims=0)[:, :, 8:]], dim=2)]  # another digit from the middle on
    real, noise, black, swapped, scattered, changing = (metrics.digit_scores(judge, each) for each in made)
    assert real.pop("off_track") < 0.5 and swapped["off_track"] > 2 and min(real.values()) > 0.95
    assert noise.pop("off_track") > 2 and max(noise.values()) < 0.01
    assert black["one_digit"] < 0.01 and scattered["one_digit"] < 0.1
    assert swapped["one_digit"] > 0.9 and swapped["straight"] < 0.1
    assert changing["legible"] > 0.95 and changing["one_digit"] < 0.2


def test_distances_flicker_tracks_and_times_are_those_computed_by_hand():
    a = torch.randn(100_000, 3, generator=seeded(), dtype=torch.float64)
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T  # mean 0, covariance 1, exactly
    scale, shift = torch.tensor([1.0, 2, 3]).double(), torch.tensor([1.0, 0, 2]).double()
    assert metrics.frechet_distance(a, a * scale + shift) == pytest.approx(5 + 0 + 1 + 4)
    moving = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert metrics.flicker(moving) == 0 and metrics.flicker(moving % 2) == 4  # of the second difference, squared
    path = bounce(3.0, 1.7, 16, 10.0)
    assert metrics.off_track(path, 10.0) < 0.3
    path[7] += 2.0  # then it is a pixel off the nearest path
    assert 0.7 < metrics.off_track(path, 10.0) < 1.5
    assert in_milliseconds([0.001 * n for n in range(1, 10)]) == "5.0 [3.0, 7.0]"  # median and quartiles
    assert in_milliseconds([0.002]) == "2.0"


def test_a_figure_names_each_system_by_its_colour_and_each_seed_by_its_dash(tmp_path, monkeypatch):
    matplotlib = pytest.importorskip("matplotlib", reason="pip install matplotlib")
    saved = []
    monkeypatch.setattr(figures.figure_class(), "savefig", lambda figure, *_, **__: saved.append(figure))
    points, labels = [(1, [2.0]), (2, [1.0])], ("title", "x", "y", tmp_path / "a.png")
    curves = {f"{name}, seed {seed}": points for seed in (1, 2) for name in ("vanilla", "time")}
    figures.draw_curves(curves, *labels, real=0.5, goals=[1.0, 1.1])
    (legend,), lines = saved[-1].legends, saved[-1].axes[0].get_lines()
    seeds, rest = ["training seed 1", "training seed 2"], ["vanilla at its end, each seed", "real clips"]
    assert [text.get_text() for text in legend.get_texts()] == ["vanilla", "pyramid in time", *seeds, *rest]
    looks = [(line.get_color(), line.get_linestyle()) for line in lines[:4]]
    assert looks == [("C0", "-"), ("C1", "-"), ("C0", "--"), ("C1", "--")]
    figures.draw_curves(dict(list(curves.items())[:3]), *labels)  # one is missing: each has its own name
    assert len(saved[-1].legends[0].get_texts()) == 3
    figures.draw_bars({"time, a": [1.0], "by chance": [2.0]}, *labels[:2], tmp_path / "a.png", 0.5)
    assert [bar.get_facecolor()[:3] for bar in saved[-1].axes[0].patches] == [
        matplotlib.colors.to_rgb(colour) for colour in ("C1", "grey")
    ]


@both_modes
def test_plain_noise_has_the_variance_of_the_paper_s_and_no_noise_has_none(mode):
    x, kinds = torch.zeros(2000, 1, 2, 3, 3, dtype=torch.float64), runs.RENOISING.values()
    paper, plain, half, none = (kind(mode, 3).renoise(x, 1, seeded()) for kind in kinds)
    assert paper.var() == pytest.approx(plain.var().item(), rel=0.03) and none.abs().max() == 0
    pairs = plain.unflatten(2, (2, 2))
    assert abs((pairs[:, :, :, 0] * pairs[:, :, :, 1]).mean()) < 0.03 * plain.var()
    torch.testing.assert_close(half, paper / 2)


@both_modes
def test_alignment_removes_more_variance_in_a_larger_batch_and_none_without_a_choice(mode, monkeypatch):
    assert claims.variance_removed(mode, 1, batch=1, seed=0, clips=64) == 0
    small, large = (claims.variance_removed(mode, 1, batch, seed=0, clips=256) for batch in (2, 64))
    assert 0 < small < large < 0.1
    for name in ("real_clips", "generator_for"):  # with the same clips other noise, and the other way round
        with monkeypatch.context() as patch:
            patch.setattr(claims, name, functools.partial(lambda was, _, *rest: was(0, *rest), getattr(claims, name)))
            assert claims.variance_removed(mode, 1, batch=64, seed=1, clips=256) != large


def test_a_claim_trains_what_it_needs_writes_its_table_and_does_nothing_twice(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    trained = runs.trained  # of the short runs in place of shipped weights
    monkeypatch.setattr(runs, "trained", lambda run, *others: trained(run.removeprefix("shipped-"), *others))
    words = f"renoising --runs {tmp_path}/runs --out {tmp_path} --number 3 --reference 20 --smoke --seeds 0 5"
    claims.main(words.split())
    content, cells = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("renoising", "cells"))
    ((header, rows),) = content["tables"]
    assert content["command"] == f"python -m experiments.claims {words}" and content["torch"] == torch.__version__
    assert len(rows) == 17 and all(len(row) == len(header) for row in rows)
    assert len({tuple(row[1:]) for row in rows}) == 9  # each way its own clips
    assert report.markdown(header, rows) in capsys.readouterr().out
    assert all((tmp_path / f"{name}.png").exists() for name in ("renoising", "renoising-digits"))
    monkeypatch.setattr(runs.subprocess, "Popen", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(runs, "scores_of", lambda *_: pytest.fail("measured again"))
    claims.main(words.split())
    assert json.loads((tmp_path / "cells.json").read_text()) == cells
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        claims.main([*words.split(), "--number", "2"])


def test_a_signal_to_a_command_that_trains_reaches_the_training_which_saves_first(tmp_path):
    words, rows = [*TINY, "--steps", "3000", "--log-interval", "1", "--sample-number", "0"], tmp_path / "metrics.jsonl"
    code = f"from experiments import runs; runs.run_train({words}, runs.Path({str(tmp_path)!r}))"
    with command("-c", code, cwd=ROOT) as process:
        while not rows.exists() or not rows.read_text():
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        _, error = process.communicate(timeout=100)
    assert process.returncode == 1 and "the same command goes on from its checkpoint" in error


def test_a_score_counts_as_long_as_all_weights_that_made_it_are_the_same(tmp_path, monkeypatch):
    for run in ("flow-3-first", runs.LATER):
        (tmp_path / run).write_text(run)
    monkeypatch.setattr(runs, "trained", lambda run, *_: tmp_path / run)
    monkeypatch.setattr(runs, "scores_of", lambda make, *_: {"score": make()})
    args, times = SimpleNamespace(out=tmp_path, number=1, seeds=[0], reference=1), itertools.count()

    def stored():
        return runs.stored("a", "flow-3-first", lambda: next(times), None, args)["score"]

    assert stored() == stored() == 0 and '"machine"' in (tmp_path / "cells.json").read_text()
    for changed, run in enumerate(("flow-3-first", runs.LATER), start=1):  # its own, and those of the later stages
        (tmp_path / run).write_text("new")
        assert stored() == stored() == changed


def test_the_pace_of_a_run_counts_each_stage_as_often_as_it_is_trained(monkeypatch):
    def run_train(words, out):
        assert "--log-interval 1 " in " ".join(words)
        stages = 2, 2, 0, 0, 0, 1, 0, 0, 2
        times = [100, 100, 100, *((4, 2, 1)[k] for k in stages[3:])]  # the first third is slow
        times[6] = 50  # and one step of stage 0 is
        seconds = itertools.accumulate(times)
        losses = [[0.5 if stage == k else None for stage in range(3)] for k in stages]
        rows = [{"seconds": now, "loss_by_stage": each} for now, each in zip(seconds, losses, strict=True)]
        out.mkdir()
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(runs, "run_train", run_train)
    assert runs.seconds_a_step([], 3) == pytest.approx((4 + 2 + 1) / 3)
    assert runs.seconds_a_step(["--stage-odds", "4", "2", "1"], 3) == pytest.approx((4 * 1 + 2 * 2 + 1 * 4) / 7)
    with pytest.raises(ValueError, match="9 steps is too short: it did not train all stages"):
        runs.seconds_a_step(["--stages", "4"], 3)


def test_gains_in_training_time_are_against_vanilla_of_the_same_seed_with_their_range_over_turns(monkeypatch, tmp_path):
    distances = {"flow-1": (8, 4, 2, 1), "flow-1-seed-2": (8, 4, 2, 0.5), "real, digits in turn": [0.2] * 4}
    distances |= {"flow-3": (4, 2, 1, 0.5), "flow-3-seed-2": (0.5, 0.5, 0.5, 0.5)}
    paces, drawn = iter([30 / 19, 1, 30 / 19, 2]), {}  # of 1,900 steps and of 3,000, two turns
    monkeypatch.setattr(claims, "seconds_a_step", lambda words, trial: next(paces))
    found = lambda cell, _: {"judge_distance": [distances[cell.run][cell.percent // 25 - 1]]}  # noqa: E731
    monkeypatch.setattr(claims, "measured", found)
    monkeypatch.setattr(claims, "draw_curves", lambda curves, *_, **__: drawn.update(curves))
    for name in ("draw_clips", "clips_of", "front_row"):
        monkeypatch.setattr(claims, name, lambda *_: [])
    args = SimpleNamespace(repeats=2, smoke=False, seeds=[0], out=tmp_path)
    (_, gains), (_, rows), _ = claims.against_time("a", "", [("flow", "1"), ("flow", "3")], {9: "euler"}, args)
    # it is at vanilla's last distance after three quarters of 3,000 s, or of 6,000 s; vanilla takes 3,000 s
    assert gains == [
        ["flow-1", "1.00 [1.00, 1.00]"], ["flow-3", "1.00 [0.67, 1.33]"],
        ["flow-1-seed-2", "1.00 [1.00, 1.00]"], ["flow-3-seed-2", "at least 3.00 [2.00, 4.00]"],
    ]  # fmt: skip
    assert rows[1] == ["flow-3", "1500", "4500", "4", "2", "1", "0.5"]
    assert drawn["vanilla, seed 1"] == [(750 * n, [value]) for n, value in enumerate((8, 4, 2, 1), 1)]


def test_gains_in_training_work_count_clips_by_their_share_of_a_full_clip(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "draw_curves", lambda *_, **__: None)
    monkeypatch.setattr(claims, "measured", lambda *_: {"judge_distance": [0.2]})
    rows = [["1", "8", "4", "2", "1 [1, 1]"], ["3", "4", "2", "1", "0.5"], ["3-space-time", "2", "2", "2", "2"]]
    runs_of = {"training": "flow-{}", "twice": "flow-{}-twice", "twice-ddim": "ddim-{}-twice"}
    for claim, name in runs_of.items():
        made = [[name.format(system), "ms", "s", *found] for system, *found in rows]
        report.write_json(tmp_path / f"{claim}.json", {"tables": [[], [[], made]]})
    args = SimpleNamespace(out=tmp_path, smoke=False)
    ((_, found),) = claims.work(args)
    assert found[0] == ["flow-1", "1.00", "1.00"] and [row[2] for row in found[2::3]] == ["not reached"] * 3
    steps = [runs.train_options(run, args).steps for run in ("flow-1", "flow-3")]
    whole = steps[1] / steps[0] * (1 / 4 + 1 / 2 + 1) / 3  # vanilla's last distance after three quarters of that
    assert found[1] == ["flow-3", f"{whole:.2f}", f"{1 / (0.75 * whole):.2f}"]
    (tmp_path / "twice.json").unlink()
    with pytest.raises(ValueError, match="twice.json is missing: python -m experiments.claims twice makes it"):
        claims.work(args)
    assert claims.work_of_a_step("flow-3-space-time", args) == pytest.approx((32 / 64 + 16 / 8 + 4) / 3)


def test_every_claim_has_its_table_and_the_pages_are_up_to_date(tmp_path, monkeypatch):
    report.main(["--check"])
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="out of date"):
        old = tmp_path / "README.md"
        old.write_text("as it was")
        patch.setattr(report, "PAGES", dict(zip((old, *[*report.PAGES][1:]), report.PAGES.values(), strict=True)))
        report.main(["--check"])
    for texts in report.PAGES.values():
        prose = re.sub(r"```.*?```|`[^`]*`|\]\(.*?\)|\{\{.*?\}\}", "", texts.read_text(), flags=re.DOTALL)
        assert not re.findall(r"\d+\.\d+|\d+%", prose)  # such numbers stand in the tables
    for claim in (*claims.CLAIMS, "real", "conversion"):
        assert (report.RESULTS / f"{claim}.json").exists(), claim


def test_a_range_on_the_front_page_is_in_order_and_what_no_table_has_or_a_page_leaves_out_is_refused(tmp_path):
    rows, (begin, end) = [["a", "10 [9, 11]"], ["b", "not reached"], ["d", "9.5"], ["e", "9.503"]], report.MARKS
    made_by = report.provenance("experiments.a", [])
    report.write_json(tmp_path / "a.json", made_by | {"tables": [[["run", "gain"], rows], [["y"], [[2]]]]})
    for texts, problem in (
        ("", "leave out the tables of a.json"),
        ("{{a.json 2}}", "which has 2"),
        ("{{b.json}}", "no such file"),
    ):
        with pytest.raises(ValueError, match=problem):
            report.make_page(texts, tmp_path)
    made = report.make_front_page(begin + end, '{{a.json 0 "a | d" gain}}, {{a.json 0 "d | e" gain %}}', tmp_path)
    assert made == f"{begin}9.5 to 10, 950%{end}"
    for number, problem in (
        ("{{a.json 0 c gain}}", "asks for a row of a.json that begins with 'c': there are 0"),
        ('{{a.json 0 "a | b" gain}}', "asks for a range of a.json, and one of its rows says 'not reached'"),
        ("{{a.json 0 b gain %}}", "asks for percent of a.json, and one of its rows says 'not reached'"),
    ):
        with pytest.raises(ValueError, match=problem):
            report.make_front_page(begin + end, number, tmp_path)


def test_a_table_that_is_stopped_while_it_is_written_is_the_one_before(tmp_path, monkeypatch):
    report.write_json(tmp_path / "a.json", {"tables": []})
    monkeypatch.setattr(report.os, "replace", lambda *_: None)
    report.write_json(tmp_path / "a.json", {})
    assert tables_of(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    "module, line, said",
    [
        (speed, "step --json {tmp}/no/a.json", "there is no folder"),
        (metrics, "quality --json /dev/null", "is no file"),
        (speed, "step --json {tmp}/a.pt", "a.pt does not end in .json"),
        (metrics, "quality --number 1", "at least 2"),
        (metrics, "quality --chekpoint a", "did you mean --checkpoint?"),
        (metrics, "quality --xyz a", "; COMMAND --help lists all"),
        (figures, "windows --out {tmp}/a", "a has no ending such as .png"),
        (metrics, "quality --checkpoint {shipped}/flow-3.pt {run}", "give real clips with --data"),  # each is looked at
        (metrics, "quality --checkpoint {shipped}/flow-3.pt {shipped}/flow-1.pt --steps 9 9 9", "flow-1.pt: "),
        (metrics, "quality --data {tmp} --checkpoint {shipped}/flow-3.pt {run}", "another shape"),
        (metrics, "quality --data {run}/clips --checkpoint {run} --fps 0.01", "shorter than"),
        (metrics, "quality --checkpoint {run} --fps 8", "no meaning without --data"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused_at_once(module, line, said, run, tmp_path, capsys):
    words = line.format(tmp=tmp_path, run=run, shipped=SHIPPED).split()
    assert said in fails_with_one_line(capsys, module.main, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["step", "peers"])
def test_benchmark_times_a_run_at_every_stage(what, tmp_path, capsys):
    words = f"{what} --repeats 1 --frames 4 --size 16 --width 8 --depth 1 --heads 1 --batch 2"
    speed.main([*words.split(), "--json", str(tmp_path / "a.json")])
    out, found = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert all(re.search(rf"^\| (ours, stage )?{k} \|", out, re.MULTILINE) for k in range(3))
    assert all(report.markdown(*table) in out for table in found["tables"])
    assert found["command"] == f"python -m experiments.speed {words}"
    assert found["machine"] and found["precision"] in ("bf16", "fp32")


def test_benchmark_compiles_the_network_that_it_samples_with_and_counts_its_flops_as_it_is(monkeypatch):
    counter, words = CompileCounter(), "--out nowhere --batch 2 --frames 4 --width 128".split()
    monkeypatch.setattr(Block, "compile", functools.partialmethod(torch.nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    plain, compiled = (speed.Run(train.parse_args([*words, *flag])[0]) for flag in ([], ["--compile"]))
    for run, compilations in ((plain, 0), (compiled, 1)):
        run.sampling_step(0)
        assert counter.frame_count == compilations
    _, flops = speed.matrix_products(compiled, 0)
    second_attention = 2 * compiled.tokens(0) * 128 * (3 * 128 + 128)
    linear = 4 * (flops / 3 + second_attention)  # the linear layers of four blocks, forward
    assert compiled.tokens(0) == 512 and linear < compiled.forward_flops(0) < 1.2 * linear
    assert counter.frame_count == 1


@pytest.mark.parametrize("line", ["losses {run}", "windows", "stages"])
def test_figures_are_drawn(line, run, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    figures.main([*line.format(run=run).split(), "--out", str(tmp_path / "a.png")])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "it is not the folder of a run" in fails_with_one_line(capsys, figures.main, "losses", tmp_path)


def test_attention_and_training_are_measured_by_size(tmp_path, monkeypatch):
    gigabytes, seconds = sizes.measured_apart("--width 16 --depth 1 --heads 2 --batch 1 --size 16".split(), limit=16)
    assert 0 <= gigabytes < 2 and seconds > 0
    asked = []
    monkeypatch.setattr(sizes, "measured_apart", lambda options, _: asked.append(options) or (0.5, 4.0))
    for what in ("attention", "training"):
        sizes.main([what, "--smoke", "--repeats", "1", "--json", str(tmp_path / f"{what}.json")])
    assert len(tables_of(tmp_path / "attention.json")) == 2
    ((_, rows),) = tables_of(tmp_path / "training.json")
    assert [row[2:] for row in rows] == [[name, *["0.50", "0.25"] * 2] for name in ("vanilla", "time", "space-time")]
    found = map(train.make_parser().parse_args, asked)
    kinds = (1, "time"), (3, "time"), (3, "space-time")
    asked_for = [(each.stages, each.pyramid, each.gradient_checkpointing) for each in found]
    assert asked_for == [(*kind, checkpointed) for kind in kinds for checkpointed in (False, True)]


def test_emoji_of_another_package_than_the_one_that_was_measured_are_refused(tmp_path, monkeypatch, capsys):
    (package, _), *_ = emoji.PACKAGES.items()
    monkeypatch.setattr(emoji.urllib.request, "urlopen", lambda url: io.BytesIO(b"clips"))
    said = fails_with_one_line(capsys, emoji.main, "--out", tmp_path)
    assert f"{package}-1.0.0.tgz is not the file that was measured" in said and not list(tmp_path.iterdir())
    monkeypatch.setitem(emoji.PACKAGES, package, base64.b64encode(hashlib.sha512(b"clips").digest()).decode())
    assert emoji.download(package) == b"clips"


def test_emoji_become_clips_on_white_at_half_the_rate_in_one_part_a_code_point(tmp_path, monkeypatch, capsys):
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as archive:
        for name, count in {"1f300": 72, "1f468-1f3fb": 70, "1f301": 30}.items():  # one is too short
            path, shades = tmp_path / "a.webp", [(3 * n, 0, 0, 255 if n else 0) for n in range(count)]
            first, *rest = (Image.new("RGBA", (256, 256), shade) for shade in shades)
            first.save(path, save_all=True, append_images=rest, duration=42, lossless=True)
            archive.add(path, f"package/assets/{name}.webp")
        archive.add(__file__, "package/README.md")
    monkeypatch.setattr(emoji, "download", lambda name: package.getvalue())
    emoji.main(["--out", str(tmp_path)])
    assert len(list(tmp_path.glob("*/*/*"))) == 2
    said = capsys.readouterr().out
    assert "downloaded 0 MB" in said and "train: 2 clips with 2 labels" in said and "held-out: 0 clips with 0" in said
    with Image.open(tmp_path / emoji.part_of("1f300") / "1f300" / "1f300.webp") as clip:
        assert clip.size == (64, 64) and clip.n_frames == 36 and clip.convert("RGB").getpixel((9, 9)) == (255,) * 3
        clip.seek(5)
        assert clip.convert("RGB").getpixel((9, 9)) == pytest.approx((30, 0, 0), abs=5)
    assert (tmp_path / "train" / "1f468" / "1f468-1f3fb.webp").exists()
    parts = [emoji.part_of(f"1f{number:03x}") for number in range(0x300, 0x700)]
    assert 0.8 < parts.count("train") / 1024 < 0.9 and 0.07 < parts.count("held-out") / 1024 < 0.13


TRAIN = "train --seconds 24 --systems vanilla space-time --options".split()
OPTIONS = "--width 8 --depth 1 --heads 2 --batch 2 --warmup 1 --workers 0 --frames 8 --size 16"
SCORES = "scores --number 2 --steps 3 --reference 4 --sampling-steps 3 6".split()
RUNS, RESULTS = Path("runs/real"), Path("experiments/results")


@pytest.fixture(scope="module")
def scored_runs(tmp_path_factory) -> Iterator[Path]:
    """A folder with clips, tiny runs of two systems with two seeds and their scores, all where experiments.real looks
    for them and puts them."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("real")
    for name in ("train/0", "train/250", "held-out/100", "held-out/150", "settings/50"):
        for file in ("clip.webp", "twin.webp"):
            animation(folder / "data/emoji64" / name / file, 18, (16, 16), green=int(name.split("/")[1]))

    def train_here(words: list[str], out: Path) -> None:  # not in a process of its own
        with pytest.raises(SystemExit, match="0"):
            train.main([*words, "--out", str(out)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "run_train", train_here)
        patch.setattr(real, "seconds_a_step", lambda words, _: 2 if "space-time" in words else 3)
        patch.setattr(train, "HELD_OUT", 2)
        patch.setattr(trust, "load_efficientnet", few_channels)
        with pytest.MonkeyPatch.context() as inside:
            inside.chdir(folder)
            real.main([*TRAIN, OPTIONS])
            real.main(SCORES)
        yield folder


@pytest.fixture
def scored(scored_runs, tmp_path, monkeypatch, capsys) -> None:
    """The test is in a folder of its own with all of that."""
    shutil.copytree(scored_runs, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()


def test_systems_train_in_equal_time_and_go_on_with_the_options_they_began_with_alone(scored, monkeypatch, capsys):
    assert len(list(RUNS.glob("*/weights-*.pt"))) == 4 * 2 * 2  # weights, systems, seeds
    for note in RUNS.glob("*/options.txt"):  # what fits into 24 seconds
        assert f"--steps {12 if 'space-time' in note.parent.name else 8} " in note.read_text()
    words = "train --steps 4 --systems vanilla --training-seeds 1 --runs short --options".split()
    monkeypatch.setattr(real, "seconds_a_step", lambda *_: pytest.fail("these steps were given"))
    real.main([*words, OPTIONS])
    assert "--steps 4 --keep-interval 1" in Path("short/vanilla-seed-1/options.txt").read_text()
    assert Path("short/vanilla-seed-1/weights-4.pt").exists() and "trained for" not in capsys.readouterr().err
    for steps, said in (("8", "was begun with other options"), ("6", "--steps 6 is no multiple of 4")):
        assert said in fails_with_one_line(capsys, real.main, *" ".join(words).replace("4", steps).split(), OPTIONS)
    monkeypatch.setattr(real, "run_train", lambda *_: pytest.fail("trained again"))
    real.main([*TRAIN, OPTIONS])
    capsys.readouterr()
    said = fails_with_one_line(capsys, real.main, *TRAIN, OPTIONS.replace("--width 8", "--width 9"))
    assert "was begun with other options: move it away" in said


def test_systems_are_scored_once_on_clips_held_out_and_drawn(scored, monkeypatch, capsys):
    assert len(list(RESULTS.glob("real-*.png"))) == 4
    before, drawn = json.loads((RESULTS / "real.json").read_text()), {}
    for name in ("draw_curves", "draw_panels"):
        monkeypatch.setattr(real, name, lambda curves, *others, **_: drawn.update({others[-1].stem: curves}))
    real.main(SCORES)
    assert " steps of " not in capsys.readouterr().out and tables_of(RESULTS / "real.json") == before["tables"]
    (_, trained), (_, cost), (_, gains) = before["tables"]
    assert [row[:2] for row in trained[:5:4]] == [["space-time-seed-1", 3], ["space-time-seed-2", 3]]
    assert len(trained) == 4 * 4 + 1 and all(0 <= float(row[4]) <= 1 and "." in row[6] for row in trained[:-1])
    assert [row[1:4:2] for row in cost[:3]] == [["1-1-1", "1.14"], ["5-3-1", "1.45"], ["2-2-2", "2.28"]]
    assert len(cost) == 2 * (3 + 2) and all("[" in row[4] for row in cost) and gains[1][3] == "1.00"
    assert before["options"] == {note.parent.name: note.read_text().strip() for note in RUNS.glob("*/options.txt")}
    cells = json.loads((RESULTS / "real-cells.json").read_text())
    assert len(cells) == 4 * 4 + 2 * len(cost) - 4  # one is known

    def of_both(system: str, way: str) -> list[dict]:
        return [cells[f"{system}-seed-{seed}, weights-{way}: 2 clips, seed 0, 4 real ones"] for seed in (1, 2)]

    ways = "3 steps of euler, names, loss", "6 steps of euler", "3 steps of ab2"
    three, six, ab2 = ([found["distance"] for found in of_both("vanilla", f"8.pt, {way}")] for way in ways)
    assert len({*three, *six, *ab2}) == 6
    assert [values for _, values in drawn["real-sampling"]["vanilla, euler"]] == [three, six]
    assert drawn["real-training"]["vanilla"][-1][1] == three and list(drawn["real-losses"]) == ["space-time", "vanilla"]
    losses = [found["losses"] for found in of_both("space-time", f"12.pt, {ways[0]}")]
    shown = drawn["real-losses"]["space-time"]
    assert [shown[f"stage {k}"][-1][1] for k in range(3)] == [list(each) for each in zip(*losses, strict=True)]


def test_a_score_is_kept_with_its_loss_alone_and_as_long_as_weights_and_clips_are_the_same(scored, monkeypatch, capsys):
    shutil.copy(RUNS / "vanilla-seed-1/weights-2.pt", RUNS / "vanilla-seed-2/weights-4.pt")
    real.main(SCORES)
    (again,) = (line for line in capsys.readouterr().out.splitlines() if " steps of " in line)
    assert "vanilla-seed-2/weights-4.pt" in again
    monkeypatch.setattr(train, "held_out_loss", lambda *_: None)
    cells = (RESULTS / "real-cells.json").read_text()
    anew = "a held-out loss cannot be measured"
    for other in ("--seed 1", "--number 3", "--reference 3"):
        assert anew in fails_with_one_line(capsys, real.main, *SCORES, *other.split())
    monkeypatch.setattr(trust, "METRICS", 0)
    assert anew in fails_with_one_line(capsys, real.main, *SCORES)
    assert (RESULTS / "real-cells.json").read_text() == cells


def test_the_pace_of_systems_is_measured_in_turn_and_counts_in_place_of_their_seconds(scored, monkeypatch, capsys):
    paces, found = RESULTS / "real-pace.json", iter([2, 4, 3, 5])
    monkeypatch.setattr(real, "seconds_a_step", lambda *_: next(found))
    real.main("pace --repeats 2".split())
    assert tables_of(paces)[0][1] == [["space-time", "2.5", "2", "3"], ["vanilla", "4.5", "4", "5"]]
    made, options = paces.read_text(), (RUNS / "vanilla-seed-1/options.txt").read_text()
    changes = ("vanilla", "space"), ("seconds", "hours"), ("4.5", "x"), ("--width 8", "--width 9")
    for old, new in (*changes, (made, "[]"), (made, "?")):
        Path("other.json").write_text(made.replace(old, new))
        said = fails_with_one_line(capsys, real.main, *SCORES, "--paces", "other.json")
        assert "other.json has no pace of" in said
    for name, new, complaint in (
        ("vanilla-seed-3", options.replace("--width 8", "--width 9"), "another run of vanilla have other options"),
        ("vanilla-seed-1-old", options, "is not named SYSTEM-seed-NUMBER"),
    ):
        (RUNS / name).mkdir()
        (RUNS / name / "options.txt").write_text(new)
        assert complaint in fails_with_one_line(capsys, real.main, "pace")
        shutil.rmtree(RUNS / name)
    assert "holds no runs" in fails_with_one_line(capsys, real.main, *"pace --runs data".split())
    assert paces.read_text() == made
    real.main([*SCORES, "--paces", str(paces)])
    (_, trained), _, (_, gains) = tables_of(RESULTS / "real.json")
    assert [row[2] for row in trained[:9:4]] == ["8", "8", "9"] and [row[1] for row in gains] == ["30", "36"]


def test_choices_of_options_are_compared_on_clips_of_their_own(scored, capsys):
    a, b = (shutil.copytree(RUNS, f"runs/settings/{choice}") for choice in "ab")
    shutil.copy(f"{b}/vanilla-seed-1/weights-2.pt", f"{b}/vanilla-seed-1/weights-8.pt")
    Path(b, "space-time-seed-2/weights-12.pt").unlink()
    for _ in range(2):
        real.main("settings --number 2 --steps 3 --reference 4".split())
        said = capsys.readouterr()
    assert " steps of " not in said.out and "b/space-time-seed-2 is passed over" in said.err
    made, cells = (json.loads((RESULTS / f"real-{name}.json").read_text()) for name in ("settings", "cells"))
    ((_, rows),) = made["tables"]
    runs = ["space-time-seed-1"] * 2 + ["space-time-seed-2"] + ["vanilla-seed-1"] * 2 + ["vanilla-seed-2"] * 2
    assert [row[0] for row in rows] == [*runs, "real training clips"]
    assert [row[1] for row in rows] == [*"abaabab", ""]
    options = Path(a, "vanilla-seed-1/options.txt").read_text().strip()
    assert len(made["options"]) == 7 and made["options"]["b/vanilla-seed-1"] == options
    last = {name: cell["distance"] for name, cell in cells.items() if "weights-8.pt, 3 steps of euler" in name}
    found = {name.partition(", weights")[0]: distance for name, distance in last.items()}
    assert len({found[f"{choice}, vanilla-seed-{seed}"] for choice in "ab" for seed in (1, 2)}) == 3  # two are the same
    assert found["a, vanilla-seed-1"] != found["vanilla-seed-1"]  # of other clips
    said = fails_with_one_line(capsys, real.main, *f"settings --number 2 --runs {RUNS}".split())
    assert "CHOICE holds no finished runs" in said
    real.main("settings --number 2 --reference 4 --splits 2-1-1 1-1-1".split())
    ((header, rows),) = tables_of(RESULTS / "real-settings.json")
    assert (
        header[4:] == ["sampling steps", "solver", "distance"] and len(rows) == 3 * 4 + 4 + 1
    )  # of three stages, of one
    ways = [["2-1-1", "euler"], ["2-1-1", "ab2"], ["1-1-1", "euler"], ["1-1-1", "ab2"]]
    assert [row[4:6] for row in rows[:4]] == ways
    capsys.readouterr()
    assert "2 stages, which no run has" in fails_with_one_line(capsys, real.main, "scores", "--splits", "2-1")
    shutil.rmtree(b)
    said = fails_with_one_line(capsys, real.main, "settings", "--splits", "2-1-1-1")
    assert "--splits 2-1-1-1 is for 4 stages, which no run has" in said


def test_damaged_clips_and_samples_have_a_row_each_by_their_distance_and_by_their_names(scored):
    weights = RUNS / "vanilla-seed-1/weights.pt"
    real.main(f"distance --number 2 --steps 3 --checkpoint {weights}".split())
    ((_, rows),) = tables_of(RESULTS / "distance.json")
    assert rows[0][0] == "none" and rows[-1][0] == f"samples of {weights}" and len(rows) == 15
    real.main(f"names --number 4 --batch 4 --checkpoint {weights}".split())
    ((_, rows),) = tables_of(RESULTS / "names.json")
    assert rows[0][0] == "real training clips" and len(rows) == 17
    assert (RESULTS / "distance.png").exists() and (RESULTS / "names.png").exists()


def test_a_clip_is_named_after_the_nearest_file_but_its_own(tmp_path):
    for name, green in {"cat/a": 0, "cat/b": 40, "dog/a": 50, "dog/b": 250}.items():
        animation(tmp_path / f"{name}.webp", 8, (8, 8), green=green, lossless=True)
    known = FolderClips(tmp_path, 8, 8, labels=True)
    named = metrics.naming(known, lambda clip: clip.mean((1, 2, 3)), torch.device("cpu"))
    clips, labels = torch.stack([known.window(source, 0) for source in known.sources]), torch.tensor([0, 0, 1, 1])
    assert named(clips, labels) == ["1.000", "0"] and named(clips, 1 - labels)[0] == "0.000"
    # but for its own file, cat/b is nearest to dog/a, and dog/a to both cats
    assert named(clips, labels, torch.arange(4)) == ["0.500", "0.5"]


def test_samples_that_repeat_training_clips_are_found(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    for name in ("train/0/a", "train/250/a", "train/0/b", "held-out/100/a", "settings/50/a"):
        green = int(name.split("/")[1]) + 200 * name.endswith("b")
        animation(tmp_path / f"{name}.webp", 18, (64, 64), green=green, lossless=True)
    copied = metrics.real_clips(0, 3, FolderClips(tmp_path / "train", 16, 64))
    weights = SimpleNamespace(frames=16, size=64, classes=("0", "250"))
    monkeypatch.setattr(trust, "load_weights", lambda *_: weights)
    monkeypatch.setattr(trust, "sampled", lambda _, labels, *__, **___: copied[: len(labels)])
    real.main(f"copies --data {tmp_path} --number 3 --out {tmp_path}".split())
    ((_, (samples, real_ones, held_out)),) = tables_of(tmp_path / "copies.json")
    assert max(map(float, samples[1:])) < 0.001 and min(map(float, held_out[1:])) > 0.1
    assert min(map(float, real_ones[1:])) > 0.1 and (tmp_path / "copies.png").exists()  # not from itself
    assert [samples[0], held_out[0]] == ["samples", "held-out clips of other labels"]


def test_gains_compare_means_over_the_seeds_at_the_end_and_in_time():
    def run(*distances: float, first: int = 25) -> list[tuple]:
        return [(first + 25 * n, distance) for n, distance in enumerate(distances)]

    systems = {"vanilla": [run(8, 4, 2, 1.5, first=15), run(8, 4, 2, 0.5, first=35)], "fast": [run(4, 2, 0.25, 0.25)]}
    systems |= {"slow": [run(9, 8, 7, 6)], "at once": [run(1, 1, 1, 1)]}
    curves = {name: real.over_seeds(runs, float) for name, runs in systems.items()}
    _, rows = real.gains(curves)
    assert [row[3] for row in rows] == ["1.00", "0.25", "6.00", "1.00"]
    # the fast one is at vanilla's last distance, 1, after a third of the logarithm from 2 to 1/4
    assert [row[4] for row in rows] == ["1.00", "0.58", "not reached", "at most 0.25"]
    assert real.gains({"fast": curves["fast"]})[1] == []


def test_coarse_to_fine_returns_the_clips_of_a_network_that_knows_them(monkeypatch):
    clip = metrics.real_clips(3, 1)[:, :, ::4].repeat_interleave(4, dim=2)  # the same at every rate
    begun = {}

    def predict(x, t, k):
        time, known = t.view(-1, 1, 1, 1, 1), clip[:, :, :: 2**k]
        begun.setdefault(k, (t[0].item(), ((x - (1 - time) * known) / time).square().mean().item()))
        return (x - known) / time

    monkeypatch.setattr(sample, "make_predict", lambda *_: predict)
    for shift in (1, 3):
        made = asked.coarse_to_fine(load_weights(SHIPPED / "flow-1.pt"), shift, 9, 3, 0, 3)
        torch.testing.assert_close(made, clip.expand_as(made), rtol=1e-3, atol=1e-3)
        times, noises = zip(*(begun.pop(k) for k in (2, 1, 0)), strict=True)
        expected = [1.0, *(shift * end / (1 + (shift - 1) * end) for end in (2 / 3, 1 / 3))]
        assert times == pytest.approx(expected) and noises == pytest.approx([1, 1, 1], abs=0.05)


def test_the_bars_of_early_training_are_of_half_of_both_runs(monkeypatch):
    drawn, args = {}, SimpleNamespace(seeds=[0], smoke=False, out=Path())
    monkeypatch.setattr(claims, "clips_of", lambda *_: torch.zeros(8, 1, 4, 2, 2))
    monkeypatch.setattr(claims, "draw_clips", lambda *_: None)
    monkeypatch.setattr(claims, "measured", lambda cell, _: {"legible": [cell.percent], "flicker": [2.0]})
    monkeypatch.setattr(claims, "draw_cells", lambda cells, _, metric, name, __: drawn.update({name: (cells, metric)}))
    ((_, rows),) = claims.early(args)
    cells, (metric, _) = drawn["early-legible"]
    assert rows[0] == ["flow-3", "25", "50", "1", "1"] and len(rows) == 8 and metric == "legible"
    assert cells["time, flow"] == [runs.Cell(f"flow-3{seed}", 9, percent=50) for seed in ("", "-seed-2")]


def test_draws_of_real_clips_are_scored_for_every_seed_and_are_not_those_of_the_reference(monkeypatch):
    made, args = [], SimpleNamespace(number=12, seeds=[0, 1, 2], reference=50, out=Path())

    def measured(cell, options):
        assert options.number == 12
        system = {"shipped-flow-1": 2, "shipped-flow-3": 1}[cell.run]
        return {"judge_distance": [system * (10 - cell.steps) + seed for seed in (0, 4, 8)], "off_track": [2.0] * 3}

    def stored(name, run, make, _metrics, options):
        clips = metrics.other_clips(50, 1, options.number, in_turn="turn" in name)
        made.append((run, options.number, torch.equal(make(1, options.number), clips)))
        return {"judge_distance": [3.0, 1.0, 2.0], "off_track": [0.5] * 3}

    monkeypatch.setattr(asked, "stored", stored)
    monkeypatch.setattr(asked, "draw_curves", lambda *_, **__: None)
    monkeypatch.setattr(asked, "measured", measured)
    (header, rows), (_, again), (_, sampled) = asked.draws(args)
    assert made == 2 * [("real", number, True) for number in (12, 6, 3)] and rows == again
    assert [row[:5] for row in rows] == [[number, 3, "2", "1", "3"] for number in (12, 6, 3)] and len(header) == 6
    assert sampled[0][:5] == ["pyramid, 9 steps", 3, "5", "1", "9"] and len(sampled) == 6
    assert sampled[1][:5] == ["vanilla, 9 steps", 3, "6", "2", "10"]
    assert sampled[-1][:5] == ["vanilla minus pyramid, 3 steps", 3, "7", "7", "7"]


def test_real_clips_of_digits_in_turn_are_new_and_of_each_digit():
    labels = [metrics.REAL[number][1] for number in range(200)]
    expected = torch.stack([metrics.REAL[labels.index(label, 50)][0] for label in range(10)])
    assert torch.equal(metrics.other_clips(50, 0, 12)[:10], expected)
    assert all(len(metrics.other_clips(50, seed, 2)) == 2 for seed in range(20))  # also if a digit is late
    assert torch.equal(metrics.other_clips(50, 3, 2, in_turn=False), metrics.real_clips(56, 2))
    args = SimpleNamespace(reference=50)
    assert torch.equal(runs.clips_of(runs.IN_TURN, args, 1, 12), metrics.other_clips(50, 1, 12))
    assert torch.equal(runs.clips_of(runs.RANDOM, args, 1, 12), metrics.real_clips(62, 12))


def test_traits_are_read_and_compared_with_those_of_real_clips():
    real, fresh = metrics.real_clips(0, 300), metrics.real_clips(1000, 300)
    labels, y, _ = zip(*(metrics.REAL.tracks(number)[0] for number in range(300)), strict=True)
    traits = asked.traits(real)
    assert (traits["digits"] == torch.tensor(labels)).double().mean() > 0.98
    low = torch.tensor([each[8] > 6 for each in y])  # of 0 to 12
    assert ((traits["places"] >= 8) == low).double().mean() > 0.9
    own, others, alone = (asked.overlaps(clips, 300) for clips in (real, fresh, fresh[:1].expand_as(fresh)))
    assert min(own.values()) > 0.999 and min(others.values()) > 0.75
    assert alone.pop("legible") == 1 and max(alone.values()) < 0.3 and alone["digits"] < 0.15


def test_clips_without_a_label_have_the_null_label():
    weights = load_weights(SHIPPED / "flow-3.pt")
    expected = sample.generate(weights, make_pyramid(weights), torch.full((3,), 10), 3, 9)
    torch.testing.assert_close(asked.unlabelled(weights, 2, 0, 3), expected, rtol=0, atol=1e-3)


def test_a_variant_changes_one_thing_and_only_while_it_is_asked_for(tmp_path):
    def draws():
        network, x = small_model(), torch.randn(1, 1, 4, 8, 8, generator=seeded())
        clip, _ = train.open_data(train.make_parser().parse_args(["--frames", "4"]))[0]
        return network(x, torch.tensor([0.5]), 1), network(x, torch.tensor([0.5]), 0), clip[:, 1:], clip[:, :1]

    usual, losses = draws(), set()
    cases = {"plain": [False, True, True, True], "fast": [True, True, False, True]}
    for name, same in (cases | {"first": [True] * 4}).items():
        with variants.varied(name):
            assert [torch.equal(*pair) for pair in zip(draws(), usual, strict=True)] == same
        with pytest.raises(SystemExit, match="0"):
            variants.main([name, *TINY, "--steps", "6", "--out", str(tmp_path / name)])
        row = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
        losses.add(row["loss"])
        assert name != "first" or [loss is None for loss in row["loss_by_stage"]] == [True, True, False]
    assert all(map(torch.equal, draws(), usual)) and len(losses) == 3
    with pytest.raises(ValueError, match="not of this version"):  # sample.py would place frames wrongly
        load_weights(tmp_path / "plain" / "weights.pt")
    with variants.varied("plain"):
        assert load_weights(tmp_path / "plain" / "weights.pt").step == 6
    assert runs.variant_of("flow-3-plain-seed-2") == "plain" and runs.variant_of("flow-3-seed-2") is None


def test_samples_beside_a_folder_s_clips_have_its_labels_as_often_as_it_has_them(tmp_path):
    for name in ("cat/1", "cat/2", "cat/3", "dog/1"):
        animation(tmp_path / f"{name}.gif", 8)
    known, other = (SimpleNamespace(classes=classes) for classes in (("ant", "cat", "dog"), ("cat",)))
    one, two = (metrics.labels_like(FolderClips(tmp_path, 8), known, seed, 8).tolist() for seed in (0, 3))
    assert sorted(one) == sorted(two) == [1] * 6 + [2] * 2 and one != two
    assert metrics.labels_like(FolderClips(tmp_path, 8), other, 0, 8) is None
    animation(tmp_path / "loose.gif", 8)
    assert sorted(metrics.labels_like(FolderClips(tmp_path, 8), known, 0, 4).tolist()) == [1, 1, 1, 2]
    assert metrics.labels_like(FolderClips(tmp_path / "cat", 8), known, 0, 4) is None
