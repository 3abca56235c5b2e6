"""Files become frames with times: animations, numbered stills, videos (with PyAV), latents. `find_sources` says what is
in them, `read_images` and `open_latent` read them."""

import json
import math
import os
import re
import struct
import time
from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from io import BytesIO
from itertools import chain, islice, pairwise
from pathlib import Path
from statistics import median_low, multimode

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence
from PIL.PngImagePlugin import Blend, Disposal
from torch import Tensor
from tqdm import tqdm

from cli import few, write_text_whole

STILLS, LATENTS = (".png", ".jpg", ".jpeg"), (".npy", ".pt")
VIDEOS = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .ogv .flv .wmv .3gp".split())
CUT_ANYWHERE = (".ts", ".mts", ".m2ts", ".mpg", ".mpeg")  # what is cut off from these does not show in their packets
RUN = "checkpoint.pt"  # in the folder of a run of train.py, whose samples are no data
SUFFIXES = (".gif", ".webp", ".apng", *STILLS, *VIDEOS, *LATENTS)
INDEX_FORMAT = 4  # of the file that keeps what the headers said; raised when old ones can no longer be read
KEEP_SECONDS = 300  # how much of a long look at many files a kill may cost
LATENT_CHANNELS = (4, 8, 12, 16, 24, 32, 48, 64, 128, 256)  # that VAEs have


class DataError(ValueError):
    """The data cannot be used; the message says what is wrong and where."""


@dataclass(frozen=True)
class Source:
    """A clip on disk: one file, or numbered stills. Picture i is shown from times[i] until the next one's time, and the
    last until `end`, in units of `unit` seconds. Counted at a rate, with `period` units from one frame to the next,
    frame number j is the picture that is shown at times[0] + (j + 1/2) period. Stills and latents state no times: their
    unit is 0, and they are one period apart."""

    files: tuple[Path, ...]
    kind: str  # "video", "animation", "stills", "latent", or "broken" if it could not be read
    times: tuple[int, ...] = ()
    end: int = 0
    unit: Fraction = Fraction(0)
    period: Fraction = Fraction(1)
    channels: int = 0
    height: int = 0  # as stored
    width: int = 0
    note: str = ""  # what a user should know of it; of a broken one, why
    in_order: bool = False  # a video whose packets do not say when they are shown: it is decoded from its beginning
    stamp: tuple[int, int] = (0, 0)  # time of change and size of the first file, by which a change is seen

    @property
    def frames(self) -> int:
        return max(1, math.ceil((self.end - self.times[0]) / self.period - Fraction(1, 2))) if self.times else 0

    def at_rate(self, fps: float) -> "Source":
        """The same counted at `fps` frames a second, with a note if that shows pictures twice."""
        period = 1 / (Fraction(fps).limit_denominator(10**6) * self.unit)
        slow = f"usually has fewer pictures a second than {fps:g}: frames repeat" if 1.01 * period < self.period else ""
        return replace(self, period=period, note=self.note or slow)

    def pictures(self, numbers: range) -> list[int]:
        """Which picture is on the screen at each of these frames."""
        above, below = self.period.as_integer_ratio()  # times are whole numbers, so whole numbers do
        halves = (self.times[0] + (2 * number + 1) * above // (2 * below) for number in numbers)
        return [bisect(self.times, time) - 1 for time in halves]


def usual_distance(times: list[int]) -> Fraction:
    """The most common distance from a time to the next (the least, of several). Those a tick from it count as the same
    and are averaged: thirtieths of a second are 33, 33 and 34 milliseconds. A tick is a unit, or what all distances are
    multiples of (milliseconds, in a file that counts finer). If fewer than half are the same, as in videos of phones,
    it is the median."""
    distances = [after - before for before, after in pairwise(times)]
    usual, grain = min(multimode(distances)), math.gcd(*distances)
    tick = grain if 4 * grain < usual else min(1, usual - 1)
    alike = [distance for distance in distances if abs(distance - usual) <= tick]
    return Fraction(sum(alike), len(alike)) if 2 * len(alike) >= len(distances) else Fraction(median_low(distances))


def find_sources(clips: Iterable[tuple[Path, ...]], index: Path | None) -> list[Source]:
    """The clips that these files hold. The index says it of those that have not changed since; it is written anew."""
    known, rows = {}, {"format": INDEX_FORMAT}
    with suppress(OSError, ValueError):  # there is none yet, or it is damaged: it will be written anew
        known = json.loads(index.read_text()) if index else {}
    known = known if isinstance(known, dict) and known.get("format") == INDEX_FORMAT else {}

    def look(files: tuple[Path, ...]) -> Source:
        if files[0].suffix.lower() in VIDEOS:
            import_av(files[0])  # also if the index knows the file
        name, key = str(files[0]), [len(files), *(_stamp(files[0]) if os.path.exists(files[0]) else ())]
        same = name in known and known[name]["key"] == key
        source = _from_row(files, known[name]) if same else _probe(files)
        if source.kind != "broken":
            rows[name] = known[name] if same else {"key": key} | vars(replace(source, files=()))
        return source

    sources, kept = [], time.monotonic()
    for files in tqdm(clips, desc="looking at files", unit="clip", delay=2):
        while (source := look(files)).kind == "broken" and len(files) > 1:  # does not cost the pictures after it
            sources, files = [*sources, replace(source, files=files[:1])], files[1:]
        whole = len(files) == 1 or source.kind == "stills"  # else: animations whose names happen to be numbered
        sources += [source] if whole else [look((file,)) for file in files]
        if index and time.monotonic() - kept > KEEP_SECONDS:
            write_text_whole(index, json.dumps(known | rows, default=Fraction.as_integer_ratio))
            kept = time.monotonic()
    if index and rows != known:
        if known and (changed := sorted(name for name in known | rows if known.get(name) != rows.get(name))):
            tqdm.write(f"new, gone or changed since the last start: {len(changed)} ({few(changed)})")
        write_text_whole(index, json.dumps(rows, default=Fraction.as_integer_ratio))
    return sources


def _from_row(files: tuple[Path, ...], row: dict) -> Source:
    row = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items() if name != "key"}
    return Source(**row | {"files": files} | {name: Fraction(*row[name]) for name in ("unit", "period")})


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_mtime_ns, status.st_size


def _probe(files: tuple[Path, ...]) -> Source:
    """Reads what a file says of itself."""
    path, suffix = files[0], files[0].suffix.lower()
    try:
        stamp = _stamp(path)
        if path.name == RUN:
            raise DataError("belongs to a run, and so does all beside it")
        if suffix in LATENTS:
            latent = open_latent(path)
            channels, frames, height, width = latent.shape
            looks = f"is of shape {tuple(latent.shape)}, which looks like (T, C, H, W): a latent is (C, T, H, W)"
            note = looks if channels not in LATENT_CHANNELS and frames in LATENT_CHANNELS else ""
            return Source(files, "latent", tuple(range(frames)), frames, channels=channels, height=height,
                          width=width, note=note, stamp=stamp)  # fmt: skip
        if suffix in VIDEOS:
            return replace(_probe_video(import_av(path), path), stamp=stamp)
        with Image.open(path) as image:
            shape = {"channels": 3, "height": image.height, "width": image.width, "stamp": stamp}
            durations = [] if image.format in ("JPEG", "MPO") else _durations(image, path)
        if len(durations) < 2:
            return Source(files, "stills", tuple(range(len(files))), len(files), **shape)
        tick = 10 if suffix == ".gif" else 1  # milliseconds, in which the file counts
        *times, end = (np.cumsum([0, *durations]).round().astype(int) // tick).tolist()
        return Source(files, "animation", tuple(times), end, Fraction(tick, 1000), usual_distance(times), **shape)
    except Exception as error:  # Pillow, FFmpeg, torch and numpy raise many kinds for a damaged file
        reason = error.strerror if isinstance(error, FileNotFoundError | PermissionError) else "cannot be decoded"
        return Source(files, "broken", note=str(error).splitlines()[0] if isinstance(error, DataError) else reason)


def _durations(image: Image.Image, path: Path) -> list[float]:
    """Milliseconds that each picture of an animation is shown. Up to 10 stand for 100, as all browsers have it."""
    found = []
    if image.format == "WEBP":  # Pillow would decode each picture to say how long it is shown
        content, place = path.read_bytes(), 12
        while place + 8 <= len(content):  # a chunk of the container: its name, its size, what is in it
            name, size = content[place : place + 4], int.from_bytes(content[place + 4 : place + 8], "little")
            if name == b"ANMF" and place + 8 + size <= len(content):  # after its picture's place and size: three bytes
                found.append(int.from_bytes(content[place + 20 : place + 23], "little"))
            place += 8 + size + size % 2
    elif image.format == "GIF":
        with suppress(IndexError):  # cut off: what is there is a shorter clip
            for part, *_ in _gif_parts(image):
                found.append(part.info["duration"])
    else:
        numbers = range(int(getattr(image, "default_image", False)), getattr(image, "n_frames", 1))  # past a poster
        with suppress(Exception):  # cut off, too
            for number in numbers:
                image.seek(number)
                found.append(image.info.get("duration", 0))
    return [duration if duration > 10 else 100 for duration in found]


def import_av(path: Path):
    """PyAV. Raises DataError if it is not installed."""
    try:
        import av
    except ImportError:
        raise DataError(f"{path} is a video, which needs PyAV: pip install av") from None
    return av


@contextmanager
def _open_video(av, path: Path) -> Iterator[tuple]:
    """The container, its first stream that is no cover picture, and the decoder of that."""
    with av.open(f"file:{path}") as container:  # "file:", lest a name with a colon be taken for a protocol
        streams = [each for each in container.streams.video if not each.disposition & each.disposition.attached_pic]
        if not streams:
            raise DataError("has no video in it")
        stream, decoder = streams[0], streams[0].codec_context
        with_alpha = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)  # FFmpeg's own leave transparency out
        if with_alpha and stream.metadata.get("alpha_mode") == "1":
            decoder = av.CodecContext.create(with_alpha, "r")
        yield container, stream, decoder


def _frames_of(av, decoder, packet) -> list:
    """A packet's frames, without those that cannot be decoded or that the decoder marks as corrupt."""
    with suppress(av.FFmpegError):
        return [frame for frame in decoder.decode(packet) if not frame.is_corrupt]
    return []


def _probe_video(av, path: Path) -> Source:
    """When a video's frames are shown: by its packets; or by decoding it, if they cannot tell or may have been cut."""
    packets, frames, whole = [], [], path.suffix.lower() not in CUT_ANYWHERE
    with _open_video(av, path) as (container, stream, decoder):
        unit, rate = stream.time_base, stream.average_rate or stream.guessed_rate or 25
        delayed = stream.codec_context.has_b_frames
        for packet in container.demux(stream):
            whole = whole and not packet.is_corrupt
            if packet.size and not packet.is_discard:  # an edit list's: decoded, and not shown
                packets.append((packet.pts, packet.duration or 0))
            frames = frames or _frames_of(av, decoder, packet)
    if not frames:
        raise DataError("has no frame that can be decoded")
    first, times = frames[0], [pts for pts, _ in packets]
    note = "is HDR, which is shown as if it were not" if first.color_trc in (16, 18) else ""  # PQ and HLG
    note = "is interlaced, and moving edges are combed" if first.interlaced_frame else note
    # A stream whose frames are shown in another order than stored, and whose times say otherwise, has wrong times.
    in_order = None in times or len(set(times)) < len(times) or (delayed and times == sorted(times))
    if in_order or not whole:
        with _open_video(av, path) as (container, stream, decoder):
            decoded = chain.from_iterable(_frames_of(av, decoder, packet) for packet in container.demux(stream))
            stamps = [(frame.pts, frame.dts, frame.duration or 0) for frame in decoded]
    if in_order:
        times, last = best_effort([stamp[:2] for stamp in stamps], 1 / (rate * unit)), stamps[-1][2]
    else:
        shown = set(times) if whole else {pts for pts, _, _ in stamps}
        packets = sorted(packet for packet in packets if packet[0] in shown and packet[0] >= first.pts)
        times, last = [pts for pts, _ in packets], packets[-1][1]
    period = usual_distance(times) if len(times) > 1 else Fraction(max(1, last))
    end = times[-1] + (last if last > 0 else math.ceil(period))
    return Source((path,), "video", tuple(times), end, unit, period, 3, first.height, first.width, note, in_order)


def best_effort(stamps: list[tuple[int | None, int | None]], period: Fraction) -> list[int]:
    """Rising times of decoded frames from their (pts, dts), after FFmpeg's rule: of the two the one that has gone
    backwards less often; and where neither moves on, one period after the frame before."""
    times, faults, last = [], [0, 0], [-math.inf, -math.inf]
    for pts, dts in stamps:
        for which, stamp in enumerate((pts, dts)):
            if stamp is not None:
                faults[which] += stamp <= last[which]
                last[which] = stamp
        time = pts if pts is not None and (dts is None or faults[0] <= faults[1]) else dts
        if times and (time is None or time <= times[-1]):
            time = times[-1] + max(1, round(period))
        times.append(0 if time is None else time)
    return times


def open_latent(path: Path) -> Tensor:
    """(C, T, H, W) of real numbers, not yet read from the disk. Raises DataError for anything else."""
    if path.suffix.lower() == ".pt":
        with open(path, "rb") as file:
            if file.read(1) == b"\x80":  # a bare pickle, which cannot be mapped
                raise DataError("is a pickle or of torch's old file format: torch.save it again")
        latent = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not isinstance(latent, Tensor):
            raise DataError(f"holds a {type(latent).__name__}, and a latent is one tensor (C, T, H, W)")
        kind = latent.dtype if latent.layout == torch.strided else latent.layout
        if kind == latent.layout or not latent.is_floating_point():
            raise DataError(f"holds {kind}, and latents are dense floating-point numbers".replace("torch.", ""))
    else:
        array = np.load(path, mmap_mode="c")
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise DataError(f"holds {array.dtype}, and latents are float16, float32 or float64 in native byte order")
        latent = torch.from_numpy(array)
    if latent.ndim != 4 or 0 in latent.shape:
        batch = ": take the batch's latents apart, a file each" if latent.ndim == 5 else ""
        raise DataError(f"is of shape {tuple(latent.shape)}, and a latent is (C, T, H, W){batch}")
    return latent.detach()


def read_images(source: Source, wanted: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """The pictures of these numbers, which rise, with their number. Raises ValueError if the file is not the one that
    was looked at any more, and what Pillow and FFmpeg raise for a damaged one."""
    if _stamp(source.files[0]) != source.stamp:
        raise DataError("has changed since the start")
    if source.kind == "video":
        yield from _read_video(source, wanted)
    elif source.kind == "stills":
        size = None
        for number in wanted:
            with Image.open(source.files[number]) as image:
                upright = ImageOps.exif_transpose(image)
                if upright.size != (size := size or upright.size):
                    raise DataError(f"goes on with other sizes: {image.filename} is not of {size[0]}x{size[1]}")
                yield number, upright
    else:
        with Image.open(source.files[0]) as image:
            ours = {"GIF": _gif_parts, "PNG": _apng_parts}.get(image.format)
            pictures = _put_together(image, ours(image)) if ours else ImageSequence.Iterator(image)
            for number, picture in zip(range(wanted[-1] + 1), islice(pictures, wanted[-1] + 1), strict=True):
                if number in wanted:
                    yield number, ImageOps.exif_transpose(picture)


def _gif_parts(image: Image.Image) -> Iterator[tuple]:
    """For `_put_together`: each picture is made a GIF of its own. Raises IndexError where the file is cut off."""
    content, none = Path(image.filename).read_bytes(), b"!\xf9\4\0\0\0\0\0"

    def after_palette(flags: int) -> int:  # the place after these flags and the palette that they may promise
        return flags + 1 + (3 << (content[flags] & 7) + 1 if content[flags] & 128 else 0)

    place, control = after_palette(10) + 2, none
    shared = content[10:place]
    while (begins := re.compile(b"[!,;]").search(content, place)) and begins[0] != b";":  # Pillow's are at times padded
        kind, start = begins[0], begins.start()
        place = after_palette(start + 9) + 1 if kind == b"," else start + 2
        while size := content[place]:  # of a piece of data
            place += 1 + size
        block, place = content[start : place + 1], place + 1
        control = block if block[:2] == none[:2] else control  # of the picture that follows (GIF89a, section 23)
        if kind == b"," and all(struct.unpack("<2H", block[5:9])):  # one of no size shows nothing
            kept = none[:3] + bytes([control[3] & 1]) + control[4:] + b",\0\0\0\0"  # all but disposal and place
            palette = b"\0\0\0" if block[9] & 128 else shared  # Pillow takes a shared one before an own grey one
            alone = content[:6] + block[5:9] + palette + kept + block[5:] + b";"
            disposal = min(control[3] >> 2 & 7, 3) - 1  # PNG's numbers are one less; 4 is another name for 3
            yield Image.open(BytesIO(alone)), struct.unpack("<2H", block[1:5]), True, disposal
            control = none


def _apng_parts(image: Image.Image) -> Iterator[tuple]:
    """For `_put_together`."""
    for number in range(int(image.default_image), image.n_frames):
        image.seek(number)
        image.blend_op = Blend.OP_SOURCE  # so Pillow will not mix it
        part = image.crop(image.info["bbox"])
        part = part.point(lambda level: level / 256).convert("L") if part.mode == "I;16" else part
        over = image.info["blend"] == Blend.OP_OVER
        yield part, image.info["bbox"][:2], over, image.info["disposal"]


def _put_together(image: Image.Image, parts: Iterator[tuple]) -> Iterator[Image.Image]:
    """Pictures as browsers show them. Of each part: its corner, whether it is laid over what is there or put in its
    place, and its disposal, as PNG numbers it. Pillow errs where one is transparent, cleared or not a whole picture."""
    canvas = Image.new("RGBA", image.size)
    canvas.info["exif"] = image.getexif().tobytes()
    for part, corner, over, disposal in parts:
        before = canvas.copy()
        (canvas.alpha_composite if over else canvas.paste)(part.convert("RGBA"), corner)
        yield canvas
        canvas = before if disposal == Disposal.OP_PREVIOUS else canvas
        if disposal == Disposal.OP_BACKGROUND:
            canvas.paste((0, 0, 0, 0), (*corner, corner[0] + part.width, corner[1] + part.height))


def _read_video(source: Source, wanted: list[int]) -> Iterator[tuple[int, Image.Image]]:
    """Decodes from a key frame before the first one wanted, or from the beginning."""
    path, first, due = source.files[0], source.times[wanted[0]], list(wanted)
    av = import_av(path)
    # So many seconds before the first one wanted: what follows a key frame may need frames before it, and be left out.
    for back in (math.inf,) if source.in_order else (0, 1, 10, math.inf):
        with _open_video(av, path) as (container, stream, decoder), suppress(av.FFmpegError if back < math.inf else ()):
            target = first - back / source.unit
            if target > source.times[0]:
                container.seek(int(target), stream=stream)
            decoded = chain.from_iterable(_frames_of(av, decoder, packet) for packet in container.demux(stream))
            for number, frame in enumerate(decoded):
                time = source.times[number] if source.in_order else frame.pts
                if time == source.times[due[0]]:
                    yield due.pop(0), _upright(frame, stream.sample_aspect_ratio)
                elif time > source.times[due[0]]:
                    break
                if not due:
                    return
        if len(due) < len(wanted):  # some were given out already
            break
    raise DataError(f"is damaged at {float(source.times[due[0]] * source.unit):.4g} s, picture {due[0]}")


def _upright(frame, pixel_aspect) -> Image.Image:
    """A video's frame as its file means it: transparent where it is, of square pixels, turned and mirrored."""
    alpha = frame.format.name == "pal8" or any(component.is_alpha for component in frame.format.components)
    image = Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA") if alpha else frame.to_image()
    if pixel_aspect and pixel_aspect != 1:
        image = image.resize((max(1, round(image.width * pixel_aspect)), image.height))
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":  # x' = a x + c y, y' = b x + d y, each 1, 0 or -1
            a, b, _, c, d, *_ = np.frombuffer(bytes(data), np.int32).tolist()
            image = image if a else image.transpose(Image.Transpose.TRANSPOSE)
            image = ImageOps.mirror(image) if (a or c) < 0 else image
            image = ImageOps.flip(image) if (d or b) < 0 else image
    return image
