"""Files on disk become frames: animations, numbered stills, videos (with PyAV) and latents. Knows nothing of windows.

`find_sources` says which clips a folder holds, `read_images` and `open_latent` read them.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

STILLS = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
LATENTS = (".npy", ".pt")
SUFFIXES = (".gif", ".webp", ".apng", *STILLS, *VIDEOS, *LATENTS)


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong and where."""


@dataclass(frozen=True)
class Source:
    """A clip on disk: one file, or numbered stills. What its header says; kind "broken" if it could not be read."""

    files: tuple[Path, ...]
    kind: str  # "pictures", "stills", "video", "latent" or "broken"
    frames: int = 0
    channels: int = 0
    height: int = 0
    width: int = 0


def find_sources(folder: Path, index: Path | None, series: bool = True) -> list[Source]:
    """All clips under the folder but those beside the index. A file that has not changed since is not opened again."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: --data wants one with clips in it")
    known, rows = {}, {}
    with suppress(OSError, ValueError):  # there is none yet, or it is damaged: it will be written anew
        known = json.loads(index.read_text()) if index else {}

    def look(files: tuple[Path, ...]) -> Source:
        name, status = str(files[0]), files[0].stat()
        key = [status.st_mtime_ns, status.st_size, len(files)]
        source = Source(files, *known[name][3:]) if name in known and known[name][:3] == key else _probe(files)
        if source.kind == "video":
            _import_av(files[0])  # also if the index knows the file
        if source.kind != "broken":
            rows[name] = [*key, source.kind, source.frames, source.channels, source.height, source.width]
        return source

    sources, without = [], index.parent.resolve() if index else None
    for files in tqdm(_groups(folder, without, series), desc="looking at files", unit="clip", delay=2):
        source = look(files)
        whole = len(files) == 1 or source.kind == "stills"  # else: animations whose names happen to be numbered
        sources += [source] if whole else [look((file,)) for file in files]
    if index and rows != known:
        index.parent.mkdir(parents=True, exist_ok=True)
        aside = index.with_name(index.name + ".tmp")
        aside.write_text(json.dumps(rows))
        os.replace(aside, index)
    return sources


def _groups(folder: Path, without: Path | None, series: bool) -> Iterator[tuple[Path, ...]]:
    """The files of each clip under the folder, in order: one, or with `series` the stills whose numbers run on."""
    for directory, below, names in os.walk(folder):
        below[:] = sorted(name for name in below if Path(directory, name).resolve() != without)
        numbered = defaultdict(list)
        for path in (Path(directory, name) for name in sorted(names)):
            suffix, match = path.suffix.lower(), re.fullmatch(r"(.*?)(\d+)", path.stem)
            if suffix not in SUFFIXES or not path.is_file():
                continue
            if series and suffix in STILLS and match:
                numbered[match[1], suffix].append((int(match[2]), path))
            else:
                yield (path,)
        for members in numbered.values():
            members.sort()  # and what runs on keeps its distance from the place in the list
            for _, run in groupby(enumerate(members), key=lambda member: member[1][0] - member[0]):
                yield tuple(path for _, (_, path) in run)


def _probe(files: tuple[Path, ...]) -> Source:
    """Reads the header. Raises DataError if that needs a package which is missing."""
    suffix = files[0].suffix.lower()
    av = _import_av(files[0]) if suffix in VIDEOS else None
    try:
        if suffix in LATENTS:
            channels, frames, height, width = open_latent(files[0]).shape
            return Source(files, "latent", frames, channels, height, width)
        if av:
            with av.open(str(files[0])) as container:
                stream = container.streams.video[0]
                frames = stream.frames or _count_by_time(container, stream)
                return Source(files, "video", frames, 3, stream.height, stream.width)
        with Image.open(files[0]) as image:
            frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
            kind, frames = ("stills", len(files)) if frames == 1 < len(files) else ("pictures", frames)
            return Source(files, kind, frames, 3, image.height, image.width)
    except Exception:  # Pillow, FFmpeg and numpy raise many kinds for a damaged file
        return Source(files, "broken")


def _import_av(path: Path):
    try:
        import av
    except ImportError:
        raise DataError(f"{path} is a video, which needs PyAV to read: pip install av") from None
    return av


def _count_by_time(container, stream) -> int:
    """For a video whose header does not say how many frames it has: the time it lasts, at its average rate."""
    times = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
    return round((max(times) - min(times)) * stream.average_rate * stream.time_base) + 1


def open_latent(path: Path) -> Tensor:
    """(C, T, H, W) of real numbers, not yet read from the disk."""
    if path.suffix.lower() == ".pt":
        latent = torch.load(path, map_location="cpu", weights_only=True, mmap=True).detach()
    else:
        latent = torch.from_numpy(np.load(path, mmap_mode="c"))
    if latent.ndim != 4 or latent.is_complex():
        raise ValueError(f"a latent is real and (C, T, H, W), not {latent.dtype} and {tuple(latent.shape)}")
    return latent


def read_images(source: Source, wanted: range) -> Iterator[Image.Image]:
    """The frames of these numbers, in order. Raises what Pillow and FFmpeg raise for a damaged file."""
    if source.kind == "video":
        yield from _read_video(source.files[0], wanted)
    elif source.kind == "stills":
        for number in wanted:
            with Image.open(source.files[number]) as image:
                yield ImageOps.exif_transpose(image)
    else:
        with Image.open(source.files[0]) as image:
            for number in wanted:
                image.seek(number)
                yield ImageOps.exif_transpose(image)


def _read_video(path: Path, wanted: range) -> Iterator[Image.Image]:
    """Frame number j is what is on the screen at j / average_rate seconds, so all last equally long. Decodes from a key
    frame before the first one wanted."""
    av = _import_av(path)
    for back in (0, 1, 10, np.inf):  # seconds: what follows a key frame may need frames before it, and be left out
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate, frames = stream.average_rate * stream.time_base, container.decode(stream)
            shown = next(frames)
            begin, target = shown.pts, wanted[0] / rate - back / stream.time_base
            if target > 0:
                try:
                    container.seek(begin + int(target), stream=stream)
                    shown = next(frames := container.decode(stream))
                except (av.FFmpegError, StopIteration):
                    continue
            if round((shown.pts - begin) * rate) > wanted[0]:
                continue
            due = list(wanted)
            for frame in chain(frames, [None]):
                if frame:
                    end = round((frame.pts - begin) * rate)
                else:  # how long the last one lasts, files disagree
                    end = round((shown.pts - begin) * rate) + max(2, round((shown.duration or 0) * rate)) + 1
                while due and due[0] < end:
                    yield _upright(shown, stream.sample_aspect_ratio)
                    del due[0]
                if not due:
                    return
                shown = frame
            raise ValueError(f"ends at frame {end - 1}, before frame {due[0]}")


def _upright(frame, pixel_aspect) -> Image.Image:
    """A video's frame as it is meant to be seen: with square pixels, and turned as a phone says it was held."""
    image = frame.to_image()
    if pixel_aspect and pixel_aspect != 1:
        image = image.resize((round(image.width * pixel_aspect), image.height))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image
