"""Clips to train on. Nothing here knows about diffusion or about the model.

Both datasets are endless: sample number n, for every n >= 0, is one (clip, label), and the same number gives the
same clip in every process. So ranks share the data by counting, and a run resumes at the number it had reached.
A clip is float32 (C, T, H, W) with pixels in [-1, 1]; the label is an int, or -1 for data without labels.
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from cli import count, few, is_out_of_memory
from video import RUN, STILLS, SUFFIXES, DataError, Source, find_sources, open_latent, read_images

HELD_OUT_SEED = 2**40  # of digits; --seed is below 2^63, and seldom this
DATA_ONLY = ("labels", "fps", "from_start", "frame_stride", "flip", "grayscale", "latent_scale")  # of no use for digits


def _random(*seed: int) -> np.random.Generator:
    """A generator that depends on the numbers alone, not on the process."""
    return np.random.Generator(np.random.Philox(seed))


def _glyph(digit: int, height: int) -> np.ndarray:
    """Pillow's built-in TrueType digit, `height` pixels high, in [0, 1], stroked so that it survives at 32 x 32."""
    font = ImageFont.load_default(size=4 * height)
    left, top, right, bottom = font.getbbox(str(digit), stroke_width=height // 6)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), str(digit), fill=255, font=font, stroke_width=height // 6)
    width = round(height * image.width / image.height)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """One number stands for a square. Raises DataError if there are more than two."""
    if not isinstance(size, int) and len(size) != 2:
        raise DataError(f"a size is one number, or height and width, not {' '.join(map(str, size))}")
    return (size, size) if isinstance(size, int) else tuple(size)


def draw_digit(glyph: np.ndarray, y: np.ndarray, x: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Frames (T, H, W) with the glyph's corner at the subpixel positions (y, x) (T,): bilinear, exact."""
    row, column = (np.arange(length, dtype=np.float32)[None, :, None] for length in height_width(size))
    rows = np.maximum(0, 1 - np.abs(row - y[:, None, None] - np.arange(glyph.shape[0])))
    columns = np.maximum(0, 1 - np.abs(column - x[:, None, None] - np.arange(glyph.shape[1])))
    return rows.astype(np.float32) @ glyph @ columns.astype(np.float32).transpose(0, 2, 1)


def bounce(start: float, velocity: float, frames: int, room: float) -> np.ndarray:
    """Positions (..., T) of a point moving at constant velocity and bouncing off 0 and `room`."""
    return room - np.abs((start + velocity * np.arange(frames)) % (2 * room) - room)


class MovingDigits(Dataset):
    """Bouncing digits on black, (1, T, H, W), made on the fly from a seed; the label is the first digit.
    A digit is 5/8 of the frame's shorter side high, its start uniform, its speed uniform in `speeds`.
    Raises DataError if that side is under 16 pixels or there is no frame or digit."""

    channels, latent, digests, rate = 1, False, ("",), None
    speeds = 1 / 40, 1 / 16  # least and most, in shorter sides a frame
    classes = tuple("0123456789")

    def __init__(self, frames: int = 16, size: int | tuple[int, int] = 32, digits: int = 1, seed: int = 0):
        short = min(height_width(size))
        if short < 16 or frames < 1 or digits < 1:
            given = f"not {short}, {frames} and {digits}"
            raise DataError(f"moving digits need a size of 16 or more, and at least one frame and digit, {given}")
        self.frames, self.size, self.digits, self.seed, self.short = frames, size, digits, seed, short
        self.summary = f"moving digits, {digits} a clip, made on the fly"
        self.glyphs = [_glyph(digit, round(short * 5 / 8)) for digit in range(10)]

    def tracks(self, number: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """What sample `number` shows, digit by digit: its label and its corner's positions y (T,) and x (T,)."""
        random, tracks = _random(self.seed, number), []
        for _ in range(self.digits):
            label = int(random.integers(10))
            speed, angle = self.short * random.uniform(*self.speeds), random.uniform(0, 2 * np.pi)
            rooms = [all_ - own for all_, own in zip(height_width(self.size), self.glyphs[label].shape, strict=True)]
            starts = [random.uniform(0, room) for room in rooms]
            velocities = speed * np.sin(angle), speed * np.cos(angle)
            tracks.append((label, *map(bounce, starts, velocities, [self.frames] * 2, rooms)))
        return tracks

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        tracks = self.tracks(number)
        clip = reduce(np.maximum, (draw_digit(self.glyphs[label], y, x, self.size) for label, y, x in tracks))
        return torch.from_numpy(clip).mul_(2).sub_(1)[None], tracks[0][0]


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return _random(seed, epoch).permutation(count)


def clip_files(folder: Path, index: Path | None, series: bool) -> Iterator[tuple[Path, ...]]:
    """The files of each clip under the folder but those beside the index and in hidden folders, in order: one file, or
    with `series` the stills whose numbers run on. Links to folders elsewhere are followed, to each of them once. Of the
    folder of a run its checkpoint stands for all. Raises DataError if there is no such folder."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: --data wants one with clips in it")
    root, seen, closed = folder.resolve(), {index.parent.resolve() if index else None}, []
    for directory, below, names in os.walk(folder, onerror=closed.append, followlinks=True):
        below[:] = sorted(name for name in below if name[0] != "." and name != "@eaDir")  # a server's thumbnails
        for name in tuple(below):
            path = Path(directory, name)
            real = path.resolve()
            if real in seen or path.is_symlink() and real.is_relative_to(root):
                below.remove(name)
            else:
                seen.add(real)
        if RUN in names:
            below[:], names = [], [RUN]
        numbered = defaultdict(list)
        for path in (Path(directory, name) for name in sorted(names)):
            suffix, match = path.suffix.lower(), re.fullmatch(r"(.*?)(\d+)", path.stem)
            there = os.path.exists(path)  # not of a broken link, or one into what may not be read
            if suffix not in SUFFIXES or there and not path.is_file():
                continue
            if there and series and suffix in STILLS and match:
                numbered[match[1], suffix].append((int(match[2]), match[2] != str(int(match[2])), path))
            else:
                yield (path,)
        for members in numbered.values():
            twice = len({number for number, *_ in members}) < len(members)  # a_1 and a_01: whose is a_10?
            places = sorted(((zeros, len(path.stem)) * twice, number, path) for number, zeros, path in members)
            # what runs on keeps its distance from the place in the list
            for _, run in groupby(enumerate(places), key=lambda each: (each[1][0], each[1][1] - each[0])):
                yield tuple(path for _, (_, _, path) in run)
    yield from ((Path(error.filename),) for error in closed)


@dataclass(eq=False)
class FolderClips(Dataset):
    """Random windows of the clips in a folder, and in those below unless hidden, (C, frames, H, W): animated GIF, WebP
    and APNG, folders of numbered stills, videos (with PyAV), or latents (C, T, H, W) in .npy and .pt files.

    Frame j of a window is the picture that is on the screen half a period after `start + j * frame_stride` periods,
    where a period is 1 / fps seconds, or by default what the file's pictures most often last (video.py). Pictures are
    RGB on white, or grey; cropped at their centre to the shape wanted and resized. Latents are cropped at their centre
    and have no range. Every epoch goes through the clips in a new order. What cannot be used is named in `summary` with
    its reason; a file that turns out damaged or changed when it is read is named on stderr and passed over.
    Raises DataError if the folder does not exist, holds nothing usable or mixes pictures with latents."""

    folder: str | Path
    frames: int = 16
    size: int | tuple[int, int] | None = 32  # one number for a square, or height and width; None: 32, or whole latents
    seed: int = 0
    labels: bool = False  # True: the folder's sub-folders are the classes
    frame_stride: int = 1  # frames of a clip from one frame of a window to the next
    flip: bool = False  # True: half of the windows are mirrored
    grayscale: bool = False
    latent_scale: float = 1.0  # what latents are multiplied by
    index: Path | None = None  # a file that keeps what the headers said, so that the next start is quick
    cache_bytes: int = 2**30  # of decoded frames that are kept
    fps: float | None = None  # the rate at which frames are counted; None: each file's own
    from_start: bool = False  # True: all windows begin with their clip, whose first latent alone stands for one frame
    held_out: float = 0.0  # the share of the clips, by file, that is kept for validation
    validation: bool = False  # True: the clips held out; False: the others

    def __post_init__(self):
        name, self.folder = self.folder, Path(self.folder)
        self.span = (self.frames - 1) * self.frame_stride + 1
        self.cache, self.room, self.passed_over = {}, self.cache_bytes, set()
        found = find_sources(clip_files(self.folder, self.index, series=self.span > 1), self.index)
        found = [source.at_rate(self.fps) if self.fps and source.unit else source for source in found]
        moving = {source.files[0].parent for source in found if source.kind in ("video", "animation")}
        self.sources, skipped = [], defaultdict(list)
        for source in found:
            reason = self._reason_to_skip(source, moving)
            self.sources += [] if reason else [source]
            skipped[reason].extend(source.files)
        usable = len(self.sources)
        if usable:
            self._settle_channels()
        if self.held_out:
            self.sources = self._part(self.held_out, self.validation)
        whys = [f"{len(files)} {reason} ({self._few(files)})" for reason, files in sorted(skipped.items()) if reason]
        why = f"skipped: {'; '.join(whys) or 'none'}"
        files, used = (sum(len(source.files) for source in sources) for sources in (found, self.sources))
        self.classes = tuple(sorted({self.class_name(source) for source in self.sources})) if self.labels else ()
        frames = sum(source.frames for source in self.sources)
        self.summary = f"{name}: {count(files, 'file')} found, {used} used, {count(len(self.sources), 'clip')}"
        self.summary += f" of {frames} frames in all"
        if apart := usable - len(self.sources):
            self.summary += f", {count(apart, 'clip')} {'to train on' if self.validation else 'held out'}"
        if not self.sources and apart:
            raise DataError(f"{self.summary}: none is left to train on")
        if not self.sources:
            wanted = ".gif, .webp, .apng, .png, .jpg, videos, and latents in .npy or .pt"
            raise DataError(f"{self.summary}; {why}. Wanted: {wanted}, of {self.span}+ frames (--frames)")
        self.summary += self._described(why)
        self.digests = self.digests_without(0)
        rates = sorted(float(1 / (source.period * source.unit)) for source in self.sources if source.unit)
        self.rate = rates[len(rates) // 2] / self.frame_stride if rates else None  # of most clips, frames a second

    def _reason_to_skip(self, source: Source, moving: set[Path]) -> str:
        """Why a clip cannot be used, the first reason of several; "" if it can."""
        (height, width), stills = height_width(self.size or 1), source.kind == "stills" and self.span > 1
        too_small, rate = source.height < height or source.width < width, f" at --fps {self.fps:g}" if self.fps else ""
        reasons = {
            f"unusable: {source.note}": source.kind == "broken",
            "of one picture, no .png or .jpg of a next number (--frames 1 takes it)": stills and source.frames == 1,
            "beside videos or animations": stills and source.files[0].parent in moving,
            "without times, which --fps needs": self.fps and not source.unit,
            f"shorter than {self.span} frames{rate}": source.frames < self.span,
            f"smaller than {height}x{width}": source.kind == "latent" and too_small,
            "in no sub-folder, so without a label": self.labels and self.class_name(source) is None,
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _few(self, files: list[Path]) -> str:
        """The names of the first three."""
        return few([file.relative_to(self.folder) for file in files[:4]])

    def digests_without(self, held_out: float) -> tuple[str, str]:
        """What tells these clips from others, without a share of them that is held out; and the same as older versions
        wrote it, without the sizes of files."""
        sources = self._part(held_out, False) if held_out else self.sources
        names = [[str(source.files[0].relative_to(self.folder)), source.frames] for source in sources]
        sizes = [[*name, source.stamp[1]] for name, source in zip(names, sources, strict=True)]
        jsons = (json.dumps([each, self.channels]).encode() for each in (sizes, names))
        return tuple(hashlib.sha256(each).hexdigest() for each in jsons)

    def _part(self, held_out: float, validation: bool) -> list[Source]:
        """The clips that are held out, or the others, in the order of their names, whose hashes decide."""
        sources = {source.files[0].relative_to(self.folder): source for source in self.sources}
        names = sorted(sources, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
        count = max(1, round(held_out * len(names)))
        return [sources[name] for name in sorted(names[:count] if validation else names[count:])]

    def _settle_channels(self) -> None:
        kinds = {(source.kind == "latent", source.channels): source.files[0] for source in self.sources}
        if len(kinds) > 1:
            one, other = list(kinds.values())[:2]
            raise DataError(f"{one} and {other} differ: use pictures alone or latents alone, of one number of channels")
        ((self.latent, self.channels),) = kinds
        if self.latent and (self.flip or self.grayscale):
            raise DataError(f"{self.folder} holds latents, which can be neither mirrored nor made grey")
        if not self.latent and self.latent_scale != 1:
            raise DataError(f"{self.folder} holds pictures, and a latent scale is for latents")
        self.channels = 1 if self.grayscale else self.channels
        if self.size is None:
            sizes = sorted({(source.height, source.width) for source in self.sources}) if self.latent else [(32, 32)]
            if len(sizes) > 1:
                one, other = ("x".join(map(str, size)) for size in (sizes[0], sizes[-1]))
                raise DataError(f"{self.folder} holds latents of {one} and {other}: --size crops them alike")
            self.size = sizes[0] if sizes[0][0] != sizes[0][1] else sizes[0][0]

    def _described(self, skipped: str) -> str:
        """The end of the summary: what the clips were understood to be, what was skipped, and lines of warnings."""
        notes = defaultdict(list)
        for source in self.sources:
            notes[source.note].append(source.files[0])
        warned = [f"{self._few(files)} {note}" for note, files in notes.items() if note]
        shown = {source: np.diff([*source.times, source.end]) / float(source.period) for source in self.sources}
        held = [source.files[0] for source, each in shown.items() if each[each > self.span].sum() > each.sum() / 10]
        if held and self.span > 1:
            warned.append(f"{self._few(held)} for a tenth of the time or more stand still for over {self.span} frames")
        if self.latent:
            some = self.sources[:: max(1, len(self.sources) // 8)][:8]
            deviations = {source.files[0]: open_latent(source.files[0]).float().std() for source in some}
            if bad := [file for file, each in deviations.items() if not each.isfinite()]:
                warned.append(f"{self._few(bad)} hold NaN or infinite numbers and are skipped where these are drawn")
            finite = [each.item() for each in deviations.values() if each.isfinite()]
            deviation = sum(finite) / max(1, len(finite)) * self.latent_scale
            if finite and not 0.5 < deviation < 2:
                hint = f"; --latent-scale {self.latent_scale / deviation:.3g} makes it 1" if deviation > 0 else ""
                warned.append(f"the latents' standard deviation is {deviation:.2g}, far from noise's, which is 1{hint}")
            frames = sorted({source.frames for source in self.sources})
            lengths = " to ".join(map(str, dict.fromkeys((frames[0], frames[-1]))))
            about = f"{lengths} frames of {some[0].height}x{some[0].width}, standard deviation {deviation:.2g}"
            kinds = f"latents of {self.channels} channels, {about}"
        else:
            stills = "series of stills" if self.span > 1 else "still"
            counts = Counter(source.kind for source in self.sources)
            names = {"video": "video", "animation": "animation", "stills": stills}
            found = [(counts[kind], name) for kind, name in names.items() if counts[kind]]
            kinds = ", ".join(f"{count} {name}{'s' * (count > 1 and name[-1] != 's')}" for count, name in found)
        return f" ({kinds}); {skipped}" + "".join(f"\nwarning: {text}" for text in warned)

    def class_name(self, source: Source) -> str | None:
        """The sub-folder of the folder that the clip is in."""
        parts = source.files[0].relative_to(self.folder).parts
        return parts[0] if len(parts) > 1 else None

    def _picture(self, image: Image.Image) -> np.ndarray:
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 8
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        rgba = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        (height, width), mode = height_width(self.size), "L" if self.grayscale else "RGB"
        larger = flat.width >= width and flat.height >= height  # of a smaller one BOX would repeat pixels
        way = Image.Resampling.BOX if larger else Image.Resampling.BICUBIC
        fitted = ImageOps.fit(flat.convert(mode), (width, height), way)
        return np.asarray(fitted).reshape(height, width, self.channels)

    def _pictures(self, source: Source, wanted: list[int]) -> np.ndarray:
        """(T, H, W, C) of bytes. While there is room, pictures are kept and not decoded again in this process."""
        name = source.files[0]
        kept = before = self.cache.get(name, {})
        if not kept.keys() >= set(wanted):
            distinct = sorted(set(wanted))
            every = range(distinct[-1] + 1)  # an animation is decoded from its beginning
            bytes_needed = len({*every} - before.keys()) * math.prod(height_width(self.size)) * self.channels
            read = list(every) if source.kind == "animation" and bytes_needed <= self.room else distinct
            new = {number: self._picture(image) for number, image in read_images(source, read) if number not in before}
            together = np.stack(list(new.values()))  # small arrays that stay would keep the heap from being used again
            kept = before | dict(zip(new, together, strict=True))
            if together.nbytes <= self.room:
                self.cache[name] = kept
                self.room -= together.nbytes
        return np.stack([kept[number] for number in wanted])

    def window(self, source: Source, start: int) -> Tensor:
        """(C, T, H, W) from frame `start` on. Raises what `read_images` does."""
        wanted = range(start, start + self.span, self.frame_stride)
        if source.kind == "latent":
            height, width = height_width(self.size)
            y, x = (source.height - height) // 2, (source.width - width) // 2
            latent = open_latent(source.files[0])
            if latent.shape != (source.channels, source.frames, source.height, source.width):
                raise DataError("has changed since the start")
            latent = latent[:, list(wanted), y : y + height, x : x + width].float() * self.latent_scale
            if not latent.isfinite().all():
                raise DataError("holds NaN or infinite numbers")
            return latent
        pictures = self._pictures(source, source.pictures(wanted))
        return torch.from_numpy(pictures).permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        epoch, position = divmod(number, len(self.sources))
        order, random = _epoch_order(self.seed, epoch, len(self.sources)), _random(self.seed, number, 1)
        for offset in range(len(self.sources)):  # a damaged file's turn goes to the next whole one
            source = self.sources[order[(position + offset) % len(self.sources)]]
            try:
                starts = 1 if self.from_start else source.frames - self.span + 1
                window = self.window(source, int(random.integers(starts)))
            except Exception as error:
                if is_out_of_memory(error):  # no fault of the file's
                    raise
                file = source.files[0]
                if file not in self.passed_over:  # once in each process; a new line, lest it stand in a progress bar
                    reason = str(error) if isinstance(error, DataError) else f"cannot be decoded: {error}"
                    print(f"\n{file} is skipped: it {reason}", file=sys.stderr)
                self.passed_over.add(file)
                continue
            window = window.flip(-1) if self.flip and random.integers(2) else window
            label = self.classes.index(self.class_name(source)) if self.labels else -1
            return window, label
        raise DataError(f"{self.folder}: not one file can be decoded")


def open_data(args: argparse.Namespace, index: Path | None = None) -> Dataset:
    """What train.py's arguments ask for: clips under `args.data`, or moving digits. Its attribute `judged_on` is the
    clips that `args.held_out` keeps from it, of digits those of a seed of their own, or None. Raises DataError."""
    if not args.data:
        shape = args.frames, args.size or 32, args.digits
        dataset = MovingDigits(*shape, args.seed)
        dataset.judged_on = MovingDigits(*shape, HELD_OUT_SEED) if args.held_out else None
        return dataset
    options = {name: getattr(args, name) for name in (*DATA_ONLY, "held_out")}
    options |= {"labels": bool(args.labels), "index": index}
    dataset, held_out = FolderClips(args.data, args.frames, args.size, args.seed, **options), None
    if args.held_out:
        held_out = FolderClips(args.data, args.frames, args.size, 0, **options | {"flip": False}, validation=True)
        dataset.classes = held_out.classes = tuple(sorted({*dataset.classes, *held_out.classes}))
    dataset.summary += f"\nlabels: {len(dataset.classes)}" if args.labels else ""
    if never := sorted({*dataset.classes} - {dataset.class_name(source) for source in dataset.sources}):
        dataset.summary += f"\nwarning: all clips of {len(never)} of them are held out ({', '.join(never[:3])})"
    dataset.judged_on = held_out
    return dataset


def list_held_out(dataset: Dataset, path: Path) -> None:
    """Writes the files of a folder's clips that are held out, a line each; of numbered stills the first."""
    if isinstance(dataset.judged_on, FolderClips):
        path.write_bytes(b"".join(os.fsencode(source.files[0]) + b"\n" for source in dataset.judged_on.sources))
