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
import json
import tarfile
import urllib.request
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from cli import Parser, one_sentence

PACKAGES = [f"@lobehub/fluent-emoji-anim-{number}" for number in (1, 2, 3)]
ALWAYS_TRAIN = ("1f468", "1f469")  # man and woman, with a fifth of all clips


def part_of(code_point: str) -> str:
    """ "train" for 17 of 20 code points, "held-out" for two and "settings" for one, by their hash."""
    twentieth = int(hashlib.sha256(code_point.encode()).hexdigest(), 16) % 20
    if code_point in ALWAYS_TRAIN or twentieth > 2:
        return "train"
    return "settings" if twentieth == 2 else "held-out"


def download(package: str) -> bytes:
    """The newest version of an npm package. Raises OSError if it cannot be had or is not what the registry says."""
    with urllib.request.urlopen(f"https://registry.npmjs.org/{package.replace('/', '%2f')}") as answer:
        about = json.load(answer)
    dist = about["versions"][about["dist-tags"]["latest"]]["dist"]
    with urllib.request.urlopen(dist["tarball"]) as answer:
        content = answer.read()
    if dist["integrity"] != "sha512-" + base64.b64encode(hashlib.sha512(content).digest()).decode():
        raise OSError(f"{dist['tarball']} is not what the registry says it is: try again")
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
