"""Files become frames with times. In most tests picture i shows its number i as eight black or white blocks."""

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fails_with_one_line
from PIL import Image

import train
import video
from data import DataError, FolderClips, clip_files


def picture(number: int, noise: int = 0) -> Image.Image:
    """64 x 64, with the bits of `number` as white blocks, four to a row; `noise` makes it large in a file."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    pixels = np.asarray(bits, np.int16).reshape(2, 4).repeat(32, 0).repeat(16, 1)
    pixels = pixels + np.random.default_rng(number).integers(-noise, noise + 1, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


def numbers(pixels: torch.Tensor | np.ndarray) -> list[int]:
    """Of a window (C, T, H, W) in [-1, 1], or of pictures (T, H, W, C) of bytes; -1 of one with a grey block."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1
    blocks = pixels.mean(0).unflatten(1, (2, -1)).unflatten(3, (4, -1)).mean((2, 4)).flatten(1)  # (T, 8)
    found = [sum(int(bright > 0) << bit for bit, bright in enumerate(frame)) for frame in blocks]
    return [number if (frame.abs() > 0.5).all() else -1 for number, frame in zip(found, blocks, strict=True)]


def write_video(path: Path, codec: str = "h264", times: Sequence[int] = range(40), unit=Fraction(1, 10), rate: int = 10,
                noise: int = 0, aspect: int = 1, last: int = 0, **options) -> None:  # fmt: skip
    """Picture i from times[i] units on, and the last one for `last`; a key frame every ten."""
    av = pytest.importorskip("av", reason="pip install av")
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"g": "10", **options})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 10**7
        stream.time_base = stream.codec_context.time_base = unit
        stream.codec_context.sample_aspect_ratio = aspect
        packets = []
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_image(picture(number, noise))
            frame.pts, frame.time_base = time, unit
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if last:
            max(packets, key=lambda packet: packet.pts).duration = last
        container.mux(packets)


def write_animation(path: Path, sequence: Sequence[int], duration: int | list[int] = 100, **options) -> None:
    first, *rest = map(picture, sequence)
    first.save(path, save_all=True, append_images=rest, duration=duration, **options)


def opened(folder: Path, **options) -> tuple[FolderClips, video.Source]:
    """A folder's one clip."""
    data = FolderClips(folder, **{"frames": 8, "size": 64} | options)
    (source,) = data.sources
    return data, source


def all_pictures(source: video.Source) -> np.ndarray:
    images = video.read_images(source, list(range(len(source.times))))
    return np.stack([np.asarray(image.convert("RGB")) for _, image in images])


def ffmpeg(*words) -> bytes:
    pytest.importorskip("av", reason="pip install av")
    tool = pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg").get_ffmpeg_exe()
    command = [tool, "-hide_banner", "-loglevel", "error", "-y", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def as_ffmpeg_shows(path: Path) -> np.ndarray:
    """The pictures that FFmpeg's own command gives out, each once."""
    raw = ffmpeg("-i", f"file:{path}", "-f", "rawvideo", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-")
    return np.frombuffer(raw, np.uint8).reshape(-1, 64, 64, 3).copy()


OPEN_GOP = "bframes=4:open-gop=1:keyint=10:min-keyint=10:scenecut=0:log-level=none"


@pytest.mark.parametrize("name, codec, options", [
    ("a.mp4", "mpeg4", {}), ("a.mp4", "mpeg4", {"bf": "2"}), ("a.mov", "h264", {}), ("a:b.mp4", "h264", {}),
    ("a.avi", "mpeg4", {"bf": "2"}), ("a.mkv", "mpeg4", {}), ("a.webm", "libvpx", {}), ("a.flv", "h264", {}),
    ("a.ts", "h264", {}), ("a.m2ts", "h264", {}), ("a.mpg", "mpeg2video", {"bf": "2"}), ("a.3gp", "mpeg4", {}),
    ("a.mp4", "libx265", {"x265-params": OPEN_GOP}),
])  # fmt: skip
def test_videos_are_read_from_any_frame_on(tmp_path, name, codec, options):
    unit = Fraction(1, 25) if name == "a.mpg" else Fraction(1, 10)
    write_video(tmp_path / name, codec, unit=unit, **options)
    data, source = opened(tmp_path, frames=3, frame_stride=2, cache_bytes=0)
    assert "1 clip of 40 frames in all (1 video)" in data.summary
    for start in range(0, 36, 1 if name == "a.mp4" else 7):
        assert numbers(data.window(source, start)) == [start, start + 2, start + 4]
    if "libx265" not in codec:
        assert numbers(all_pictures(source)) == numbers(as_ffmpeg_shows(tmp_path / name)) == list(range(40))


def test_pictures_come_in_the_right_order_whose_times_run_backwards_as_they_are_stored(tmp_path):
    write_video(tmp_path / "a.avi", "h264", bf="3")  # an AVI file does not say when such frames are shown
    data, source = opened(tmp_path, frames=3)
    shown = numbers(all_pictures(source))
    assert source.in_order and shown == numbers(as_ffmpeg_shows(tmp_path / "a.avi")) == list(range(40))
    for start in (0, 11, 37):
        assert numbers(data.window(source, start)) == source.pictures(range(start, start + 3))
    stamps = [(1, 2), (3, 3), (4, 4), (2, 5), (7, None), (6, None), (None, None)]
    assert video.best_effort(stamps, Fraction(2)) == [1, 3, 4, 5, 7, 9, 11]


def test_a_window_late_in_a_video_is_not_decoded_from_its_beginning(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", "mpeg4")
    (data, source), decoded, frames_of = opened(tmp_path, frames=3), [], video._frames_of
    monkeypatch.setattr(video, "_frames_of", lambda *given: decoded.append(given) or frames_of(*given))
    assert numbers(data.window(source, 35)) == [35, 36, 37] and len(decoded) < 12


def test_the_rate_is_the_most_common_distance_and_a_tick_more_or_less_is_the_same():
    for times, distance in (
        ([0, 33, 67, 100, 133, 167, 200], Fraction(200, 6)),  # thirtieths in milliseconds
        ([0, 3, 6, 10, 13, 16, 20], Fraction(20, 6)),  # and in hundredths
        ([0, 528, 1072, 1600, 2128, 2672, 3200], Fraction(3200, 6)),  # milliseconds, in a file that counts finer
        ([0, 3014, 5987, 8990, 11979, 15003, 18020], 3003),  # jitter
        ([0, 1, 2, 4, 5, 6], 1), ([0, 512, 1024, 2048, 2560], 512), ([0, 4, 8, 9, 13], 4), ([0, 5, 6], 1),
    ):  # fmt: skip
        assert video.usual_distance(times) == distance


@pytest.mark.parametrize("name, unit", [("a.mp4", 600), ("a.mkv", 1000)])
@pytest.mark.parametrize("held, periods", [(59, 30), (30, 31), (0, 30)])  # the last, one within, the first
def test_one_held_picture_does_not_change_the_speed_of_the_others(tmp_path, name, unit, held, periods):
    times = [20 * number + 20 * (periods - 1) * (number > held) for number in range(60)]
    last = 20 * periods if held == 59 else 0
    write_video(tmp_path / name, times=times, unit=Fraction(1, unit), rate=unit // 20, last=last, bf="0")
    data, source = opened(tmp_path)
    expected = [*range(held), *[held] * periods, *range(held + 1, 60)]
    assert source.pictures(range(source.frames)) == expected
    for start in (0, 25, len(expected) - 8):
        assert numbers(data.window(source, start)) == expected[start : start + 8]


MERGED = [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 7, 7, 8, 9, 10, 11]  # Pillow merges equal pictures
TITLE = [2000] + [40] * 10 + [1000] + [40] * 8  # a title and a pause, and the rest keeps its speed
TITLED = [0] * 50 + [*range(1, 11)] + [11] * 25 + [*range(12, 20)]


@pytest.mark.parametrize("name, sequence, duration, expected", [
    ("a.gif", MERGED, 100, MERGED), ("a.webp", MERGED, 100, MERGED), ("a.png", MERGED, 100, MERGED),
    ("poster.png", MERGED, 100, MERGED[1:]), ("a.gif", range(20), TITLE, TITLED),
    ("a.webp", range(10), [0] * 9 + [300], [*range(10), 9, 9]),  # up to 10 ms are a tenth of a second, as browsers
    ("a.webp", range(10), [10] * 10, [*range(10)]),  # have it
])  # fmt: skip
def test_animations_play_at_their_speed(tmp_path, name, sequence, duration, expected):
    write_animation(tmp_path / name, sequence, duration, lossless=True, default_image=name == "poster.png")
    data, source = opened(tmp_path)
    assert source.kind == "animation" and source.frames == len(expected)
    assert source.period * source.unit == (Fraction(1, 25) if duration == TITLE else Fraction(1, 10))
    for start in range(source.frames - 7):
        assert numbers(data.window(source, start)) == expected[start : start + 8]


def write_apng(path: Path, colors: np.ndarray | None, parts: list[tuple]) -> None:
    """Of 4 x 4 pixels, each the number of a color (N, 4) in a palette, or 16 bits of grey. Of each picture where it
    begins (x, y), how it is cleared (0 not, 1 to nothing, 2 to what was before), whether it lies over what is there,
    its pixels (H, W)."""
    kind = (8, 3) if colors is not None else (16, 0)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, *kind, 0, 0, 0))]
    chunks += [(b"acTL", struct.pack(">II", len(parts), 0))]
    if colors is not None:
        chunks += [(b"PLTE", colors[:, :3].tobytes()), (b"tRNS", colors[:, 3].tobytes())]
    for number, (x, y, cleared, over, pixels) in enumerate(parts):
        count = max(0, 2 * number - 1)
        place = struct.pack(">5I2H2B", count, *pixels.shape[::-1], x, y, 1, 10, cleared, over)
        rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
        chunks += [(b"fcTL", place), (b"fdAT", struct.pack(">I", count + 1) + rows) if number else (b"IDAT", rows)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in [*chunks, (b"IEND", b"")]))


@pytest.mark.parametrize("seed", range(20))
def test_pictures_of_an_animated_png_lie_over_one_another_as_its_specification_says(tmp_path, seed):
    random = np.random.default_rng(seed)
    colors = random.integers(0, 256, (6, 4), np.uint8)
    colors[:3, 3] = 0, 128, 255
    canvas, parts, expected = np.zeros((4, 4, 4)), [], []
    for number in range(8):
        y, x = random.integers(0, 3, 2) if number else (0, 0)
        pixels = random.integers(0, 6, random.integers(1, 3, 2) if number else (4, 4), np.uint8)
        cleared, over = int(random.integers(0, 3)), bool(random.integers(0, 2))
        parts.append((x, y, cleared, over, pixels))
        before, there = canvas.copy(), (slice(y, y + pixels.shape[0]), slice(x, x + pixels.shape[1]))
        color, alpha = colors[pixels, :3] / 255, colors[pixels, 3:] / 255
        above = np.concatenate([color * alpha, alpha], -1)  # colors times their opacity, which is last
        canvas[there] = above + canvas[there] * (1 - alpha) if over else above
        expected.append(255 * (canvas[..., :3] + 1 - canvas[..., 3:]))  # on white
        if cleared == 1:
            canvas[there] = 0
        canvas = before if cleared == 2 else canvas
    write_apng(tmp_path / "a.png", colors, parts)
    data, source = opened(tmp_path, size=4)
    shown = np.concatenate([data._picture(image)[None] for _, image in video.read_images(source, list(range(8)))])
    assert np.abs(shown - np.stack(expected)).max() < 4


def write_gif(path: Path, parts: list[tuple]) -> None:
    """Of 4 x 4 pixels, each the number of one of 8 greys. Of each picture its corner (x, y), its disposal, the number
    that is transparent or None, whether it has darker greys of its own, its pixels (H, W). Nothing is compressed: the
    table of codes is cleared in time. A picture of no size is in front of the second."""
    content = b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x82, 7, 0) + bytes(np.arange(8, dtype=np.uint8).repeat(3) * 36)
    content += b"\0\0"  # colors too many, as Pillow writes some files
    parts = [*parts[:1], (0, 0, None, None, False, np.zeros((0, 0), int)), *parts[1:]]
    for x, y, disposal, clear, own, pixels in parts:
        control = struct.pack("<BHB", (disposal or 0) << 2 | (clear is not None), 10, clear or 0)
        codes = [code for row in pixels.tolist() for code in (8, *row)] + [9]
        bits = "".join(f"{code:04b}" for code in codes[::-1])  # each in 4 bits, the first one last
        data = int(bits, 2).to_bytes((len(bits) + 7) // 8, "little")
        place = (
            struct.pack("<4HB", x, y, *pixels.shape[::-1], 0x82 * own)
            + bytes(np.arange(8, dtype=np.uint8).repeat(3)) * own
        )
        content += b"" if disposal is clear is None else b"!\xf9\4" + control + b"\0"
        content += b"," + place + bytes([3, len(data)]) + data + b"\0"
    path.write_bytes(content + b";")


@pytest.mark.parametrize("seed", range(40))
def test_pictures_of_an_animated_gif_lie_over_one_another_as_its_specification_says(tmp_path, seed):
    random = np.random.default_rng(seed)
    canvas, parts, expected = np.full((4, 4), 255), [], []  # white where nothing is
    for number in range(8):
        y, x = random.integers(0, 3, 2) if number or seed % 2 else (0, 0)
        pixels = random.integers(0, 8, random.integers(1, 5 - max(y, x) if number == 0 else 4, 2))
        disposal, clear = random.choice([None, 0, 1, 2, 3, 4]), random.choice([None, 3])
        own = bool(random.integers(2))
        parts.append((x, y, disposal, clear, own, pixels))
        before, there = canvas.copy(), (slice(y, y + pixels.shape[0]), slice(x, x + pixels.shape[1]))
        inside = pixels[: 4 - y, : 4 - x]  # what sticks out of the canvas is cut off
        canvas[there] = np.where(inside == clear, canvas[there], inside * (1 if own else 36))
        expected.append(canvas.copy())
        if disposal == 2:
            canvas[there] = 255
        canvas = before if disposal in (3, 4) else canvas  # another name for it
    write_gif(tmp_path / "a.gif", parts)
    data, source = opened(tmp_path, size=4)
    shown = np.concatenate([data._picture(image)[None] for _, image in video.read_images(source, list(range(8)))])
    assert np.array_equal(shown[..., 0], expected)


def test_an_animated_png_of_16_bits_has_its_brightness(tmp_path):
    levels = [65535, 5000, 10000, 15000]
    write_apng(tmp_path / "a.png", None, [(0, 0, 0, 0, np.full((4, 4), level, ">u2")) for level in levels])
    data, source = opened(tmp_path, frames=4, size=4)
    shown = (data.window(source, 0)[0, :, 0, 0] + 1) * 127.5
    assert np.abs(shown.numpy() - np.array(levels) / 256).max() < 1


@pytest.mark.parametrize("fps, expected", [(5, range(1, 17, 2)), (20, [0, 0, 1, 1, 2, 2, 3, 3]), (10, range(8))])
def test_fps_counts_every_source_at_that_rate(tmp_path, fps, expected):
    write_video(tmp_path / "a.mp4")
    write_animation(tmp_path / "b.gif", range(40))
    picture(0).save(tmp_path / "1.png")
    data = FolderClips(tmp_path, frames=8, size=64, fps=fps)
    for source in data.sources:
        assert source.frames == 4 * fps and numbers(data.window(source, 0)) == list(expected)
    assert "1 without times, which --fps needs" in FolderClips(tmp_path, frames=1, size=64, fps=fps).summary


def test_an_edit_list_is_obeyed(tmp_path):
    write_video(tmp_path / "whole.mp4", times=range(100), unit=Fraction(1, 25), g="50")
    ffmpeg("-ss", "2.6", "-i", tmp_path / "whole.mp4", "-t", "1", "-c", "copy", tmp_path / "cut.mp4")
    (tmp_path / "whole.mp4").unlink()
    data, source = opened(tmp_path)
    shown = numbers(all_pictures(source))
    assert shown == numbers(as_ffmpeg_shows(tmp_path / "cut.mp4")) and shown[0] == 65
    windows = [numbers(data.window(source, start)) for start in range(source.frames - 7)]
    assert all(window == sorted(window) and set(window) <= set(shown) for window in windows)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.gif"])
def test_what_is_missing_at_the_end_shortens_the_clip_whatever_its_header_promises(tmp_path, name):
    path = tmp_path / name
    write_animation(path, range(80)) if name == "a.gif" else write_video(path, "mpeg4", range(80), noise=60)
    if name == "a.mp4":  # with its index in front
        ffmpeg("-i", path, "-c", "copy", "-movflags", "+faststart", tmp_path / "b.mp4")
        (tmp_path / "b.mp4").replace(path)
    os.truncate(path, path.stat().st_size * 6 // 10)
    data, source = opened(tmp_path)
    assert 35 < source.frames < 60
    for start in (0, source.frames - 9):  # of a GIF the last picture may be half there
        assert numbers(data.window(source, start)) == list(range(start, start + 8))


def test_pictures_damaged_within_are_not_trained_on(tmp_path):
    write_video(tmp_path / "a.mkv", "h264", range(100), noise=60)
    content = bytearray((tmp_path / "a.mkv").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    (tmp_path / "a.mkv").write_bytes(content)
    (data, source), refused, wrong = opened(tmp_path, cache_bytes=0), 0, 0
    for start in range(source.frames - 7):
        try:
            wrong += numbers(data.window(source, start)) != source.pictures(range(start, start + 8))
        except DataError as error:
            refused += "is damaged at" in str(error)
    # The decoder guesses at most of the pictures that lean on a lost one, and does not say so of every one.
    assert refused >= 8 and wrong <= 10


@pytest.mark.parametrize("mirrored", ["", "-display_hflip", "-display_vflip"])
@pytest.mark.parametrize("turned", ["", "-display_rotation 90", "-display_rotation -90", "-display_rotation 180"])
def test_videos_are_turned_and_mirrored_as_they_say(tmp_path, turned, mirrored):
    write_video(tmp_path / "whole.mp4")
    ffmpeg(*turned.split(), *mirrored.split(), "-i", tmp_path / "whole.mp4", "-c", "copy", tmp_path / "a.mp4")
    (tmp_path / "whole.mp4").unlink()
    _, source = opened(tmp_path)
    assert np.abs(all_pictures(source).astype(float) - as_ffmpeg_shows(tmp_path / "a.mp4")).mean() < 4


def test_videos_are_seen_with_square_pixels(tmp_path):
    write_video(tmp_path / "a.mp4", aspect=2)
    _, source = opened(tmp_path)
    assert all_pictures(source).shape == (40, 64, 128, 3)


@pytest.mark.parametrize("name, codec, pixels", [
    ("a.mov", "prores_ks", "yuva444p10le"), ("a.mov", "qtrle", "argb"), ("a.mov", "png", "rgba"),
    ("a.mkv", "ffv1", "yuva420p"), ("a.webm", "libvpx-vp9", "yuva420p"), ("a.webm", "libvpx", "yuva420p"),
])  # fmt: skip
def test_what_is_transparent_in_a_video_is_white(tmp_path, name, codec, pixels):
    half = np.zeros((10, 64, 64, 4), np.uint8)
    half[..., :32, :] = (255, 0, 0, 255)  # red on the left; green on the right, which nobody is to see
    half[..., 32:, :] = (0, 255, 0, 0)
    (tmp_path / "raw").write_bytes(half.tobytes())
    raw = ("-f", "rawvideo", "-pix_fmt", "rgba", "-s", "64x64", "-i", tmp_path / "raw")
    ffmpeg(*raw, "-c:v", codec, "-pix_fmt", pixels, "-auto-alt-ref", "0", tmp_path / name)
    window = FolderClips(tmp_path, frames=8, size=64)[0][0]
    assert window[:, :, :, :28].mean((1, 2, 3)).tolist() == pytest.approx([1, -1, -1], abs=0.15)
    assert window[:, :, :, 36:].min() > 0.9


def test_videos_that_cannot_be_used_or_look_otherwise_than_they_should_are_named(tmp_path):
    write_video(tmp_path / "a.mp4")
    whole, plain = (tmp_path / "a.mp4").read_bytes(), ("-i", tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_bytes(whole[: whole.index(b"mdat") - 4])
    write_video(tmp_path / "c.mp4", times=[0])
    (tmp_path / "d.webm").write_bytes(b"")
    ffmpeg(*plain, "-c", "copy", "-bsf:v", "h264_metadata=transfer_characteristics=16", tmp_path / "pq.mp4")
    ffmpeg(*plain, "-c:v", "libx264", "-flags", "+ildct+ilme", "-x264opts", "tff=1", tmp_path / "fields.mp4")
    summary = FolderClips(tmp_path, frames=8, size=16).summary
    assert "6 files found, 3 used" in summary and "1 shorter than 8 frames (c.mp4)" in summary
    assert "2 unusable: cannot be decoded (b.mp4, d.webm)" in summary and summary.count("warning") == 2
    assert "warning: pq.mp4 is HDR" in summary and "warning: fields.mp4 is interlaced" in summary


def test_a_cover_picture_is_not_the_video(tmp_path):
    write_video(tmp_path / "a.mp4")
    picture(255).save(tmp_path / "cover.jpg")
    words = ("-i", tmp_path / "cover.jpg", "-i", tmp_path / "a.mp4", "-map", "0", "-map", "1", "-c", "copy")
    ffmpeg(*words, "-disposition:v:0", "attached_pic", tmp_path / "b.mp4")
    (tmp_path / "a.mp4").unlink()
    data, source = opened(tmp_path)
    assert source.frames == 40 and numbers(data.window(source, 5)) == list(range(5, 13))


def test_a_lack_of_memory_while_looking_at_an_animation_does_not_make_it_a_still(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    index, read = tmp_path / "run" / "index.json", Path.read_bytes
    write_animation(tmp_path / "a.gif", range(10))
    with monkeypatch.context() as patch, pytest.raises(DataError, match="1 unusable: cannot be decoded"):
        patch.setattr(Path, "read_bytes", no_memory)
        opened(tmp_path, index=index)
    assert Path.read_bytes is read and opened(tmp_path, index=index)[1].frames == 10


@pytest.mark.parametrize("suffix", [".gif", ".npy"])
def test_a_file_that_changes_while_it_is_trained_on_is_named_and_skipped(tmp_path, suffix, capsys):
    def write(name: str, length: int) -> None:
        latent = np.random.default_rng(0).normal(size=(4, length, 8, 8))
        path = tmp_path / f"{name}{suffix}"
        np.save(path, latent) if suffix == ".npy" else write_animation(path, range(length))

    write("a", 20)
    write("whole", 20)
    data = FolderClips(tmp_path, frames=8, size=8)
    write("a", 13)
    assert all(data[n][0].shape[1:] == (8, 8, 8) for n in range(24))
    assert capsys.readouterr().err.count(f"a{suffix} is skipped: it has changed since the start") == 1


def test_a_video_without_pyav_says_what_to_install(tmp_path, monkeypatch, capsys):
    clips, words = tmp_path / "clips", ("--data", tmp_path / "clips", "--out", tmp_path / "run")
    clips.mkdir()
    write_video(clips / "a.mp4")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        assert "a.mp4 is a video, which needs PyAV: pip install av" in fails_with_one_line(capsys, train.main, *words)
    index = tmp_path / "run" / "index.json"
    video.find_sources(clip_files(clips, index, True), index)
    monkeypatch.setitem(sys.modules, "av", None)  # gone again, with an index that knows the file
    assert "which needs PyAV: pip install av" in fails_with_one_line(capsys, train.main, *words)
