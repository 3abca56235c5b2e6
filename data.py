"""Clips to train on, and clips to look at. Nothing here knows about diffusion or about the model.

Both datasets are endless: sample number n, for every n >= 0, is one (clip, label), and the same number gives the
same clip in every process. So ranks share the data by counting, and a run resumes at the number it had reached.
A clip is float32 (C, T, H, W) with pixels in [-1, 1]; the label is an int, or -1 for data without labels.
"""

import warnings
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

CLIP_SUFFIXES = (".gif", ".webp", ".png", ".apng")


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong and where."""


def _random(*seed: int) -> np.random.Generator:
    """A generator that depends on the numbers alone, not on the process."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))


def _glyph(digit: int, height: int) -> np.ndarray:
    """Pillow's built-in TrueType digit, `height` pixels high, in [0, 1], stroked so that it survives at 32 x 32."""
    font = ImageFont.load_default(size=4 * height)
    left, top, right, bottom = font.getbbox(str(digit), stroke_width=height // 6)
    image = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(image).text((-left, -top), str(digit), fill=255, font=font, stroke_width=height // 6)
    width = round(height * image.width / image.height)
    return np.asarray(image.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / 255


def _place(glyph: np.ndarray, y: np.ndarray, x: np.ndarray, size: int) -> np.ndarray:
    """Frames (T, size, size) with the glyph's corner at the subpixel positions (y, x) (T,): bilinear, exact."""
    pixels = np.arange(size, dtype=np.float32)
    rows = np.maximum(0, 1 - np.abs(pixels[None, :, None] - y[:, None, None] - np.arange(glyph.shape[0])))
    columns = np.maximum(0, 1 - np.abs(pixels[None, :, None] - x[:, None, None] - np.arange(glyph.shape[1])))
    return rows.astype(np.float32) @ glyph @ columns.astype(np.float32).transpose(0, 2, 1)


def _bounce(start: float, velocity: float, frames: int, room: float) -> np.ndarray:
    """Positions (T,) of a point moving at constant velocity and bouncing off 0 and `room`."""
    return room - np.abs((start + velocity * np.arange(frames)) % (2 * room) - room)


class MovingDigits(Dataset):
    """Bouncing digits on black, (1, T, size, size), made on the fly from a seed; the label is the first digit.

    A digit is 5/8 of the frame high, its start uniform, its speed 1/40 to 1/16 of the frame per frame.
    Raises DataError if the frame is under 16 pixels or there is no frame or digit.
    """

    channels = 1
    classes = tuple(str(digit) for digit in range(10))

    def __init__(self, frames: int = 16, size: int = 32, digits: int = 1, seed: int = 0):
        if size < 16 or frames < 1 or digits < 1:
            raise DataError(f"moving digits need size >= 16, frames and digits >= 1, not {size}, {frames}, {digits}")
        self.frames, self.size, self.digits, self.seed = frames, size, digits, seed
        self.summary = f"moving digits, {digits} a clip, made on the fly"
        self.glyphs = [_glyph(digit, round(size * 5 / 8)) for digit in range(10)]

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        random = _random(self.seed, number)
        clip, labels = np.zeros((self.frames, self.size, self.size), np.float32), []
        for _ in range(self.digits):
            labels.append(int(random.integers(10)))
            glyph = self.glyphs[labels[-1]]
            speed, angle = random.uniform(self.size / 40, self.size / 16), random.uniform(0, 2 * np.pi)
            room_y, room_x = self.size - glyph.shape[0], self.size - glyph.shape[1]
            y = _bounce(random.uniform(0, room_y), speed * np.sin(angle), self.frames, room_y)
            x = _bounce(random.uniform(0, room_x), speed * np.cos(angle), self.frames, room_x)
            clip = np.maximum(clip, _place(glyph, y, x, self.size))
        return torch.from_numpy(clip * 2 - 1)[None], labels[0]


def _read_frames(path: Path, size: int) -> np.ndarray:
    """All frames of an animation, transparency on white, cropped and resized to (T, size, size, 3) uint8."""
    frames = []
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            rgba = image.convert("RGBA")
            rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
            frames.append(np.asarray(ImageOps.fit(rgb, (size, size), Image.Resampling.BOX)))
    return np.stack(frames)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return _random(seed, epoch).permutation(count)


class FolderClips(Dataset):
    """Random windows of the animated GIF, WebP and APNG files under a folder, (3, T, size, size), searched recursively.

    With `labels` the names of the folder's sub-folders are the classes; files in none of them are left out.

    Every epoch goes through the files in a new order. Stills, clips shorter than `frames` and files that cannot be
    decoded are left out; `summary` counts them and names the last kind. Files are decoded at the start and kept, up to
    `cache_bytes`; of those past it only the header is read then, and a warning names one that turns out damaged.
    Raises DataError if the folder does not exist or holds nothing usable.
    """

    channels = 3

    def __init__(
        self,
        folder: str | Path,
        frames: int = 16,
        size: int = 32,
        seed: int = 0,
        labels: bool = False,
        cache_bytes: int = 2**30,
    ):
        self.folder, self.frames, self.size, self.seed, self.labels = Path(folder), frames, size, seed, labels
        self.cache, self.room, self.paths, broken, reasons = {}, cache_bytes, [], [], Counter()
        for path in _clip_files(self.folder):
            reason = self._reason_to_skip(path)
            reasons[reason] += 1
            if reason is None:
                self.paths.append(path)
            elif reason == "not decodable":
                broken.append(f"\n  not decodable: {path}")
        found, used = reasons.total(), reasons.pop(None, 0)
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
        summary = f"{folder}: {found} files found, {used} used; skipped: {skipped}"
        self.summary = summary + "".join(broken)
        if not self.paths:
            raise DataError(f"{summary}. Looked for animations ({', '.join(CLIP_SUFFIXES)}) of {frames}+ frames")
        self.classes = tuple(sorted({self._class_name(path) for path in self.paths})) if labels else ()

    def _class_name(self, path: Path) -> str | None:
        """The sub-folder of the folder that the file is in."""
        parts = path.relative_to(self.folder).parts
        return parts[0] if len(parts) > 1 else None

    def _reason_to_skip(self, path: Path) -> str | None:
        if self.labels and self._class_name(path) is None:
            return "in no sub-folder, so without a label"
        try:
            if self.room > 0:
                clip = _read_frames(path, self.size)
                count = len(clip)
            else:
                with Image.open(path) as image:
                    clip, count = None, getattr(image, "n_frames", 1)
        except Exception:  # Pillow raises many kinds for a damaged file
            return "not decodable"
        if count == 1 and self.frames > 1:
            return "stills"
        if count < self.frames:
            return f"shorter than {self.frames} frames"
        if clip is not None:
            self.cache[path] = clip
            self.room -= clip.nbytes
        return None

    def _decode(self, path: Path) -> np.ndarray | None:
        """The file's frames; None, with a warning that names it, if it is damaged past its header."""
        if path in self.cache:
            return self.cache[path]
        try:
            return _read_frames(path, self.size)
        except Exception as error:
            warnings.warn(f"{path} cannot be decoded and is skipped: {error}", stacklevel=2)
            return None

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        epoch, position = divmod(number, len(self.paths))
        order = _epoch_order(self.seed, epoch, len(self.paths))
        for offset in range(len(self.paths)):  # a damaged file's turn goes to the next whole one
            path = self.paths[order[(position + offset) % len(self.paths)]]
            clip = self._decode(path)
            if clip is not None and len(clip) >= self.frames:
                start = int(_random(self.seed, number, 1).integers(len(clip) - self.frames + 1))
                window = torch.from_numpy(clip[start : start + self.frames])  # (T, H, W, 3)
                label = self.classes.index(self._class_name(path)) if self.labels else -1
                return window.permute(3, 0, 1, 2).float() / 127.5 - 1, label
        raise DataError("not one file of the folder can be decoded")


def _clip_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: --data wants one with animated GIF, WebP or APNG files in it")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in CLIP_SUFFIXES and path.is_file())


def open_data(
    path: str | None, frames: int, size: int, digits: int = 1, seed: int = 0, labels: bool = False
) -> Dataset:
    """The moving digits if `path` is None, else the folder's clips, with its sub-folders' names as labels if asked.
    Raises DataError."""
    return FolderClips(path, frames, size, seed, labels) if path else MovingDigits(frames, size, digits, seed)


def to_images(clips: Tensor) -> np.ndarray:
    """(B, C, T, H, W) with pixels in [-1, 1] -> (B, T, H, W, 3) uint8. Raises ValueError if C is not 1 or 3."""
    if clips.shape[1] not in (1, 3):
        raise ValueError(f"clips of {clips.shape[1]} channels are not pictures: 1 or 3 can be shown")
    pixels = ((clips.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 4, 1).expand(*[-1] * 4, 3).numpy()


def _tile(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """(N, H, W, 3) -> one picture, row by row, with grey gaps."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    picture = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, np.uint8)
    for index, image in enumerate(images):
        y, x = gap + index // columns * (height + gap), gap + index % columns * (width + gap)
        picture[y : y + height, x : x + width] = image
    return picture


def _enlarge(picture: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(picture)
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def save_gif(clips: Tensor, path: str | Path, columns: int | None = None, scale: int = 3, fps: int = 12) -> None:
    """Clips (B, C, T, H, W) as one looping animated GIF, a grid of `columns` (default: about square).

    Where nothing in the grid changes from one frame to the next, Pillow writes one frame of twice the duration."""
    images = to_images(clips)
    columns = columns or int(np.ceil(len(images) ** 0.5))
    frames = [_enlarge(_tile(images[:, t], columns), scale) for t in range(images.shape[1])]
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=1000 // fps, loop=0)


def save_strip(clips: Tensor, path: str | Path, scale: int = 2) -> None:
    """Clips (B, C, T, H, W) as one PNG for papers: a clip a row, time to the right."""
    images = to_images(clips)
    _enlarge(_tile(images.reshape(-1, *images.shape[2:]), columns=images.shape[1]), scale).save(path, format="PNG")
