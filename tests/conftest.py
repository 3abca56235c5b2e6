"""What several files of tests share: small runs, small models, clips on disk, and how a command fails."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from data import open_data
from model import DiT, DiTConfig
from test_tpdiff import ROOT, assert_exact, both_modes, clips, gamma_sigma, seeded  # noqa: F401  (for the other files)

# ---- Models and runs


TINY = "--frames 8 --size 16 --patch 8 --width 32 --depth 1 --heads 2 --batch 4 --precision fp32 --workers 0".split()
TINY += "--log-interval 2 --save-interval 100 --sample-interval 100".split()


def small_model(classes: int = 0, live: bool = True, **options) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(width=32, depth=2, heads=2, classes=classes, **options))
    if live:  # away from the zero init, where the output is 0 whatever goes in
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def run_training(out: Path, *options: str, code: int = 0) -> dict:
    """train.py in this process, the code that it ends with, and the checkpoint it leaves."""
    with pytest.raises(SystemExit) as stopped:
        train.main([*TINY, "--out", str(out), *options])
    assert stopped.value.code == code
    checkpoint, weights = (torch.load(out / name, weights_only=True) for name in ("checkpoint.pt", "weights.pt"))
    assert all(torch.equal(weights["ema"][name], value.bfloat16()) for name, value in checkpoint["ema"].items())
    return checkpoint


def rows_of(run: Path) -> list[dict]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def small_state(*options: str, stage: int | None = None) -> tuple[train.State, argparse.Namespace, Iterator]:
    """A run of a small model before its first step, its arguments and its batches, of the steps' stages or of one."""
    args = train.make_parser().parse_args([*TINY, *options])
    data, device = open_data(args), torch.device("cpu")
    state = train.make_state(train.make_model(data, args), args, device, None)
    return state, args, train.make_batches(data, args, 0, 0, 1, device, stage)


def assert_same_weights(a: dict, b: dict, **tolerance) -> None:
    for part in ("model", "ema"):
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], rtol=0, **(tolerance or {"atol": 0}))


def command(*words: str | Path, **options) -> subprocess.Popen:
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], **streams, **options)


def start_two(*words: str | Path) -> list[subprocess.Popen]:
    """Two processes of one run, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [os.environ | place | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"} for rank in "01"]
    return [command(*words, env=rank) for rank in ranks]


def fails_with_one_line(capsys, main, *words: str | Path) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    return captured.err


# ---- Pages


def pages() -> dict[str, str]:
    """What people read, by its path in the repository."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("experiments/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return {str(path.relative_to(ROOT)): path.read_text() for path in found}


def page_code(word: str) -> str:
    """The one block of Python in the pages in which this word occurs."""
    blocks = [block for text in pages().values() for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    (found,) = [block for block in blocks if re.search(rf"\b{word}\b", block)]
    return found


# ---- Files


def tables_of(path: Path) -> list:
    """Of a file that a command of experiments/ wrote: (header, rows) each."""
    return json.loads(path.read_text())["tables"]


def animation(path: Path, frames: int, size: tuple[int, int] = (20, 30), mode: str = "RGB", green=100, **options):
    """Frame i is one plain colour, 10 i of red."""
    colors = [(10 * i, green, 200) + ((0,) if mode == "RGBA" else ()) for i in range(frames)]
    images = [Image.new(mode, size, color) for color in colors]
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:], **{"duration": 80} | options)


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    folder = tmp_path / "clips"
    animation(folder / "a.gif", 8)
    animation(folder / "deep" / "b.webp", 9, lossless=True)
    animation(folder / "deep" / "er" / "c.png", 8)
    animation(folder / "clear.webp", 8, mode="RGBA", lossless=True)
    animation(folder / "short.gif", 3)
    animation(folder / "still.gif", 1)
    Image.new("RGB", (9, 9)).save(folder / "still.png")
    (folder / "broken.gif").write_bytes(b"GIF89a, not really")
    (folder / "empty.webp").write_bytes(b"")
    (folder / "notes.txt").write_text("not a clip")
    return folder
