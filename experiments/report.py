"""Makes the pages README.md and SPEED.md here of their texts and of the tables in results/; and the table of claims in
the README.md above, of claims.txt.

  python -m experiments.report            writes them
  python -m experiments.report --check    says whether they are up to date, and ends with 1 if not

A line {{training.json}} of a text stands for every table of that file of results/, {{training.json 0 2}} for the first
and the third. What made them stands above the first. In claims.txt, that part of the other README,
{{latency.json 0 "flow 8 time" "times as fast"}} stands for a number: of table 0 the row that begins so, in that column.
"flow 8 time | ddim 8 time" stands for the lowest and the highest of these rows: 1.62 to 1.70. Files are joined alike.
A % at the end shows shares in percent.
"""

import argparse
import datetime
import inspect
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from cli import Parser, count, keep_memory, one_sentence

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PAGES = {RESULTS.with_name("README.md"): RESULTS.with_name("texts.md")}
PAGES |= {RESULTS.with_name("SPEED.md"): RESULTS.with_name("texts-speed.md")}
FRONT_PAGE, CLAIMS = ROOT / "README.md", Path(__file__).with_name("claims.txt")
MARKS = "<!-- experiments/claims.txt, filled in by python -m experiments.report -->\n", "<!-- end -->\n"
# The present names of the commands in files that are older than these names.
RENAMED = {"python bench.py": "python -m experiments.speed"}
RENAMED |= {"python -m experiments.asked": "python -m experiments.claims"}
NO_MEMORY = "not enough memory: a smaller --batch or --reference needs less"
Table = tuple[list, list[list]]  # its header and its rows


def spread(values: list[float], form: str = ".3g") -> str:
    """The mean, and of several seeds the smallest and the largest value."""
    mean, least, most = (format(value, form) for value in (statistics.mean(values), min(values), max(values)))
    return f"{mean} [{least}, {most}]" if len(values) > 1 else mean


def markdown(header: list, rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


@cache
def commit() -> str:
    """The code's, marked if source files differ from it; empty without git or its repository."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    try:
        name = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        changed = git(["git", "status", "--porcelain", "--", "*.py"]).stdout.strip()
        return f"{name}-dirty" if name and changed else name
    except OSError:
        return ""


def file_to_write(text: str) -> Path:
    """An argparse type: a file. Checked before measuring: its folder must be there, and in its place no folder or
    device."""
    path = Path(text)
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    if os.path.exists(path) and not os.path.isfile(path):
        raise argparse.ArgumentTypeError(f"{path} is no file")
    return path


def json_to_write(text: str) -> Path:
    """The same, of a table. Its name must end in .json, lest a slip of the keys cost a program or weights."""
    path = file_to_write(text)
    if path.suffix != ".json":
        raise argparse.ArgumentTypeError(f"{path} does not end in .json")
    return path


def write_json(path: Path, content: dict) -> None:
    """Leaves the whole file or the one before: it is written aside, then renamed."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(aside, path)


def add_command(commands, name: str, function: Callable, **options) -> Callable:
    """A sub-command that calls `function` of its arguments. Returns what adds an option to it."""
    text = inspect.cleandoc(function.__doc__)
    parser = commands.add_parser(name, help=text.split(".")[0], description=text, **options)
    parser.set_defaults(function=function)
    return parser.add_argument


def run_command(parser: Parser, argv: list[str] | None) -> None:
    """Calls the `function` of the command with its arguments, and with what its tables are `made_by`. The folder of
    --out is made."""
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    args.made_by = provenance(parser.prog, words)
    keep_memory()
    with one_sentence(parser, NO_MEMORY):
        if "out" in args:
            args.out.mkdir(parents=True, exist_ok=True)
        args.function(args)


def provenance(module: str, words: list[str]) -> dict:
    """What made a table. Asked for before measuring, lest the code change meanwhile."""
    made_by = {"command": shlex.join(["python", "-m", module, *words]), "date": str(datetime.date.today())}
    return made_by | {"machine": processor(), "torch": torch.__version__, "commit": commit()}


def processor() -> str:
    """The GPU's name, or the CPU's with its vector units and torch's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    units = torch.backends.cpu.get_cpu_capability()
    return f"{names[0] if names else platform.processor()} ({units}), {count(torch.get_num_threads(), 'thread')}"


def publish(tables: list[Table], made_by: dict, path: Path | None) -> None:
    """Prints tables and, if there is a path, writes them there with what they were made by."""
    for header, rows in tables:
        print(markdown(header, rows))
    if path:
        write_json(path, made_by | {"tables": tables})
        print(f"wrote {path}\n", flush=True)


def made_by(name: str, content: dict) -> str:
    """A line of what made the tables of a file, and its name. A command is shown by its present name."""
    command = content["command"]
    for old, new in RENAMED.items():
        command = command.replace(old, new)
    words = [f"`{command}`", content["machine"], content["date"], f"torch {content['torch']}"]
    if "note" in content:
        words.append(content["note"])
    words.append(f"[{name}](results/{name})")
    return re.sub(r"\b1 threads", "1 thread", ", ".join(words)) + ":\n"


def make_page(texts: str, results: Path) -> str:
    """`texts` with the tables of the folder `results` in place of {{FILE NUMBERS}}, a long one to unfold. Figures are
    half as wide as the page.

    Raises ValueError if a table is asked for that is not there, or a file with tables is not asked for."""
    contents = {str(path.relative_to(results)): json.loads(path.read_text()) for path in results.rglob("*.json")}
    unused = {name for name, content in contents.items() if "tables" in content}

    def tables(place: re.Match) -> str:
        name, *numbers = place[1].split()
        if "tables" not in contents.get(name, {}):
            raise ValueError(f"a text asks for the tables of {name}, and {results} has no such file")
        numbers, found = [int(number) for number in numbers], contents[name]["tables"]
        shown = [made_by(name, contents[name])] if name in unused else []
        unused.discard(name)
        for number in numbers or range(len(found)):
            if number >= len(found):
                raise ValueError(f"a text asks for table {number} of {name}, which has {len(found)}")
            table = markdown(*found[number])  # its step counts, as 10-10-10, stay on one line
            table = re.sub(r"\| \d+(-\d+)+ \|", lambda cell: cell[0].replace("-", "\u2011"), table)
            if (rows := len(found[number][1])) > 12:
                table = f"<details><summary>Table of {rows} rows</summary>\n\n{table}\n</details>\n"
            shown.append(table)
        return "\n".join(shown).rstrip()

    page = re.sub(r"^\{\{(.+)\}\}$", tables, texts, flags=re.MULTILINE)
    if unused:
        raise ValueError(f"the texts leave out the tables of {min(unused)}")
    page = re.sub(r"^!\[(.+)\]\((.+)\)$", r'<img src="\2" alt="\1" width="440">', page, flags=re.MULTILINE)
    return re.sub(r"^(<img .*(\n<img .*)*)$", r"<p>\n\1\n</p>", page, flags=re.MULTILINE)


def make_front_page(page: str, claims: str, results: Path) -> str:
    """The other README, its table with the numbers of the JSON files. Raises ValueError if one is missing."""

    def number(place: re.Match) -> str:
        name, table, wanted, column, *percent = shlex.split(place[1])
        cells, numbers = {}, []
        for part in name.split(" | "):
            header, rows = json.loads((results / part).read_text())["tables"][int(table)]
            cells |= {" ".join(map(str, row)) + f" {part}": row[header.index(column)] for row in rows}
        for row in wanted.split(" | "):
            found = [str(cell).partition(" [")[0] for words, cell in cells.items() if words.startswith(row + " ")]
            if len(found) != 1:
                raise ValueError(f"{CLAIMS} asks for a row of {name} that begins with {row!r}: there are {len(found)}")
            numbers += found
        words = [each for each in numbers if not re.fullmatch(r"[\d.]+", each)]
        if words and (percent or len(numbers) > 1):
            wanted = "percent" if percent else "a range"
            raise ValueError(f"{CLAIMS} asks for {wanted} of {name}, and one of its rows says {words[0]!r}")
        if len(numbers) > 1:
            numbers = min(numbers, key=float), max(numbers, key=float)
        return " to ".join(dict.fromkeys(f"{float(each):.0%}" if percent else each for each in numbers))

    parts = re.split("|".join(map(re.escape, MARKS)), page)
    if len(parts) != 3 or page.index(MARKS[0]) > page.index(MARKS[1]):
        raise ValueError(f"{FRONT_PAGE} needs the lines {MARKS[0]!r} and {MARKS[1]!r} once each, around its table")
    return parts[0] + MARKS[0] + re.sub(r"\{\{(.+?)\}\}", number, claims) + MARKS[1] + parts[2]


def make_parser() -> Parser:
    parser = Parser(prog="experiments.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 if a page is out of date")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence(parser, "not enough memory"):
        both = make_page("\0".join(path.read_text() for path in PAGES.values()), RESULTS)
        made = dict(zip(PAGES, both.split("\0"), strict=True))
        made[FRONT_PAGE] = make_front_page(FRONT_PAGE.read_text(), CLAIMS.read_text(), RESULTS)
        for path, page in made.items():
            if not args.check:
                path.write_text(page)
                print(f"wrote {path}")
            elif path.read_text() != page:
                raise SystemExit(f"{path} is out of date: python -m experiments.report makes it anew")


if __name__ == "__main__":
    main()
