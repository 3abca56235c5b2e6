"""What the pages promise, and how the files of the core know of each other."""

import argparse
import ast
import json
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import torch
from conftest import ROOT, pages, tables_of

import tpdiff
import train
from checkpoint import SHIPPED, load_weights
from examples.families import COGVIDEOX, WAN
from experiments import emoji
from experiments.claims import time_to
from test_tpdiff import KNOWN_ERRORS, covariance_error

RESULTS = ROOT / "experiments/results"
# From the bottom up: a file may import any file before it; those of ALLOWED, only the files named there.
CORE = ["tpdiff", "model", "cli", "video", "data", "checkpoint", "sample", "train"]
ALLOWED = {"model": set(), "cli": set(), "video": {"cli"}, "data": {"cli", "video"}}
ALLOWED |= {"checkpoint": {"tpdiff", "model", "cli", "data"}}


def imports(path: Path, inner: bool = True) -> set[str]:
    """The first names of all modules that a file imports, with or without those inside of functions."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if inner else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def test_the_core_has_these_files_alone_none_imports_upward_and_tpdiff_needs_torch_and_scipy_alone():
    files = {path.stem for path in ROOT.glob("*.py")}
    assert files == {*CORE, "test_tpdiff"}
    of_ours = files | {path.parent.name for path in ROOT.glob("*/*.py")}
    for index, name in enumerate(CORE):
        known = imports(ROOT / f"{name}.py") & of_ours
        assert known <= ALLOWED.get(name, set(CORE[:index])), (name, known)
    assert imports(ROOT / "tpdiff.py", inner=False) - sys.stdlib_module_names == {"torch", "scipy"}
    assert imports(ROOT / "tpdiff.py") - sys.stdlib_module_names <= {"torch", "scipy", "tqdm"}  # tqdm to show progress
    needed_by_tests = imports(ROOT / "test_tpdiff.py") - sys.stdlib_module_names
    assert needed_by_tests <= {"tpdiff", "torch", "numpy", "pytest", "hypothesis"}
    settings = (ROOT / "pyproject.toml").read_text()  # what pip installs
    (needs,) = re.findall(r"^dependencies = (.*)$", settings, re.MULTILINE)
    assert re.findall(r'"(\w+)', needs) == ["torch", "scipy"] and 'py-modules = ["tpdiff"]' in settings


def test_every_equation_of_the_paper_has_its_code_and_its_test():
    text = (ROOT / "COMPANION.md").read_text().split("## Where this departs")[0]
    headings = " ".join(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert {"1", "2"} <= set(re.findall(r"Algorithm (\d)", headings))
    assert all(name in headings for name in ("10'", "15' and 16'", "Any number of frames", "Time shift"))
    tags = re.findall(r"\\tag\{(.+?)\}", text)
    assert tags == [*map(str, range(1, 25)), "10'", "15'", "16'"]
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        assert "`test_" in section and "```math" in section, section
        assert "```python" in section or section.startswith("Eq. 17"), section


def test_every_line_of_code_on_the_companion_s_pages_is_in_the_function_named_before_it():
    text = (ROOT / "COMPANION.md").read_text()
    blocks = re.findall(r"In `([\w.]+)`(?: of \[([\w.]+)\]\(\S+\))?:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python") > 12
    for name, file, lines in blocks:
        source = (ROOT / (file or "tpdiff.py")).read_text()
        node = ast.parse(source)
        for part in name.split("."):
            node = next(each for each in ast.walk(node) if getattr(each, "name", None) == part)
        inside = [line.strip() for line in source.splitlines()[node.lineno - 1 : node.end_lineno]]
        shown = [line.strip() for line in lines.splitlines()]
        assert "\n".join(["", *shown, ""]) in "\n".join(["", *inside, ""]), (name, lines)


def test_no_line_cuts_a_span_of_code_or_a_formula_in_two():
    """A line that begins in the middle of one could be taken for a list: `a` times `b` where the star comes first."""
    for name, text in pages().items():
        text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        cut = [line for line in text.splitlines() if line.count("`") % 2 or line.count("$") % 2]
        assert not cut, (name, cut)
        assert not re.findall(r"^\s*\d+[.)](?:\s|$)", text, re.MULTILINE), name  # no number that ends a sentence


def parsers_of(module: str) -> list[argparse.ArgumentParser]:
    """A command's parser, and those of its sub-commands."""
    parser = import_module(module).make_parser()
    choices = [action.choices for action in parser._actions if action.nargs == argparse.PARSER]
    return [parser, *(choices[0].values() if choices else ())]


def commands() -> dict[str, list[argparse.ArgumentParser]]:
    """The parsers of all commands, by how python is told of the command."""
    files = [path for path in ROOT.glob("e*s/*.py") if "def make_parser" in path.read_text()]
    assert len(files) >= 11
    modules = [f"{path.parent.name}.{path.stem}" for path in files]
    found = {f"{name}.py": parsers_of(name) for name in ("train", "sample")}
    return found | {f"-m {name}": parsers_of(name) for name in modules}


def test_every_option_that_the_pages_name_is_one_of_a_command():
    text = "\n".join(page for name, page in pages().items() if name != "CHANGELOG.md")  # that has old ones
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", re.sub(r"<!--|\]\(\S+\)", "", text)))
    known = {word for each in commands().values() for parser in each for word in parser._option_string_actions}
    unknown = named - known - {"--nproc_per_node"}
    assert len(named) > 40 and not unknown, unknown


def test_every_help_ends_with_an_example_of_the_command_that_asks_for_it():
    for name, parsers in commands().items():
        for each in parsers:
            first, *_, last = each.format_help().splitlines()
            assert first.startswith(f"usage: python {name} ")
            assert last.startswith("example: ") and f" {name}" in last, (name, each.prog)
            parsers[0].parse_args(shlex.split(last.partition(name)[2]))  # all that the command needs stands there


def test_every_test_method_and_file_that_the_pages_name_or_link_exists_and_the_version_in_the_changelog():
    assert re.search(rf"^#+ .*\b{re.escape(tpdiff.__version__)}\b", pages()["CHANGELOG.md"], re.MULTILINE)
    text = "\n".join(pages().values())
    tests = "".join(path.read_text() for path in [ROOT / "test_tpdiff.py", *(ROOT / "tests").glob("test_*.py")])
    named, methods = set(re.findall(r"`(test_\w+)`", text)), set(re.findall(r"`Pyramid\.(\w+)", text))
    assert len(named) > 20 and not named - set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    assert len(methods) > 1 and not {name for name in methods if not hasattr(tpdiff.Pyramid, name)}
    run = re.findall(r"\bpython (\w+\.py)|python -m (experiments\.\w+)", text)
    files = {ROOT / (script or module.replace(".", "/") + ".py") for script, module in run}
    link = r"(?:\]\(|src=\")([^)#\s\"]+)"
    links = [(page, found) for page, text in pages().items() for found in re.findall(link, text)]
    files |= {(ROOT / page).parent / link for page, link in links if ":" not in link}
    assert len(files) > 10 and not {file for file in files if not file.exists()}


def test_every_link_to_a_heading_finds_one_and_the_front_page_is_short():
    def places(page: Path) -> set[str]:  # as GitHub names them
        headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    count = 0
    for name, text in pages().items():
        for file, place in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", text):
            assert place in places((ROOT / name).parent / file if file else ROOT / name), (name, file, place)
            count += 1
    front = pages()["README.md"]
    assert count > 30 and len(front.split()) <= 1900 and front.count("\n") <= 230
    assert len(re.findall(r"^\| ---", front, re.MULTILINE)) <= 3


def in_one_line(page: str) -> str:
    return " ".join((ROOT / page).read_text().split())


def test_the_front_page_s_numbers_of_the_shipped_emoji_model_are_those_of_its_weights_and_its_log():
    weights, front = load_weights(SHIPPED / "emoji.pt"), in_one_line("README.md")
    last = json.loads((RESULTS / "emoji/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == weights.step and 210 < last["seconds"] < 270
    size = sum(each.numel() for each in weights.model.parameters()) / 1e6
    assert f"a model of {size:.1f} million parameters, trained for four minutes on one GPU" in front
    assert f"({len(weights.classes)} labels)" in front and f"--steps {weights.step} " in front


def test_the_front_page_s_other_numbers_by_hand_are_those_of_the_code_and_of_the_measured_steps():
    front, steps, minutes = in_one_line("README.md"), train.make_parser().parse_args([]).steps, []
    for name in ("step", "fp32-step"):
        header, rows = tables_of(RESULTS / f"speed/{name}.json")[0]
        minutes.append(steps * float(rows[-1][header.index("ms [quartiles]")]) / 60e3)
    assert "Two CPU cores take [{:.0f} to {:.0f} minutes]".format(*minutes) in front
    assert "downloads 550 MB" in front and "Some 550 MB are downloaded" in emoji.__doc__
    assert "for Wan over five seconds, CogVideoX six)" in front
    assert 5 < WAN.frames / WAN.fps < 5.1 and 6 < COGVIDEOX.frames / COGVIDEOX.fps < 6.2
    header, rows = tables_of(RESULTS / "training.json")[1]
    pace = {row[0]: float(row[header.index("ms a step")]) for row in rows}
    same = [pace[name] / pace[name.replace("flow", "ddim")] for name in ("flow-1", "flow-3", "flow-3-space-time")]
    most = max(max(ratio, 1 / ratio) for ratio in same)  # the same work, measured twice
    assert "digits may be wrong by a fifth or more" in front and 1.15 < most < 1.25


def test_what_the_pages_say_by_hand_of_two_hours_of_training_is_in_their_tables():
    page = in_one_line("experiments/README.md")
    (_, runs), (_, ways), (_, ends) = tables_of(RESULTS / "two-hours/real.json")
    seconds = {row[0]: float(row[1]) for row in ends}
    assert "space trains a tenth longer than vanilla" in page and round(seconds["space"] / seconds["vanilla"], 1) == 1.1
    assert sum(row[0].startswith("space-seed") for row in runs) == 4
    thirty = {row[0]: row[4] for row in ways if row[1] in ("30", "10-10-10") and row[2] == "euler"}
    vanilla, least, most = map(int, re.findall(r"\d+", thirty["vanilla"]))  # of two training seeds
    assert "With thirty it differs from vanilla less than two training seeds do" in page
    assert vanilla - int(thirty["time"].split()[0]) < most - least
    one, other = (int(row[3]) for row in runs if row[0].startswith("space-time") and row[1] == 1691)
    assert "two seeds of the pyramid differ by ninety" in page and one - other == 90


def test_what_the_results_say_by_hand_of_chosen_batch_and_rate_is_in_their_tables():
    page, (runs, (_, ways), (_, ends)) = in_one_line("experiments/README.md"), tables_of(RESULTS / "tuned/real.json")
    calls, far = ({" ".join(row[:3]): float(row[number]) for row in ways} for number in (3, 4))
    ours, cheap, vanilla = "space-time 10-10-10 euler", "space-time 2-2-2 euler", "vanilla 30 euler"
    with_nine, time = (float(ends[0][number]) for number in (3, 4))
    assert ends[0][0] == "space-time" and ends[1][3] == "1.00"
    assert "With nine Euler steps its distance is two thirds of vanilla's. With thirty it is four fifths." in page
    assert 0.64 < with_nine < 0.69 and 0.77 < far[ours] / far[vanilla] < 0.83
    assert "a little more than half of vanilla's time, as with B = 4. With 2-2-2 Euler steps, for a thirteenth" in page
    assert 0.5 < time < 0.6 and far[cheap] < far[vanilla] and round(calls[vanilla] / calls[cheap]) == 13
    for folder in ("two-hours", "tuned", "plain"):
        found = {" ".join(row[:3]): float(row[4].split()[0]) for row in tables_of(RESULTS / folder / "real.json")[1][1]}
        assert "15 steps of `ab2`" in page and found["vanilla 15 ab2"] <= found[vanilla]
    *_, (_, untuned) = tables_of(RESULTS / "two-hours/real.json")
    shares = {row[0]: row[4] for row in untuned}
    (distance, seconds) = next((float(row[2].split()[0]), float(row[1])) for row in untuned if row[0] == "vanilla")
    tuned = [(float(row[2]), [float(row[3])]) for row in runs[1] if row[0] == "vanilla-seed-1"]
    assert "Tuned, vanilla needs three quarters of the time that it needs with B = 4 to the same distance" in page
    assert shares["time"] == shares["space"] == "0.75" and abs(time_to(distance, tuned) / seconds - 0.75) < 0.02


def test_what_the_results_say_by_hand_of_three_systems_on_one_machine_is_in_their_tables():
    page, tables = in_one_line("experiments/README.md"), tables_of(RESULTS / "plain/real.json")
    (_, (_, ways), (_, ends)), (_, _, (_, above)) = tables, tables_of(RESULTS / "tuned/real.json")
    calls, far = ({" ".join(row[:3]): float(row[number]) for row in ways} for number in (3, 4))
    seconds, distance, of_vanilla, share = (
        {row[0]: float(row[n]) for row in ends if "not" not in row[n]} for n in range(1, 5)
    )
    thirty = far["vanilla 30 euler"]
    assert list(seconds) == ["space-time", "time", "vanilla"] and "A step of time takes about as long as one of" in page
    assert abs(seconds["time"] / seconds["vanilla"] - 1) < 0.03
    assert "space-time (run 6% longer)" in in_one_line("README.md")
    assert round(100 * seconds["space-time"] / seconds["vanilla"] - 100) == 6
    assert (
        "the distance of space-time is nearly two thirds of vanilla's, that of time four fifths. With thirty it is"
        in page
    )
    assert 0.6 < of_vanilla["space-time"] < 0.66 and 0.78 < of_vanilla["time"] < 0.83
    assert "nearly four fifths for space-time, nine tenths for time" in page
    assert 0.75 < far["space-time 10-10-10 euler"] / thirty < 0.8
    assert 0.88 < far["time 10-10-10 euler"] / thirty < 0.92
    assert "time needs two thirds of vanilla's time (B = 4: three quarters), space-time three fifths" in page
    assert 0.65 < share["time"] < 0.69 and 0.57 < share["space-time"] < 0.62
    assert all(abs(float(row[4]) - share[row[0]]) < 0.06 for row in above if row[0] == "space-time")
    assert (
        "7-7-1 steps, a fifteenth, the clips of space-time are farther away; with 2-2-2, a thirteenth, they are" in page
    )
    for solver in ("euler", "ab2"):
        assert far[f"space-time 7-7-1 {solver}"] > thirty > far[f"space-time 2-2-2 {solver}"]
    cost = {steps: calls["vanilla 30 euler"] / calls[f"space-time {steps} euler"] for steps in ("7-7-1", "2-2-2")}
    assert round(cost["7-7-1"]) == 15 and round(cost["2-2-2"]) == 13
    assert "5-3-1 steps of `ab2`, an eighth, are as near" in page
    assert round(calls["vanilla 30 euler"] / calls["time 5-3-1 ab2"]) == 8
    assert abs(far["time 5-3-1 ab2"] / thirty - 1) < 0.02
    solvers = [(name, name.replace("euler", "ab2")) for name in far if "euler" in name and "1-1-1" not in name]
    named = {row[0]: round(96 * float(row[4])) for row in tables[0][1][3:12:4]}
    before = [float(row[4]) for row in tables_of(RESULTS / "two-hours/real.json")[0][1] if row[0].startswith("time")]
    assert "four against nine of 96 clips, and hardly above vanilla's three" in page
    assert named == {"space-time-seed-2": 51, "time-seed-1": 4, "vanilla-seed-2": 3}
    assert tables_of(RESULTS / "tuned/real.json")[0][1][3][4] == "0.531"  # 51 of 96
    assert [round(96 * share) for share in before[3::4]] == [9, 9]
    assert (
        "lower distances than Euler for time and vanilla, and a higher one for space-time with 10-10-10 steps" in page
    )
    assert all(far[second] < far[first] for first, second in solvers if "space" not in first)
    assert far["space-time 10-10-10 ab2"] > far["space-time 10-10-10 euler"]
    last = next(float(row[2]) for row in above if row[0] == "vanilla")
    assert "within a hundredth of the one there" in page and abs(distance["vanilla"] / last - 1) < 0.01
    paces = tables_of(RESULTS / "plain/real-pace.json")[0][1]
    *pyramids, (mean, least, most) = [list(map(float, row[1:])) for row in paces]
    assert "a gain may be wrong by a fortieth" in page
    for ours, fewest, slowest in pyramids:
        assert 1 - 1 / 40 < fewest / most / (ours / mean) and slowest / least / (ours / mean) < 1 + 1 / 40
    *chosen, _ = tables_of(RESULTS / "plain/real-settings.json")[0][1]
    assert "They differ by less than a fortieth" in page and len(chosen) == 8
    assert min(chosen, key=lambda row: float(row[6]))[4:6] == ["7-7-1", "ab2"]
    distances = [float(row[6]) for row in chosen]
    assert max(distances) / min(distances) < 1 + 1 / 40


def test_what_the_pages_say_by_hand_of_samples_that_repeat_training_clips_is_in_their_tables():
    ((_, shipped),), ((_, early),) = (tables_of(RESULTS / f"{folder}copies.json") for folder in ("", "two-hours/"))
    samples, twins, others = ([float(number) for number in row[1:]] for row in shipped)  # least, 10%, median, 90%
    page = in_one_line("experiments/README.md")
    assert "about as near to training clips as training clips of one label are to each other" in page
    assert 0.9 < samples[2] / twins[2] < 1
    assert "In the median a sample is a little nearer to a training clip than such a twin is" in page
    assert "The nearest twins are nearer than the nearest sample" in page and twins[0] < samples[0]
    assert "other labels and are more than twice as far" in page and others[2] > 2 * twins[2]
    assert "more than twice as far from the nearest training clip" in page and float(early[0][3]) > 2 * twins[2]


def test_what_the_results_say_by_hand_of_the_choices_for_the_pyramid_in_time_is_in_their_tables():
    page, found = in_one_line("experiments/README.md"), {}
    for folder in ("two-hours", "tuned"):
        for run, choice, *_, distance in tables_of(RESULTS / folder / "real-settings.json")[0][1][:-1]:
            found.setdefault(run, {})[choice] = float(distance)
    vanilla, time = found["vanilla-seed-1"], found["time-seed-1"]
    assert (
        "With vanilla's six choices the pyramid in time, too, is best with B = 1" in page
        and time.keys() == vanilla.keys()
    )
    assert "the pyramid's best one leads three others by less, vanilla's leads all five by less" in page
    for run, count in (("space-time-seed-1", 3), ("vanilla-seed-1", 5)):
        least, *others = sorted(found[run].values())
        assert sum(each - least < 200 for each in others) == count
    one, other, *_ = sorted(time, key=time.get)
    assert "B = 1 with 4e-3 and 2e-3, are too near to tell. Both lead vanilla's best by more than two hundred" in page
    assert [one, other] == ["clips-1-lr-4e-3", "clips-1-lr-2e-3"] and time[other] - time[one] < 100
    assert min(vanilla.values()) - time[other] > 200


def test_the_companion_s_numbers_are_those_of_the_tests_and_of_the_schedule():
    text = in_one_line("COMPANION.md")
    *errors, last = (100 * KNOWN_ERRORS[mode, solver][20] for mode in ("flow", "ddim") for solver in ("euler", "ab2"))
    euler, ab2, ddim_euler = (f"{error:.2g}%" for error in errors)
    assert f"is {euler} with Euler and {ab2} with `ab2` in flow mode. In ddim" in text
    assert f"In ddim mode it is {ddim_euler} and {last:.1f}%" in text
    gamma = tpdiff.Pyramid("ddim").gamma_sigma(1.0)[0].item()
    assert f"leaves {100 * gamma:.1f}% of the clip" in text
    assert f"implies: {1 / gamma:.0f} times with the default" in text
    betas = torch.linspace(0.00085, 0.012, 1000, dtype=torch.float64)  # AnimateDiff's
    both = tpdiff.Pyramid("ddim"), tpdiff.Pyramid("ddim", alphas_cumprod=(1 - betas).cumprod(0))
    gamma = both[1].gamma_sigma(1.0)[0].item()
    assert f"that of AnimateDiff {100 * gamma:.0f}%" in text and f"and {1 / gamma:.0f} times with that of" in text
    zero = torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)  # what an error of 1 in all predicted noises becomes
    grown = [-p.integrate(lambda x, t, k: torch.ones_like(x), zero, 2, 9).item() for p in both]
    assert "becomes {:.1f} (default) or {:.1f} (AnimateDiff) times as large".format(*grown) in text
    # Of a latent of mean square 1 at stages 0 and 2, the nearest of eight
    size = 16 * 60 * 104 * torch.tensor([21, 6])
    first, last = (100 * 1.4236 * (6 / size) ** 0.5 / 2).tolist()  # draw_nearest: 2 c s / (2 D), s = sqrt(6 D)
    assert f"smaller by {first:.2f}% at stage 0 and by {last:.2f}% at stage 2" in text
    for a, ends, said in ((3, None, "`shift=3`, 30 steps become"), (5, None, "`shift=5` they become"), (3, ..., "")):
        p = tpdiff.Pyramid("flow", 3, shift=a, ends=ends and (0, a / (a + 2), 2 * a / (2 * a + 1)))
        counts = tpdiff.split_steps(30, 3, p.lengths)
        assert counts == [10, 10, 10] if ends else "{} {}, {} and {}".format(said, *counts) in text
    assert "`ends=(0, a / (a + 2), 2 * a / (2 * a + 1))`, stage 0 first, three stages have equal parts" in text
    p, pairs = tpdiff.Pyramid("flow", 3, shift=5), []
    for solver in ("euler", "ab2"):
        errors = [100 * covariance_error(p, each, solver, (21, 1, 1)) for each in ([10, 7, 4], [23, 5, 2])]
        pairs.append("{:.2g}%, not {:.2g}%,".format(*errors))
    assert f"{pairs[0]} with Euler, and {pairs[1]} with `ab2`. So give" in text


def test_every_command_on_the_pages_is_one_that_its_parser_takes():
    text, count = "\n".join(pages().values()).replace("\\\n", "").replace("-->", "\n"), 0
    command = r"(?:python|launch|torchrun \S+) (?:-m )?((?:experiments|examples)\.\w+|\w+\.py)\b( [^\n`#]+)"
    for name, words in re.findall(command, text):
        name = name.removesuffix(".py")
        if hasattr(import_module(name), "make_parser"):
            _, more = parsers_of(name)[0].parse_known_args(shlex.split(words))
            assert not more or name == "experiments.speed", (name, words)
            train.make_parser().parse_args(more)  # what experiments.speed hands on
            count += 1
    assert count > 40
