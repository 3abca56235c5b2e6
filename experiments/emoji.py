"""The real clips of the measurements: Microsoft's animated Fluent emoji (MIT licence), from three npm packages.

  python -m experiments.emoji --out data/emoji64

Each clip is 64x64 on white, every second picture, at 12 a second; stills and clips of less than 16 pictures then are
left out. Some 550 MB are downloaded, and nothing is kept of them but the clips. They go into three folders, `train`,
`settings` (to choose settings on) and `held-out`, and there into one for each first code point, which is a clip's
label. A first code point is in one of the three alone, as names that begin alike are variants of one clip.
"""

import base64
import hashlib
import io
import tarfile
import urllib.request
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cli import Parser, one_sentence

URL = "https://registry.npmjs.org/@lobehub/{0}/-/{0}-1.0.0.tgz"
PACKAGES = {  # the files whose clips were measured, by sha512
    "fluent-emoji-anim-1": "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
    "fluent-emoji-anim-2": "S6yzf0RZXrQbXdxCWuHA9BAoLdBRk2flX+ne4TPGEH/qApwisCAKHoAAGjKSlTY3OVeZ9b7t/NEbmpjawnQYJA==",
    "fluent-emoji-anim-3": "UzRSUDMjdfdt9vER5bhjHkPqgc3EEgfGtYs6ndvizOTvQOxYQ57ow2RTkWSDZxwW30X4EYBi2eWTS7CXDDoFsg==",
}
ALWAYS_TRAIN = ("1f468", "1f469")  # man and woman, with a fifth of all clips


def part_of(code_point: str) -> str:
    """ "train" for 17 of 20 code points, "held-out" for two and "settings" for one, by their hash."""
    twentieth = int(hashlib.sha256(code_point.encode()).hexdigest(), 16) % 20
    if code_point in ALWAYS_TRAIN or twentieth > 2:
        return "train"
    return "settings" if twentieth == 2 else "held-out"


def download(package: str) -> bytes:
    """A file of PACKAGES. Raises OSError if it cannot be had or is another than the one that was measured."""
    url = URL.format(package)
    with urllib.request.urlopen(url) as answer:
        content = answer.read()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != PACKAGES[package]:
        raise OSError(f"{url} is not the file that was measured: try again")
    return content


def every_second_picture(content: bytes, size: int = 64) -> list[Image.Image]:
    """Of an animation, on white, resized."""
    pictures = []
    with Image.open(io.BytesIO(content)) as image:
        for number in range(0, getattr(image, "n_frames", 1), 2):
            image.seek(number)
            rgba = image.convert("RGBA")
            flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            pictures.append(flat.resize((size, size), Image.Resampling.BICUBIC))
    return pictures


def write_clips(package: bytes, out: Path) -> None:
    """Writes the clips of a package's file. A clip that is there already stays."""
    with tarfile.open(fileobj=io.BytesIO(package)) as archive:
        for member in tqdm(archive.getmembers(), unit="file"):
            name = Path(member.name).name
            if not name.endswith(".webp"):
                continue
            code_point = name.partition(".")[0].partition("-")[0]
            path = out / part_of(code_point) / code_point / name
            if not path.exists():
                first, *rest = every_second_picture(archive.extractfile(member).read())
                if len(rest) < 15:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                aside = path.with_suffix(".tmp")  # so that a stopped command leaves no half clip
                first.save(aside, "WEBP", save_all=True, append_images=rest, duration=83, quality=90, method=2)
                aside.replace(path)


def make_parser() -> Parser:
    parser = Parser(prog="experiments.emoji", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/emoji64"), help="folder for the clips")
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    with one_sentence(parser, "not enough memory"):
        megabytes = 0
        for package in PACKAGES:
            content = download(package)
            write_clips(content, args.out)
            megabytes += len(content) / 1e6
    print(f"downloaded {megabytes:.0f} MB")
    for part in ("train", "settings", "held-out"):
        labels = sum(1 for _ in (args.out / part).glob("*/"))
        print(f"{args.out / part}: {len(list((args.out / part).glob('*/*.webp')))} clips with {labels} labels")


if __name__ == "__main__":
    main()
