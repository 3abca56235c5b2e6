"""Files become frames with times. In most tests picture i shows its number i as eight black or white blocks."""

import shutil
import struct
import subprocess
import sys
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
from data import DataError, FolderClips


def picture(number: int, noise: int = 0) -> Image.Image:
    """64 x 64, with the bits of `number` as white blocks, four to a row; `noise` makes it large in a file."""
    bits = [255 * (number >> bit & 1) for bit in range(8)]
    pixels = np.asarray(bits, np.int16).reshape(2, 4).repeat(32, 0).repeat(16, 1)
    pixels = pixels + np.random.default_rng(number).integers(-noise, noise + 1, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


def numbers(pixels: torch.Tensor | np.ndarray, clear: bool = True) -> list[int]:
    """Of a window (C, T, H, W) in [-1, 1], or of pictures (T, H, W, C) of bytes. `clear`: no block may be grey."""
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1
    blocks = pixels.mean(0).unflatten(1, (2, -1)).unflatten(3, (4, -1)).mean((2, 4))  # (T, 2, 4)
    assert not clear or (blocks.abs() > 0.5).all(), "a block that is neither black nor white"
    return [sum(int(bright > 0) << bit for bit, bright in enumerate(frame)) for frame in blocks.flatten(1)]


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
        for packet in packets:
            container.mux(packet)


def read_all(source: video.Source) -> list[int]:
    images = video.read_images(source, list(range(len(source.times))))
    return numbers(np.stack([np.asarray(image.convert("RGB")) for _, image in images]))


def ffmpeg(*words) -> bytes:
    tool = pytest.importorskip("imageio_ffmpeg", reason="pip install imageio-ffmpeg").get_ffmpeg_exe()
    command = [tool, "-hide_banner", "-loglevel", "error", "-y", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True).stdout


def as_ffmpeg_shows(path: Path) -> list[int]:
    """The numbers of the pictures that FFmpeg's own command gives out, each once."""
    raw = ffmpeg("-i", f"file:{path}", "-f", "rawvideo", "-fps_mode", "passthrough", "-pix_fmt", "rgb24", "-")
    return numbers(np.frombuffer(raw, np.uint8).reshape(-1, 64, 64, 3).copy())


OPEN_GOP = {"x265-params": "bframes=4:open-gop=1:keyint=10:min-keyint=10:scenecut=0:log-level=none"}
CONTAINERS = [
    ("a.mp4", "mpeg4", {}), ("a.mp4", "mpeg4", {"bf": "2"}), ("a.mov", "h264", {}), ("a:b.mp4", "h264", {}),
    ("a.avi", "mpeg4", {"bf": "2"}), ("a.mkv", "mpeg4", {}), ("a.webm", "libvpx", {}), ("a.mp4", "libx265", OPEN_GOP),
    ("a.ts", "h264", {}), ("a.m2ts", "h264", {}), ("a.mpg", "mpeg2video", {"bf": "2"}), ("a.flv", "h264", {}),
    ("a.3gp", "mpeg4", {}),
]  # fmt: skip


@pytest.mark.parametrize("name, codec, options", CONTAINERS)
def test_videos_are_read_from_any_frame_on(tmp_path, name, codec, options):
    unit = Fraction(1, 25) if name == "a.mpg" else Fraction(1, 10)
    write_video(tmp_path / name, codec, unit=unit, **options)
    data = FolderClips(tmp_path, frames=3, size=64, frame_stride=2, cache_bytes=0)
    assert "1 clips of 40 frames in all (1 videos)" in data.summary
    for start in range(0, 36, 1 if name == "a.mp4" else 7):
        assert numbers(data.window(data.sources[0], start)) == [start, start + 2, start + 4]
    if "libx265" not in codec:
        assert read_all(data.sources[0]) == as_ffmpeg_shows(tmp_path / name) == list(range(40))


def test_pictures_come_in_the_right_order_whose_times_run_backwards_as_they_are_stored(tmp_path):
    write_video(tmp_path / "a.avi", "h264", bf="3")  # an AVI file does not say when such frames are shown
    data = FolderClips(tmp_path, frames=3, size=64)
    (source,) = data.sources
    assert source.in_order and read_all(source) == as_ffmpeg_shows(tmp_path / "a.avi") == list(range(40))
    for start in (0, 11, 37):
        assert numbers(data.window(source, start)) == source.pictures(range(start, start + 3))
    assert video.best_effort([(1, 2), (3, 3), (4, 4), (2, 5), (7, None), (6, None), (None, None)], Fraction(2)) == [
        1, 3, 4, 5, 7, 9, 11,
    ]  # fmt: skip


def test_a_window_late_in_a_video_is_not_decoded_from_its_beginning(tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", "mpeg4")
    data, decoded, decode = FolderClips(tmp_path, frames=3, size=64), [], video._decode

    def counted(*arguments):
        for frame in decode(*arguments):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decode", counted)
    assert numbers(data.window(data.sources[0], 35)) == [35, 36, 37]
    assert len(decoded) < 12


def test_the_rate_is_the_most_common_distance_and_a_tick_more_or_less_is_the_same():
    for times, distance in (
        ([0, 33, 67, 100, 133, 167, 200], Fraction(200, 6)),  # thirtieths in milliseconds
        ([0, 3, 6, 10, 13, 16, 20], Fraction(20, 6)),  # and in hundredths
        ([0, 528, 1072, 1600, 2128, 2672, 3200], Fraction(3200, 6)),  # milliseconds, in a file that counts finer
        ([0, 1, 2, 4, 5, 6], 1), ([0, 512, 1024, 2048, 2560], 512), ([0, 4, 8, 9, 13], 4), ([0, 5, 6], 1),
    ):  # fmt: skip
        assert video.usual_distance(times) == distance


@pytest.mark.parametrize("name, unit", [("a.mp4", Fraction(1, 600)), ("a.mkv", Fraction(1, 1000))])
@pytest.mark.parametrize("held, periods", [(59, 30), (30, 31), (0, 30)])  # the last, one within, the first
def test_one_held_picture_does_not_change_the_speed_of_the_others(tmp_path, name, unit, held, periods):
    times = [20 * number + 20 * (periods - 1) * (number > held) for number in range(60)]
    write_video(
        tmp_path / name, times=times, unit=unit, rate=int(1 / unit) // 20, last=20 * periods * (held == 59), bf="0"
    )
    data = FolderClips(tmp_path, frames=8, size=64)
    (source,) = data.sources
    expected = [*range(held), *[held] * periods, *range(held + 1, 60)]
    assert source.pictures(range(source.frames)) == expected
    for start in (0, 25, len(expected) - 8):
        assert numbers(data.window(source, start)) == expected[start : start + 8]


SEQUENCE = [0, 0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 7, 7, 8, 9, 10, 11]


def write_animation(path: Path, sequence: Sequence[int], duration: int | list[int] = 100, **options) -> None:
    first, *rest = map(picture, sequence)
    first.save(path, save_all=True, append_images=rest, duration=duration, **options)


@pytest.mark.parametrize("name, options", [("a.gif", {}), ("a.webp", {"lossless": True}), ("a.png", {})])
def test_animations_play_at_their_speed_though_pillow_merged_their_equal_pictures(tmp_path, name, options):
    write_animation(tmp_path / name, SEQUENCE, **options)
    data = FolderClips(tmp_path, frames=8, size=64)
    (source,) = data.sources
    assert source.kind == "animation" and len(source.times) == 12 and source.frames == 20
    for start in range(13):
        assert numbers(data.window(source, start)) == SEQUENCE[start : start + 8]


def test_a_gif_s_title_is_held_and_the_rest_keeps_its_speed(tmp_path):
    write_animation(tmp_path / "a.gif", range(20), [2000] + [40] * 10 + [1000] + [40] * 8)
    (source,) = FolderClips(tmp_path, frames=8, size=64).sources
    assert source.pictures(range(source.frames)) == [0] * 50 + [*range(1, 11)] + [11] * 25 + [*range(12, 20)]


@pytest.mark.parametrize("duration", [0, 10])
def test_pictures_that_last_no_time_are_shown_for_a_tenth_of_a_second_as_browsers_do(tmp_path, duration):
    write_animation(tmp_path / "a.webp", range(12), duration, lossless=True)
    (source,) = FolderClips(tmp_path, frames=8, size=64).sources
    assert source.period * source.unit == Fraction(1, 10) and source.frames == 12


def test_a_poster_is_not_a_frame_of_its_animation(tmp_path):
    write_animation(tmp_path / "a.png", range(12), default_image=True)
    data = FolderClips(tmp_path, frames=8, size=64)
    assert data.sources[0].frames == 11 and numbers(data.window(data.sources[0], 0)) == list(range(1, 9))


@pytest.mark.parametrize("fps, expected", [(5, range(1, 17, 2)), (20, [0, 0, 1, 1, 2, 2, 3, 3]), (10, range(8))])
def test_fps_counts_every_source_at_that_rate(tmp_path, fps, expected):
    write_video(tmp_path / "a.mp4")
    write_animation(tmp_path / "b.gif", range(40))
    data = FolderClips(tmp_path, frames=8, size=64, fps=fps)
    for source in data.sources:
        assert source.frames == 4 * fps and numbers(data.window(source, 0)) == list(expected)
    picture(0).save(tmp_path / "1.png")
    with pytest.raises(DataError, match="1 that state no times, which --fps needs"):
        for path in ("a.mp4", "b.gif"):
            (tmp_path / path).unlink()
        FolderClips(tmp_path, frames=1, size=64, fps=10)


def test_an_edit_list_is_obeyed(tmp_path):
    write_video(tmp_path / "whole.mp4", times=range(100), unit=Fraction(1, 25), g="50")
    ffmpeg("-ss", "2.6", "-i", tmp_path / "whole.mp4", "-t", "1", "-c", "copy", tmp_path / "cut.mp4")
    (tmp_path / "whole.mp4").unlink()
    data = FolderClips(tmp_path, frames=8, size=64)
    shown = read_all(data.sources[0])
    assert shown == as_ffmpeg_shows(tmp_path / "cut.mp4") and shown[0] == 65
    for start in range(data.sources[0].frames - 7):
        window = numbers(data.window(data.sources[0], start))
        assert all(0 <= b - a <= 2 for a, b in zip(window, window[1:], strict=False)) and window[0] >= 65


def test_a_header_that_promises_more_frames_is_not_believed(tmp_path):
    write_video(tmp_path / "a.avi", "mpeg4", times=range(30))
    content = bytearray((tmp_path / "a.avi").read_bytes())
    place = content.find(b"strh") + 8
    content[place + 32 : place + 36] = struct.pack("<I", 131)
    (tmp_path / "a.avi").write_bytes(content)
    data = FolderClips(tmp_path, frames=8, size=64)
    assert data.sources[0].frames == 30 and numbers(data.window(data.sources[0], 22)) == list(range(22, 30))


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts", "a.avi", "a.gif"])
def test_what_is_missing_at_the_end_shortens_the_clip(tmp_path, name):
    if name == "a.gif":
        write_animation(tmp_path / name, range(80))
    else:
        write_video(
            tmp_path / name, "mpeg4", range(80), noise=60, **{"movflags": "+faststart"} if name == "a.mp4" else {}
        )
    if name == "a.mp4":
        ffmpeg("-i", tmp_path / name, "-c", "copy", "-movflags", "+faststart", tmp_path / "b.mp4")
        shutil.move(tmp_path / "b.mp4", tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 6 // 10])
    data = FolderClips(tmp_path, frames=8, size=64)
    (source,) = data.sources
    assert 35 < source.frames < 60
    for start in (0, source.frames - 9):  # of a GIF the last picture may be half there
        assert numbers(data.window(source, start)) == list(range(start, start + 8))


def test_pictures_damaged_within_are_not_trained_on(tmp_path):
    write_video(tmp_path / "a.mkv", "h264", range(100), noise=60)
    content = bytearray((tmp_path / "a.mkv").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    (tmp_path / "a.mkv").write_bytes(content)
    data, right, refused = FolderClips(tmp_path, frames=8, size=64, cache_bytes=0), 0, 0
    (source,) = data.sources
    for start in range(source.frames - 7):
        try:
            window = numbers(data.window(source, start), clear=False)
            right += window == source.pictures(range(start, start + 8))
        except DataError as error:
            assert "is damaged at" in str(error)
            refused += 1
    # The decoder guesses at most of the pictures that lean on a lost one, and does not say so of every one.
    assert refused >= 8 and right >= source.frames - 7 - refused - 10


MATRICES = {  # what FFmpeg's options are called, and what the pixels then are, of [[1, 2], [3, 4]]
    "-display_rotation 90": [[2, 4], [1, 3]],
    "-display_rotation -90": [[3, 1], [4, 2]],
    "-display_rotation 180": [[4, 3], [2, 1]],
    "-display_hflip": [[2, 1], [4, 3]],
    "-display_vflip": [[3, 4], [1, 2]],
    "-display_rotation 90 -display_hflip": None,
    "-display_rotation 90 -display_vflip": None,
}


@pytest.mark.parametrize("options, expected", MATRICES.items())
def test_videos_are_turned_and_mirrored_as_they_say(tmp_path, options, expected):
    plain = picture(0)
    for place, level in (
        {(0, 0, 32, 32): 40, (32, 0, 64, 32): 100, (0, 32, 32, 64): 160, (32, 32, 64, 64): 220}
    ).items():
        plain.paste((level,) * 3, place)
    frames = np.stack([np.asarray(plain)] * 8).tobytes()
    (tmp_path / "raw").write_bytes(frames)
    raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x64", "-i", tmp_path / "raw")
    ffmpeg(*raw, "-c:v", "libx264", "-pix_fmt", "yuv420p", "-qp", "1", tmp_path / "plain.mp4")
    pytest.importorskip("av", reason="pip install av")
    ffmpeg(*options.split(), "-i", tmp_path / "plain.mp4", "-c", "copy", tmp_path / "turned.mp4")
    shown = np.frombuffer(ffmpeg("-i", tmp_path / "turned.mp4", "-f", "rawvideo", "-pix_fmt", "gray", "-"), np.uint8)
    _, source = video.find_sources(tmp_path, None)
    ((_, image),) = video.read_images(source, [0])
    ours, theirs = np.asarray(image.convert("L"), float), shown.reshape(-1, 64, 64)[0].astype(float)
    assert np.abs(ours - theirs).mean() < 4
    if expected:
        assert [[round((ours[y, x] + 20) / 60) for x in (16, 48)] for y in (16, 48)] == expected


def test_videos_are_seen_with_square_pixels(tmp_path):
    write_video(tmp_path / "a.mp4", aspect=2)
    (source,) = video.find_sources(tmp_path, None)
    ((_, image),) = video.read_images(source, [0])
    assert image.size == (128, 64)


TRANSPARENT = [
    ("a.mov", "prores_ks", "yuva444p10le"), ("a.mov", "qtrle", "argb"), ("a.mov", "png", "rgba"),
    ("a.mkv", "ffv1", "yuva420p"), ("a.webm", "libvpx-vp9", "yuva420p"), ("a.webm", "libvpx", "yuva420p"),
]  # fmt: skip


@pytest.mark.parametrize("name, codec, pixels", TRANSPARENT)
def test_what_is_transparent_in_a_video_is_white(tmp_path, name, codec, pixels):
    pytest.importorskip("av", reason="pip install av")
    half = np.zeros((10, 64, 64, 4), np.uint8)
    half[..., :32, :] = (255, 0, 0, 255)  # red on the left; green on the right, which nobody is to see
    half[..., 32:, :] = (0, 255, 0, 0)
    (tmp_path / "raw").write_bytes(half.tobytes())
    raw = ("-f", "rawvideo", "-pix_fmt", "rgba", "-s", "64x64", "-i", tmp_path / "raw")
    ffmpeg(*raw, "-c:v", codec, "-pix_fmt", pixels, "-auto-alt-ref", "0", tmp_path / name)
    window = FolderClips(tmp_path, frames=8, size=64)[0][0]
    assert window[:, :, :, :28].mean((1, 2, 3)).tolist() == pytest.approx([1, -1, -1], abs=0.15)
    assert window[:, :, :, 36:].min() > 0.9


def test_sources_that_look_otherwise_than_they_should_are_warned_of_by_name(tmp_path):
    pytest.importorskip("av", reason="pip install av")
    for number in range(12):
        picture(number).save(tmp_path / f"{number:02d}.png")
    stills = ("-i", tmp_path / "%02d.png", "-pix_fmt", "yuv420p", "-c:v", "libx264")
    (tmp_path / "v").mkdir()
    ffmpeg(*stills, "-bsf:v", "h264_metadata=transfer_characteristics=16", tmp_path / "v" / "pq.mp4")
    ffmpeg(*stills, "-flags", "+ildct+ilme", "-x264opts", "tff=1", tmp_path / "v" / "fields.mp4")
    ffmpeg(*stills, tmp_path / "v" / "plain.mp4")
    summary = FolderClips(tmp_path / "v", frames=8, size=64).summary
    assert "warning: pq.mp4 is HDR" in summary and "warning: fields.mp4 is interlaced" in summary
    assert summary.count("warning") == 2


def test_a_cover_picture_is_not_the_video(tmp_path):
    write_video(tmp_path / "a.mp4")
    picture(255).save(tmp_path / "cover.png")
    words = ("-i", tmp_path / "cover.png", "-i", tmp_path / "a.mp4", "-map", "0", "-map", "1", "-c", "copy")
    ffmpeg(*words, "-disposition:v:0", "attached_pic", tmp_path / "b.mp4")
    for name in ("a.mp4", "cover.png"):
        (tmp_path / name).unlink()
    data = FolderClips(tmp_path, frames=8, size=64)
    assert data.sources[0].frames == 40 and numbers(data.window(data.sources[0], 5)) == list(range(5, 13))


def test_stills_are_a_clip_only_where_no_video_or_animation_is(tmp_path):
    for name in ("thumbs", "stills"):
        (tmp_path / name).mkdir()
    write_animation(tmp_path / "thumbs" / "a.gif", range(20))
    for number in range(1, 21):
        picture(number).save(tmp_path / "thumbs" / f"video_{number:03d}.jpg")
        picture(number).save(tmp_path / "stills" / f"{number:03d}.png")
    data = FolderClips(tmp_path, frames=16, size=64)
    assert sorted(source.kind for source in data.sources) == ["animation", "stills"]
    assert "(1 animations, 1 series of stills); skipped: 20 stills beside videos or animations (" in data.summary
    assert "video_001.jpg, " in data.summary and data.summary.endswith(", ...)")
    assert len(FolderClips(tmp_path, frames=1, size=64).sources) == 41  # single pictures are asked for: all are


def test_videos_that_cannot_be_used_are_named(tmp_path):
    write_video(tmp_path / "a.mp4")
    whole = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(whole[: whole.index(b"mdat") - 4])
    write_video(tmp_path / "c.mp4", times=[0])
    (tmp_path / "d.webm").write_bytes(b"")
    data = FolderClips(tmp_path, frames=8, size=16)
    assert "4 files found, 1 used" in data.summary and "1 shorter than 8 frames (c.mp4)" in data.summary
    assert "2 that cannot be decoded (b.mp4, d.webm)" in data.summary


@pytest.mark.parametrize("name", ["a.mkv", "a.gif", "a.npy"])
def test_a_file_that_changes_while_it_is_trained_on_is_named_skipped_and_counted(tmp_path, name):
    def write(path: Path, length: int) -> None:
        if path.suffix == ".mkv":
            write_video(path, "mpeg4", range(length))
        elif path.suffix == ".gif":
            write_animation(path, range(length))
        else:
            np.save(path, np.random.default_rng(0).normal(size=(4, length, 8, 8)).astype(np.float32))

    for path in (tmp_path / name, tmp_path / f"whole{Path(name).suffix}"):
        write(path, 20)
    data = FolderClips(tmp_path, frames=8, size=8)
    write(tmp_path / name, 13)
    with pytest.warns(UserWarning, match=rf"{name} is skipped \(1 times so far\): it has changed since the start"):
        assert all(data[n][0].shape[1:] == (8, 8, 8) for n in range(8))
    assert data.passed_over[tmp_path / name] == 4
    with pytest.warns(UserWarning, match=r"\(10 times so far\)"):
        assert all(data[n][0].shape[1:] == (8, 8, 8) for n in range(8, 24))


def test_a_video_without_pyav_says_what_to_install(tmp_path, monkeypatch, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"any")
    words, message = (
        ["--data", clips, "--out", tmp_path / "run"],
        "a.mp4 is a video, which needs PyAV: pip install av",
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        assert message in fails_with_one_line(capsys, train.main, *words)
    write_video(clips / "a.mp4")
    video.find_sources(clips, tmp_path / "run" / "index.json")
    monkeypatch.setitem(sys.modules, "av", None)  # gone again, with an index that knows the file
    assert message in fails_with_one_line(capsys, train.main, *words)
