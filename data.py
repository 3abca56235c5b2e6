"""Clips to train on, and clips to look at. Nothing here knows about diffusion or about the model.

Both datasets are endless: sample number n, for every n >= 0, is one (clip, label), and the same number gives the
same clip in every process. So ranks share the data by counting, and a run resumes at the number it had reached.
A clip is float32 (C, T, H, W) with pixels in [-1, 1]; the label is an int, or -1 for data without labels.
"""

import argparse
import hashlib
import json
import warnings
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from video import SUFFIXES, DataError, Source, find_sources, open_latent, read_images


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
        raise DataError(f"a size is one number, or height and width, not {size}")
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

    A digit is 5/8 of the frame's shorter side high, its start uniform, its speed 1/40 to 1/16 of that side per frame.
    Raises DataError if that side is under 16 pixels or there is no frame or digit.
    """

    channels, latent, digest = 1, False, ""
    classes = tuple("0123456789")

    def __init__(self, frames: int = 16, size: int | tuple[int, int] = 32, digits: int = 1, seed: int = 0):
        short = min(height_width(size))
        if short < 16 or frames < 1 or digits < 1:
            raise DataError(f"moving digits need size >= 16, frames and digits >= 1, not {size}, {frames}, {digits}")
        self.frames, self.size, self.digits, self.seed, self.short = frames, size, digits, seed, short
        self.summary = f"moving digits, {digits} a clip, made on the fly"
        self.glyphs = [_glyph(digit, round(short * 5 / 8)) for digit in range(10)]

    def tracks(self, number: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """What sample `number` shows, digit by digit: its label and its corner's positions y (T,) and x (T,)."""
        random, tracks = _random(self.seed, number), []
        for _ in range(self.digits):
            label = int(random.integers(10))
            speed, angle = random.uniform(self.short / 40, self.short / 16), random.uniform(0, 2 * np.pi)
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


@dataclass(eq=False)
class FolderClips(Dataset):
    """Random windows of the clips under a folder, searched recursively, (C, frames, H, W): animated GIF, WebP and
    APNG, folders of numbered stills, videos (with PyAV), or latents (C, T, H, W) in .npy and .pt files.

    Pictures are RGB on white, or grey; cropped at their centre to the shape wanted and resized. Latents are cropped at
    their centre and have no range. Every epoch goes through the clips in a new order. What cannot be used is counted in
    `summary`; a file that turns out damaged past its header is named in a warning and passed over.
    Raises DataError if the folder does not exist, holds nothing usable or mixes pictures with latents.
    """

    folder: str | Path
    frames: int = 16
    size: int | tuple[int, int] = 32  # one number for a square, or height and width
    seed: int = 0
    labels: bool = False  # True: the folder's sub-folders are the classes
    frame_stride: int = 1  # frames of a clip from one frame of a window to the next
    flip: bool = False  # True: half of the windows are mirrored
    grayscale: bool = False
    latent_scale: float = 1.0  # what latents are multiplied by
    index: Path | None = None  # a file that keeps what the headers said, so that the next start is quick
    cache_bytes: int = 2**30  # of decoded frames that are kept

    def __post_init__(self):
        name, self.folder = self.folder, Path(self.folder)
        self.span = (self.frames - 1) * self.frame_stride + 1
        self.cache, self.room, counts = {}, self.cache_bytes, Counter()
        found = find_sources(self.folder, self.index, series=self.span > 1)
        reasons = [self._reason_to_skip(source) for source in found]
        self.sources = [source for source, reason in zip(found, reasons, strict=True) if reason is None]
        for source, reason in zip(found, reasons, strict=True):
            counts[reason] += len(source.files)
        files, used = counts.total(), counts.pop(None, 0)
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "none"
        broken = ", ".join(str(source.files[0]) for source in found if source.kind == "broken")
        skipped += f" ({broken})" if broken else ""
        clips = f"{len(self.sources)} clips of {sum(source.frames for source in self.sources)} frames in all"
        self.summary = f"{name}: {files} files found, {used} used, {clips}; skipped: {skipped}"
        if not self.sources:
            raise DataError(f"{self.summary}. Looked for {', '.join(SUFFIXES)} of {self.span}+ frames")
        self._settle_channels()
        names = [[str(source.files[0].relative_to(self.folder)), source.frames] for source in self.sources]
        self.digest = hashlib.sha256(json.dumps([names, self.channels]).encode()).hexdigest()
        self.classes = tuple(sorted({self._class_name(source) for source in self.sources})) if self.labels else ()

    def _reason_to_skip(self, source: Source) -> str | None:
        if source.kind == "broken":
            return "that cannot be decoded"
        if source.frames == 1 and self.span > 1:
            return "stills"
        if source.frames < self.span:
            return f"shorter than {self.span} frames"
        height, width = height_width(self.size)
        if source.kind == "latent" and (source.height < height or source.width < width):
            return f"latents smaller than {self.size}"
        if self.labels and self._class_name(source) is None:
            return "in no sub-folder, so without a label"
        return None

    def _settle_channels(self) -> None:
        kinds = {(source.kind == "latent", source.channels): source.files[0] for source in self.sources}
        if len(kinds) > 1:
            one, other = list(kinds.values())[:2]
            raise DataError(f"{one} and {other} are not alike: pictures and latents of any one number of channels")
        ((self.latent, self.channels),) = kinds
        if self.latent and (self.flip or self.grayscale):
            raise DataError(f"{self.folder} holds latents, which can be neither mirrored nor made grey")
        if not self.latent and self.latent_scale != 1:
            raise DataError(f"{self.folder} holds pictures, and a latent scale is for latents")
        self.channels = 1 if self.grayscale else self.channels

    def _class_name(self, source: Source) -> str | None:
        """The sub-folder of the folder that the clip is in."""
        parts = source.files[0].relative_to(self.folder).parts
        return parts[0] if len(parts) > 1 else None

    def _picture(self, image: Image.Image) -> np.ndarray:
        if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip to 8
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        rgba = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        (height, width), mode = height_width(self.size), "L" if self.grayscale else "RGB"
        fitted = ImageOps.fit(flat.convert(mode), (width, height), Image.Resampling.BOX)
        return np.asarray(fitted).reshape(height, width, self.channels)

    def _pictures(self, source: Source, wanted: range) -> np.ndarray:
        """(T, H, W, C) of bytes. While there is room, frames are kept and not decoded again in this process."""
        name = source.files[0]
        kept = before = self.cache.get(name, {})
        if not kept.keys() >= set(wanted):
            read = range(wanted[-1] + 1) if source.kind == "pictures" else wanted  # an animation from its beginning on
            images = zip(read, read_images(source, read), strict=True)
            kept = before | {number: self._picture(image) for number, image in images if number not in before}
            cost = sum(frame.nbytes for number, frame in kept.items() if number not in before)
            if cost <= self.room:
                self.cache[name] = kept
                self.room -= cost
        return np.stack([kept[number] for number in wanted])

    def _window(self, source: Source, start: int) -> Tensor:
        """(C, T, H, W) from frame `start` on."""
        wanted = range(start, start + self.span, self.frame_stride)
        if source.kind == "latent":
            height, width = height_width(self.size)
            y, x = (source.height - height) // 2, (source.width - width) // 2
            latent = open_latent(source.files[0])[:, wanted.start : wanted.stop : wanted.step]
            latent = latent[..., y : y + height, x : x + width].float() * self.latent_scale
            if not latent.isfinite().all():
                raise ValueError("NaN or infinite numbers in it")
            return latent
        pictures = self._pictures(source, wanted)
        return torch.from_numpy(pictures).permute(3, 0, 1, 2).float() / 127.5 - 1

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        epoch, position = divmod(number, len(self.sources))
        order, random = _epoch_order(self.seed, epoch, len(self.sources)), _random(self.seed, number, 1)
        for offset in range(len(self.sources)):  # a damaged file's turn goes to the next whole one
            source = self.sources[order[(position + offset) % len(self.sources)]]
            try:
                window = self._window(source, int(random.integers(source.frames - self.span + 1)))
            except Exception as error:
                warnings.warn(f"{source.files[0]} cannot be decoded and is skipped: {error}", stacklevel=2)
                continue
            window = window.flip(-1) if self.flip and random.integers(2) else window
            label = self.classes.index(self._class_name(source)) if self.labels else -1
            return window, label
        raise DataError(f"{self.folder}: not one file can be decoded")


def open_data(args: argparse.Namespace, index: Path | None = None) -> Dataset:
    """What train.py's arguments ask for: the clips under `args.data`, or the moving digits. Raises DataError."""
    if not args.data:
        return MovingDigits(args.frames, args.size, args.digits, args.seed)
    options = {name: getattr(args, name) for name in ("frame_stride", "flip", "grayscale", "latent_scale")}
    return FolderClips(args.data, args.frames, args.size, args.seed, args.labels == "folder", index=index, **options)


def to_images(clips: Tensor) -> np.ndarray:
    """(B, C, T, H, W) with pixels in [-1, 1] -> (B, T, H, W, 3) uint8. Raises ValueError if C is not 1 or 3."""
    if clips.shape[1] not in (1, 3):
        raise ValueError(f"clips of {clips.shape[1]} channels are not pictures: 1 or 3 can be shown")
    pixels = ((clips.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).expand(-1, -1, -1, -1, 3).numpy()


def tile(images: np.ndarray, columns: int, scale: int, gap: int = 2) -> Image.Image:
    """(N, H, W, 3) -> one picture, row by row, with grey gaps, enlarged."""
    missing = -len(images) % columns
    cells = np.pad(images, [(0, missing), (gap, 0), (gap, 0), (0, 0)], constant_values=128)
    rows = cells.reshape(-1, columns, *cells.shape[1:]).swapaxes(1, 2)
    picture = np.pad(rows.reshape(-1, columns * cells.shape[2], 3), [(0, gap), (0, gap), (0, 0)], constant_values=128)
    return ImageOps.scale(Image.fromarray(picture), scale, Image.Resampling.NEAREST)


def save_gif(clips: Tensor, path: str | Path, columns: int | None = None, scale: int = 3, fps: int = 12) -> None:
    """Clips (B, C, T, H, W) as one looping animated GIF, a grid of `columns` (default: about square).

    Where nothing in the grid changes from one frame to the next, Pillow writes one frame of twice the duration."""
    images = to_images(clips)
    columns = columns or int(np.ceil(len(images) ** 0.5))
    frames = [tile(frame, columns, scale) for frame in images.swapaxes(0, 1)]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)


def save_strip(clips: Tensor, path: str | Path, scale: int = 2) -> None:
    """Clips (B, C, T, H, W) as one PNG for papers: a clip a row, time to the right."""
    images = to_images(clips)
    tile(images.reshape(-1, *images.shape[2:]), images.shape[1], scale).save(path, format="PNG")


def save_latents(clips: Tensor, path: str | Path, latent_scale: float) -> None:
    """Clips (B, C, T, H, W) as one .npy file, float32, at the scale that their VAE gave and takes."""
    np.save(path, (clips.detach().float().cpu() / latent_scale).numpy())
