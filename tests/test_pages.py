"""What the pages promise, and how the files of the core know of each other."""

import argparse
import ast
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, pages

import tpdiff

# From the bottom up: a file may import any file before it; those of ALLOWED, only the files named there.
CORE = ["tpdiff", "model", "video", "data", "cli", "checkpoint", "sample", "train"]
ALLOWED = {"model": set(), "video": set(), "data": {"video"}, "cli": set(), "checkpoint": {"tpdiff", "model", "data"}}


def imports(path: Path, inner: bool = True) -> set[str]:
    """The first names of all modules that a file imports, with or without those inside of functions."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if inner else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module.partition(".")[0])
    return found


# ---- The files of the core


def test_the_core_s_files_are_these_and_no_others():
    assert {path.stem for path in ROOT.glob("*.py")} == {*CORE, "test_tpdiff"}


@pytest.mark.parametrize("name", CORE)
def test_no_file_of_the_core_imports_upward(name):
    of_ours = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/*.py")}
    known = imports(ROOT / f"{name}.py") & of_ours
    assert known <= ALLOWED.get(name, set(CORE[: CORE.index(name)])), known


def test_tpdiff_needs_torch_and_scipy_alone_and_its_tests_no_other_file():
    others = {"torch", "scipy"}
    assert imports(ROOT / "tpdiff.py", inner=False) - sys.stdlib_module_names == others
    assert imports(ROOT / "tpdiff.py") - sys.stdlib_module_names <= others | {"tqdm"}  # tqdm to show progress
    needed = imports(ROOT / "test_tpdiff.py") - sys.stdlib_module_names
    assert needed <= {"tpdiff", "torch", "numpy", "pytest", "hypothesis"}


def test_what_pip_installs_is_tpdiff_with_torch_and_scipy():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads pyproject.toml")
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["py-modules"] == ["tpdiff"]
    assert {re.match(r"\w+", need)[0] for need in settings["project"]["dependencies"]} == {"torch", "scipy"}


# ---- The pages


def test_the_version_has_its_lines_in_the_changelog():
    assert re.search(rf"^#+ .*\b{re.escape(tpdiff.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def all_tests() -> set[str]:
    text = "".join(path.read_text() for path in [ROOT / "test_tpdiff.py", *(ROOT / "tests").glob("test_*.py")])
    return set(re.findall(r"^def (test_\w+)", text, re.MULTILINE))


def test_every_test_that_the_pages_name_exists():
    named = {name for text in pages().values() for name in re.findall(r"`(test_\w+)`", text)}
    assert len(named) > 20 and named <= all_tests(), named - all_tests()


def test_every_equation_of_the_paper_has_its_code_and_its_test():
    text = (ROOT / "COMPANION.md").read_text().split("## Where this departs")[0]
    headings = re.findall(r"^### (.*)$", text, re.MULTILINE)
    numbers = {
        number
        for first, last in re.findall(r"Eq\. (\d+)'?(?: (?:and|to) (\d+))?", " ".join(headings))
        for number in range(int(first), int(last or first) + 1)
    }
    assert numbers == set(range(1, 25)) and {"1", "2"} <= set(re.findall(r"Algorithm (\d)", " ".join(headings)))
    for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]:
        assert "`test_" in section, section
        assert "```python" in section or section.startswith("Eq. 17") or "15'" in section.splitlines()[0], section


def test_every_line_of_code_on_the_companion_s_pages_is_in_the_function_named_before_it():
    text = (ROOT / "COMPANION.md").read_text()
    blocks = re.findall(r"In `([\w.]+)`(?: of \[([\w.]+)\]\(\S+\))?:\n\n```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == text.count("```python") > 12
    for name, file, lines in blocks:
        source = (ROOT / (file or "tpdiff.py")).read_text()
        node = ast.parse(source)
        for part in name.split("."):
            node = next(each for each in ast.walk(node) if getattr(each, "name", None) == part)
        inside = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno]) + "\n"
        assert lines in inside, (name, lines)


def test_every_help_ends_with_an_example_of_the_command_that_asks_for_it():
    commands = {name: import_module(name).make_parser for name in ("train", "sample")}
    for path in (ROOT / "experiments").glob("*.py"):
        if "def make_parser" in path.read_text():
            commands[f"-m experiments.{path.stem}"] = import_module(f"experiments.{path.stem}").make_parser
    assert len(commands) >= 8
    for name, make in commands.items():
        made = make()
        parser = made[0] if isinstance(made, tuple) else made
        commands_of = [action.choices.values() for action in parser._actions if action.nargs == argparse.PARSER]
        for each in (parser, *(commands_of[0] if commands_of else ())):
            last = each.format_help().splitlines()[-1]
            assert f"example: python {name}" in last, (name, each.prog)
            if name.startswith("-m"):  # all that the command needs stands there
                parser.parse_args(last.partition(name)[2].split())


def test_every_method_of_the_pyramid_that_the_pages_name_exists():
    named = {name for text in pages().values() for name in re.findall(r"`Pyramid\.(\w+)", text)}
    assert len(named) > 1 and all(hasattr(tpdiff.Pyramid, name) for name in named), named


def test_every_file_that_the_pages_link_or_run_exists():
    linked = [(page, link) for page, text in pages().items() for link in re.findall(r"\]\(([^)#\s]+)", text)]
    missing = [
        (page, link) for page, link in linked if ":" not in link and not (ROOT / page).parent.joinpath(link).exists()
    ]
    assert not missing and len(linked) > 10
    words = {
        name
        for text in pages().values()
        for name in re.findall(r"\bpython (\w+\.py)|python -m (experiments\.\w+)", text)
    }
    files = {script or module.replace(".", "/") + ".py" for script, module in words}
    assert len(files) > 1 and all((ROOT / file).exists() for file in files), files
