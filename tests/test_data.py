"""Clips: moving digits, and a folder's pictures, animations, videos and latents; and how clips are saved."""

import errno
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, animation, seeded
from PIL import ExifTags, Image
from torch.testing import assert_close
from torch.utils.data import DataLoader

import train
import video
from data import DataError, FolderClips, MovingDigits, height_width, list_held_out, open_data
from sample import save_gif, save_strip


@pytest.mark.parametrize("height, width", [(16, 16), (16, 48), (48, 16)])
def test_moving_digits_are_never_cut_and_go_smoothly_everywhere_in_any_shape(height, width):
    data, short, reached, labels = MovingDigits(40, (height, width)), min(height, width), [], set()
    for n in range(40):
        clip, label = data[n]
        assert clip.shape == (1, 40, height, width) and clip.dtype == torch.float32
        assert clip.min() >= -1 and 0.5 < clip.max() <= 1
        ink, glyph, ((_, y, x),) = (clip[0] + 1) / 2, data.glyphs[label], data.tracks(n)
        mass = ink.sum((1, 2))
        assert mass.std() < 0.02 * mass.mean() and mass.mean() == pytest.approx(glyph.sum(), rel=0.02)
        assert short / 40 - 1e-9 <= np.hypot(np.diff(y), np.diff(x)).max() <= short / 16 + 1e-9  # a frame
        assert glyph.shape[0] == short * 5 // 8
        reached.append(ink.amax(0))
        labels.add(label)
    assert torch.stack(reached).amax(0)[1:-1, 1:-1].min() > 0 and labels == set(range(10))
    assert MovingDigits(digits=2)[0][0].sum() > MovingDigits()[0][0].sum()


def test_a_size_is_one_number_or_height_and_width():
    assert height_width(24) == height_width((24, 24)) == (24, 24) and height_width([16, 32]) == (16, 32)
    assert torch.equal(MovingDigits(8, 24)[0][0], MovingDigits(8, (24, 24))[0][0])
    for size, message in ((8, "size of 16"), ((64, 15), "size of 16"), ((16, 8, 9), "width, not 16 8 9")):
        with pytest.raises(DataError, match=message):
            MovingDigits(size=size)


def test_a_sample_number_is_the_same_clip_in_every_process():
    data = MovingDigits(seed=3)
    for number, (clip, label) in enumerate(DataLoader(data, None, sampler=range(4), num_workers=2)):
        assert torch.equal(clip, MovingDigits(seed=3)[number][0]) and label == data[number][1]
        assert not torch.equal(clip, MovingDigits(seed=4)[number][0]) and not torch.equal(clip, data[number + 1][0])


def reds(window: torch.Tensor) -> list[int]:
    """The numbers of a window's frames, read off their red."""
    return [round((red.item() + 1) * 127.5 / 10) for red in window[0].mean((1, 2))]


def numbered_stills(folder: Path, numbers, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(folder / f"frame{number}{suffix}", quality=95)


def test_folder_finds_animations_and_counts_what_it_skips(clip_folder):
    data = FolderClips(clip_folder, frames=6, size=8)
    found = "9 files found, 4 used, 4 clips of 33 frames in all (4 animations)"
    assert data.summary.startswith(f"{clip_folder}: {found}; skipped: 2 of one picture, no .png or .jpg of a n")
    assert "takes it) (still.gif, still.png); 1 shorter than 6 frames (short.gif); 2 unusable: " in data.summary
    windows = [data[n][0] for n in range(40)]
    assert all(w.shape == (3, 6, 8, 8) and w.min() >= -1 and w.max() <= 1 for w in windows)
    white = [n for n, w in enumerate(windows) if w.min() == 1]  # the fully transparent clip is white
    assert [n // 4 for n in white] == list(range(10))  # every epoch shows every file once
    numbers = [reds(w) for n, w in enumerate(windows) if n not in white]
    assert all(seen == list(range(seen[0], seen[0] + 6)) for seen in numbers) and {0, 1, 2} <= {n for n, *_ in numbers}
    assert torch.equal(FolderClips(clip_folder, 6, 8, cache_bytes=0)[17][0], windows[17])


def test_two_series_whose_names_differ_in_zeros_alone_are_not_joined(tmp_path):
    numbered_stills(tmp_path, range(1, 9))
    for number in range(1, 9):
        Image.new("RGB", (16, 16), (10 * number + 100, 0, 0)).save(tmp_path / f"frame0{number}.png")
    data = FolderClips(tmp_path, 8, 16)
    assert [reds(data.window(source, 0)) for source in data.sources] == [list(range(1, 9)), list(range(11, 19))]


def test_a_picture_that_is_too_small_is_enlarged_smoothly(tmp_path):
    Image.fromarray(np.arange(0, 256, 16, dtype=np.uint8)[None].repeat(16, 0)).save(tmp_path / "a.png")
    steps = FolderClips(tmp_path, 1, 64)[0][0][0, 0, 32].diff()
    assert (steps[4:-4] > 0).all() and steps.max() < 2 * steps[4:-4].median()


def test_a_clip_s_rate_is_known_and_frames_that_repeat_are_told(tmp_path):
    animation(tmp_path / "a.gif", 20)
    assert FolderClips(tmp_path, 8, 16).rate == 12.5 and FolderClips(tmp_path, 4, 16, frame_stride=4).rate == 3.125
    slower, faster = (FolderClips(tmp_path, 8, 16, fps=fps) for fps in (10, 30))
    assert slower.rate == 10 and "warning" not in slower.summary and faster.rate == 30
    assert faster.summary.endswith("warning: a.gif usually has fewer pictures a second than 30: frames repeat")


def test_a_label_whose_clips_are_all_held_out_is_named(tmp_path):
    for name in "abc":
        animation(tmp_path / "data" / name / "0.gif", 9)
    words = [*TINY, "--data", str(tmp_path / "data"), "--labels", "folder", "--held-out"]
    data = open_data(train.make_parser().parse_args([*words, "0.3"]))
    (name,) = {"a", "b", "c"} - {data.class_name(source) for source in data.sources}
    assert data.summary.endswith(f"labels: 3\nwarning: all clips of 1 of them are held out ({name})")
    assert "held out (" not in open_data(train.make_parser().parse_args([*words, "0"])).summary


def test_links_elsewhere_are_followed_once_and_broken_ones_are_counted(tmp_path):
    for name in ("data/m", "elsewhere/n"):
        animation(tmp_path / name / "0.gif", 9)
    numbered_stills(tmp_path / "data" / "series", range(1, 9))
    links = {"data/n": "elsewhere/n", "data/o": "elsewhere/n", "data/m/up": "data", "data/a": "data/m"}
    for link, target in (links | {"data/d.gif": "gone", "data/series/frame0.png": "gone"}).items():
        (tmp_path / link).symlink_to(tmp_path / target)
    data = FolderClips(tmp_path / "data", 8, 16, labels=True)
    assert data.classes == ("m", "n", "series") and "12 files found, 10 used, 3 clips of 26 frames" in data.summary
    assert "2 unusable: No such file or directory (d.gif, series/frame0.png)" in data.summary


def test_names_that_are_not_utf_8_are_used_and_told(tmp_path):
    for number in range(3):
        animation(tmp_path / os.fsdecode(b"%d\xe9.gif" % number), 9 if number else 5)
    dataset = open_data(train.make_parser().parse_args([*TINY, "--data", str(tmp_path), "--held-out", "0.5"]))
    list_held_out(dataset, tmp_path / "held-out.txt")
    assert b"\xe9.gif\n" in (tmp_path / "held-out.txt").read_bytes()
    assert "(0\N{REPLACEMENT CHARACTER}.gif)" in dataset.summary


@pytest.mark.parametrize("source, size", [((40, 20), (9, 9)), ((40, 40), (8, 16)), ((40, 40), (16, 8))])
def test_pictures_are_cropped_at_their_centre_to_the_shape_and_resized(source, size, tmp_path):
    image, scale = Image.new("RGB", source, "white"), min(source[0] / size[1], source[1] / size[0])
    left, top = round((source[0] - scale * size[1]) / 2), round((source[1] - scale * size[0]) / 2)
    image.paste("black", (left, top, source[0] - left, source[1] - top))  # the largest part of that shape
    image.save(tmp_path / "a.png")
    clip, label = FolderClips(tmp_path, frames=1, size=size)[0]
    assert clip.shape == (3, 1, *size) and clip.max() < -0.9 and label == -1
    assert FolderClips(tmp_path, frames=1, size=source[::-1])[0][0].max() == 1  # of the whole the white is seen


def test_sub_folders_are_the_labels_unless_they_are_hidden(tmp_path):
    greens = {"zebra/a.gif": 250, "ape/a.gif": 0, "ape/deep/b.gif": 0, "rootless.gif": 0}
    greens |= {".Trash-1000/files/b.gif": 0, "@eaDir/c.gif": 0}
    for name, green in greens.items():
        animation(tmp_path / ".clips" / name, 3, green=green)
    data = FolderClips(tmp_path / ".clips", frames=2, size=8, labels=True)
    assert data.classes == ("ape", "zebra") and "4 files found" in data.summary
    assert "1 in no sub-folder" in data.summary
    assert sorted(data[n][1] for n in range(3)) == [0, 0, 1]
    assert all((data[n][0][1].mean() > 0.5) == (data[n][1] == 1) for n in range(6))


def test_folders_and_files_that_may_not_be_read_are_counted(tmp_path, monkeypatch):
    def deny(name: str, call):
        def denied(path, *args, **options):
            if name in str(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *args, **options)

        return denied

    for name in ("clips/a.gif", "clips/closed/b.gif", "hidden/c.gif"):
        animation(tmp_path / name, 9)
    (tmp_path / "clips" / "link.gif").symlink_to(tmp_path / "hidden" / "c.gif")
    monkeypatch.setattr(os, "scandir", deny("closed", os.scandir))
    monkeypatch.setattr(os, "stat", deny("link.gif", os.stat))
    monkeypatch.setattr("builtins.open", deny("closed", open))
    summary = FolderClips(tmp_path / "clips", 8, 16).summary
    assert "3 files found, 1 used" in summary and "2 unusable: Permission denied (link.gif, closed)" in summary


def test_a_series_whose_first_pictures_are_damaged_is_a_series_without_them(tmp_path):
    numbered_stills(tmp_path / "clip", range(1, 13))
    for number in (1, 2):
        (tmp_path / "clip" / f"frame{number}.png").write_bytes(b"")
    data = FolderClips(tmp_path, frames=8, size=8)
    assert "2 unusable: cannot be decoded (clip/frame1.png, clip/frame2.png)" in data.summary
    assert "10 used, 1 clip of 10 frames in all (1 series of stills)" in data.summary and min(reds(data[0][0])) >= 3


@pytest.mark.parametrize("suffix, other", [(".png", ".jpeg"), (".jpg", ".PNG")])
def test_numbered_stills_are_a_clip_in_their_order_where_no_video_or_animation_is(tmp_path, suffix, other):
    numbered_stills(tmp_path / "clip", range(3, 13), suffix)
    numbered_stills(tmp_path / "clip", range(13, 20), other)
    numbered_stills(tmp_path / "gap", [1, 2, 3, 5, 6, 7], suffix)
    numbered_stills(tmp_path / "thumbs", range(20), suffix)
    for number in (1, 2):  # animations stay such, and of one pixel they are clips too
        animation(tmp_path / "thumbs" / f"{number}.png", 6, size=(1, 1))
    data = FolderClips(tmp_path, frames=4, size=8)
    assert "4 clips of 29 frames in all (2 animations, 2 series of stills); skipped: 20 beside" in data.summary
    assert ": 20 beside videos or animations (thumbs/frame0" in data.summary and "; 6 shorter than 4" in data.summary
    assert len(FolderClips(tmp_path, frames=1, size=8).sources) == 45  # single pictures are asked for: all are
    windows = [reds(data[n][0]) for n in range(100)]
    assert all(window == list(range(window[0], window[0] + 4)) for window in windows)
    assert {window[0] for window in windows} == {*range(3), *range(3, 10), *range(13, 17)}


def test_pictures_of_all_kinds_look_as_they_should(tmp_path):
    ramp = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "sixteen.png")
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    turned, exif = Image.new("RGB", (4, 4), "white"), Image.Exif()
    turned.paste("black", (0, 0, 4, 2))
    exif[0x0112] = 6  # to be seen turned by a quarter
    turned.save(tmp_path / "turned.png", exif=exif)
    data = FolderClips(tmp_path, frames=1, size=4)
    seen = {source.files[0].stem: data.window(source, 0)[:, 0] for source in data.sources}
    assert torch.equal(seen["sixteen"][0], torch.from_numpy(ramp // 256).float() / 127.5 - 1)
    assert_close(seen["cmyk"].mean((1, 2)), torch.tensor([1.0, -1, -1]), rtol=0, atol=0.1)
    assert seen["turned"][0].mean(0).tolist() == [1, 1, -1, -1]


def test_half_of_the_windows_are_mirrored_and_all_made_grey_if_asked(tmp_path):
    image = Image.new("RGB", (16, 16), "red")
    image.paste("white", (0, 0, 8, 4))
    image.save(tmp_path / "a.png")
    plain, flipped, grey = (FolderClips(tmp_path, 1, 8, **flag) for flag in ({}, {"flip": True}, {"grayscale": True}))
    mirrored = [torch.equal(flipped[n][0], plain[n][0].flip(-1)) for n in range(64)]
    assert all(mirrored[n] or torch.equal(flipped[n][0], plain[n][0]) for n in range(64)) and 16 < sum(mirrored) < 48
    assert grey.channels == 1 and grey[0][0].shape == (1, 1, 8, 8)
    assert grey[0][0].min().item() == pytest.approx(76 / 127.5 - 1)  # the luminance of red


def test_latents_are_cropped_at_the_centre_and_scaled_from_any_frame_on_or_the_first(tmp_path):
    latent = torch.randn(5, 9, 8, 12, generator=seeded())
    np.save(tmp_path / "a.npy", latent.numpy())
    data = FolderClips(tmp_path, frames=5, size=8, latent_scale=0.5, from_start=True)
    assert data.latent and data.channels == 5
    assert all(torch.equal(data[n][0], latent[:, :5, :, 2:10] * 0.5) for n in range(20))
    data = FolderClips(tmp_path, frames=5, size=(6, 4))
    assert {data[n][0][0, 0, 0, 0].item() for n in range(40)} == set(latent[0, :5, 1, 4].tolist())
    (tmp_path / "a.npy").unlink()
    torch.save(latent.bfloat16().requires_grad_(), tmp_path / "a.pt")
    assert torch.equal(FolderClips(tmp_path, frames=9, size=8)[0][0], latent[..., 2:10].bfloat16().float())


def test_a_latent_that_is_held_out_must_be_as_the_others(tmp_path):
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.zeros((4, 5, 8, 8), np.float32))
    data, held_out = (FolderClips(tmp_path, 5, None, held_out=0.1, validation=each) for each in (False, True))
    assert len(data.sources) == 7 and data.size == held_out.size == 8
    other = held_out.sources[0].files[0]
    for shape, message in (((8, 5, 8, 8), "of one number of channels"), ((4, 5, 8, 10), "--size crops them alike")):
        np.save(other, np.zeros(shape, np.float32))
        with pytest.raises(DataError, match=message):
            FolderClips(tmp_path, 5, None, held_out=0.1)


def test_a_lack_of_memory_is_not_taken_for_a_damaged_file(clip_folder, monkeypatch):
    def window(*_):
        raise MemoryError

    data = FolderClips(clip_folder, 6, 8)
    monkeypatch.setattr(data, "window", window)
    with pytest.raises(MemoryError):
        data[0]


def test_without_room_to_keep_them_only_the_pictures_of_a_window_are_made_small(clip_folder, monkeypatch):
    data, made = FolderClips(clip_folder, 4, 8, cache_bytes=10), []
    (source,) = [source for source in data.sources if source.files[0].name == "b.webp"]
    small = data._picture
    monkeypatch.setattr(data, "_picture", lambda image: made.append(1) or small(image))
    data.window(source, 3)
    assert len(made) == 4


def test_clips_that_stand_still_for_longer_than_a_window_are_named(tmp_path):
    for name, last in (("a", 100), ("long", 3000)):
        animation(tmp_path / f"{name}.webp", 10, duration=[100] * 9 + [last])
    data = FolderClips(tmp_path, 6, 8)
    assert data.summary.endswith("\nwarning: long.webp for a tenth of the time or more stand still for over 6 frames")
    assert "stand still" not in FolderClips(tmp_path, 1, 8).summary


def test_what_latents_were_understood_to_be_is_said(tmp_path):
    for frames in (21, 13):
        torch.save(2 * torch.randn(16, frames, 6, 10, generator=seeded()), tmp_path / f"{frames}.pt")
    data = FolderClips(tmp_path, frames=13, size=None, latent_scale=0.5)
    said = "2 clips of 34 frames in all (latents of 16 channels, 13 to 21 frames of 6x10, standard deviation 1);"
    assert said in data.summary and "warning" not in data.summary
    assert data.size == (6, 10) and data[0][0].shape == (16, 13, 6, 10)  # whole
    said = "warning: the latents' standard deviation is 2, far from noise's, which is 1; --latent-scale 0.498 makes"
    assert said in FolderClips(tmp_path, frames=13, size=6).summary
    torch.save(torch.full((16, 13, 6, 10), torch.inf), tmp_path / "21.pt")
    said = FolderClips(tmp_path, frames=13, size=6).summary
    assert "standard deviation is 2, far" in said and "warning: 21.pt hold NaN or infinite numbers" in said
    torch.save(torch.randn(13, 16, 8, 8), tmp_path / "21.pt")
    (tmp_path / "13.pt").unlink()
    said = "warning: 21.pt is of shape (13, 16, 8, 8), which looks like (T, C, H, W)"
    assert said in FolderClips(tmp_path, frames=16, size=8).summary


LATENT = torch.zeros(4, 9, 8, 8)


@pytest.mark.parametrize("files, options, message", [
    ({"a.pt": [1]}, {}, r"1 unusable: holds a list, and a latent is one tensor \(C, T, H, W\) \(a.pt\)"),
    ({"a.pt": LATENT.byte()}, {}, "holds uint8, and latents are dense floating"), ({}, {}, "clips is not a folder"),
    ({"a.pt": LATENT.to_sparse()}, {}, "holds sparse_coo, and latents are dense floating-point numbers"),
    ({"a.npy": LATENT.numpy().astype(">f4")}, {}, "holds >f4, and latents are float16, float32 or float64 in native"),
    ({"old.pt": LATENT}, {}, "is a pickle or of torch's old file format: torch.save it again"),
    ({"a.pt": LATENT[0]}, {}, r"is of shape \(9, 8, 8\), and a latent is \(C, T, H, W\)"),
    ({"a.pt": LATENT[None]}, {}, r"of shape \(1, 4, .*: take the batch's latents apart, a file each"),
    ({"a.pt": LATENT[:, :0]}, {}, r"is of shape \(4, 0, 8, 8\), and a latent is \(C, T, H, W\)"),
    ({"a.pt": LATENT}, {"size": (9, 8)}, "1 smaller than 9x8"),
    ({"a.pt": LATENT}, {"size": (8, 9)}, "1 smaller than 8x9"),
    ({"a.pt": LATENT}, {"flip": True}, "neither mirrored nor made grey"),
    ({"a.pt": LATENT, "b.pt": LATENT[..., :6]}, {"size": None}, r"8x6 and 8x8: --size crops them"),
    ({"a.pt": LATENT, "b.gif": None}, {}, r"(a.pt|b.gif) and .*(a.pt|b.gif) differ: "),
    ({"a.gif": None}, {"latent_scale": 2}, "a latent scale is for latents"),
    ({"a.gif": None}, {"frame_stride": 3}, "clips: 1 file found, 0 used.*1 shorter than 10 frames"),
])  # fmt: skip
def test_clips_that_cannot_be_used_are_refused_by_name(tmp_path, files, options, message):
    for path, content in ((tmp_path / "clips" / name, content) for name, content in files.items()):
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".npy":
            np.save(path, content)
        elif path.suffix == ".gif":
            animation(path, 9)
        else:
            torch.save(content, path, _use_new_zipfile_serialization=path.stem != "old")
    with pytest.raises(DataError, match=message):
        FolderClips(tmp_path / "clips", **{"frames": 4, "size": 8} | options)


def test_clips_held_out_are_a_share_of_the_files_and_the_same_whatever_else_is_asked(tmp_path):
    for number in range(20):
        animation(tmp_path / str(number % 2) / f"{number}.gif", 4)
    asked = {"frames": 2}, {"frames": 2, "labels": True}, {"frames": 3, "seed": 5}
    parts = [FolderClips(tmp_path, size=8, held_out=0.2, validation=n > 0, **more) for n, more in enumerate(asked)]
    rest, held, again = ({source.files[0] for source in part.sources} for part in parts)
    assert (len(rest), len(held)) == (16, 4) and not rest & held and again == held
    assert "20 files found, 16 used, 16 clips of 64 frames in all, 4 clips held out" in parts[0].summary
    assert "20 files found, 4 used, 4 clips of 16 frames in all, 16 clips to train on" in parts[1].summary
    for name in "abcd":
        numbered_stills(tmp_path / "series" / name, range(4))
    summary = FolderClips(tmp_path / "series", 2, 8, held_out=0.2).summary
    assert "16 files found, 12 used, 3 clips of 12 frames in all, 1 clip held out (3 series of stills)" in summary
    with pytest.raises(DataError, match="0 clips of 0 frames in all, 1 clip held out: none is left to train on"):
        FolderClips(tmp_path / "series" / "a", 2, 8, held_out=0.2)


def test_clips_that_runs_have_made_are_no_data(tmp_path):
    for name in "a.gif", "run/step-1.gif", "run/clips/b.gif", "own/c.gif":
        animation(tmp_path / name, 9)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"")
    data = FolderClips(tmp_path, 8, 16)
    assert [source.files[0].name for source in data.sources] == ["a.gif", "c.gif"]
    assert "4 files found" not in data.summary and "1 unusable: belongs to a run, and so does all" in data.summary
    with pytest.raises(DataError, match=r"1 file found, 0 used.*1 unusable: belongs to a run.*\(checkpoint.pt\)"):
        FolderClips(tmp_path / "run", 8, 16)
    with pytest.raises(DataError, match="1 shorter than 8 frames at --fps 6.25"):
        FolderClips(tmp_path / "run" / "clips", 8, 16, fps=6.25)


def test_the_index_spares_files_that_have_not_changed_and_names_the_others(clip_folder, monkeypatch, capsys):
    index, opened, probe = clip_folder / "run" / "index.json", [], video._probe
    monkeypatch.setattr(video, "_probe", lambda files: opened.append(files[0].name) or probe(files))
    numbered_stills(clip_folder / "stills", range(6))
    animation(clip_folder / "run" / "step-1.gif", 9)  # what a run shows is not its data
    indexed, broken = partial(FolderClips, clip_folder, 6, 8, index=index), ["broken.gif", "empty.webp"]
    first = indexed()
    assert len(opened) == 10 and "step-1.gif" not in opened
    again = indexed()
    assert opened[10:] == broken and again.summary == first.summary and torch.equal(again[7][0], first[7][0])
    animation(clip_folder / "short.gif", 7)
    os.utime(clip_folder / "short.gif", (1, 1))
    (clip_folder / "a.gif").unlink()
    capsys.readouterr()
    assert "5 clips" in indexed().summary and opened[12:] == [*broken, "short.gif"]
    files = ", ".join(str(clip_folder / name) for name in ("a.gif", "short.gif"))
    assert f"new, gone or changed since the last start: 2 ({files})" in capsys.readouterr().out
    animation(clip_folder / "short.gif", 6)
    os.utime(clip_folder / "short.gif", (1, 1))  # as old as what it replaces
    for _ in range(2):
        assert "of 37 frames" in indexed().summary and "a.gif" not in index.read_text()
        index.write_text("[")  # damaged: written anew


def test_a_look_at_files_that_is_stopped_goes_on_where_it_was(clip_folder, monkeypatch):
    index, opened, probe, stop_at = clip_folder / "run" / "index.json", [], video._probe, ["still.gif"]

    def stopped(files):
        opened.append(files[0].name)
        if files[0].name in stop_at:
            raise KeyboardInterrupt
        return probe(files)

    monkeypatch.setattr(video, "_probe", stopped)
    monkeypatch.setattr(video, "KEEP_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        FolderClips(clip_folder, 6, 8, index=index)
    assert opened == ["a.gif", "broken.gif", "clear.webp", "empty.webp", "short.gif", "still.gif"]
    stop_at.clear()
    assert FolderClips(clip_folder, 6, 8, index=index).summary == FolderClips(clip_folder, 6, 8).summary
    assert opened[6:12] == ["broken.gif", "empty.webp", "still.gif", "still.png", "b.webp", "c.png"]
    known = json.loads(index.read_text())
    stop_at.append("empty.webp")
    with pytest.raises(KeyboardInterrupt):
        FolderClips(clip_folder, 6, 8, index=index)
    assert json.loads(index.read_text()) == known  # also of those that it had not come to


def test_a_series_of_stills_of_different_sizes_as_they_are_shown_is_named_and_skipped(tmp_path, capsys):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for name in ("good", "mixed", "turned"):
        numbered_stills(tmp_path / name, range(4))
    Image.new("RGB", (16, 20)).save(tmp_path / "mixed" / "frame2.png")
    for number in range(4):
        size = (20, 16) if number == 2 else (16, 20)  # all upright ones are of 20x16
        Image.new("RGB", size).save(tmp_path / "turned" / f"frame{number}.png", exif=turned if number != 2 else None)
    data = FolderClips(tmp_path, 4, 8)
    assert len(data.sources) == 3 and all(data[number][0].shape == (3, 4, 8, 8) for number in range(20))
    (said,) = capsys.readouterr().err.strip().splitlines()  # of one series, once
    assert "mixed/frame0.png is skipped: it goes on with other sizes" in said and "2.png is not of 16x16" in said


def test_a_file_damaged_further_in_is_named_and_skipped(clip_folder, capsys):
    content = bytearray((clip_folder / "deep" / "er" / "c.png").read_bytes())
    place = content.rindex(b"fdAT")
    content[place + 8 : place + 20] = bytes(12)
    (clip_folder / "damaged.png").write_bytes(content)
    plain, again, scarce = (FolderClips(clip_folder, 6, 8, cache_bytes=room) for room in (2**20, 2**20, 3000))
    whole = [plain[n][0] for n in range(30)]
    for data in (again, scarce):  # whatever was decoded before, a number is the same clip
        assert all(torch.equal(data[n][0], whole[n]) for n in reversed(range(30))) and data.room >= 0
        assert "damaged.png is skipped" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_folder_of_files_all_damaged_further_in_ends_in_one_sentence(tmp_path, capfd, workers):
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.npy", np.full((2, 8, 16, 16), np.nan, np.float32))
    with pytest.raises(SystemExit, match="2"):
        train.main([*TINY, "--data", f"{tmp_path}/clips", "--out", f"{tmp_path}/run", "--workers", workers])
    error = capfd.readouterr().err
    assert f"train.py: {tmp_path}/clips: not one file can be decoded\n" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("fps", [12, 30])
def test_gif_and_strip_show_every_clip_and_frame_for_as_long_as_fps_says(tmp_path, fps):
    x = torch.tensor([-1.0, 0, 1]).view(3, 1, 1, 1, 1) * torch.linspace(0.5, 1, 30).view(1, 1, 30, 1, 1)
    x = x.expand(3, 1, 30, 8, 8)
    save_gif(x, tmp_path / "a.gif", columns=3, scale=2, fps=fps)
    save_strip(x, tmp_path / "a.png", scale=2)
    with Image.open(tmp_path / "a.gif") as gif, Image.open(tmp_path / "a.png") as strip:
        assert gif.n_frames == 30 and gif.size == (64, 24) and gif.info["loop"] == 0
        durations = [gif.seek(number) or gif.info["duration"] for number in range(30)]
        assert [gif.convert("L").getpixel((12 + 20 * i, 12)) for i in range(3)] == pytest.approx([0, 128, 255], abs=2)
        assert strip.size == ((30 * 10 + 2) * 2, (3 * 10 + 2) * 2)
    assert sum(durations) == pytest.approx(30_000 / fps, abs=10) and max(durations) - min(durations) <= 10
    save_gif(x[:1], tmp_path / "alone.gif", scale=1)
    with Image.open(tmp_path / "alone.gif") as gif:
        assert gif.size == (8, 8)  # no border
    with pytest.raises(ValueError, match="4 channels"):
        save_gif(torch.zeros(1, 4, 2, 4, 4), tmp_path / "b.gif")
