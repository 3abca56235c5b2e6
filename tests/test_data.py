"""Clips: moving digits, and a folder's pictures, animations, videos and latents; and how clips are saved."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, animation, seeded
from PIL import Image
from torch.utils.data import DataLoader

import train
import video
from data import DataError, FolderClips, MovingDigits, height_width, save_gif, save_strip

# ---- Moving digits


def test_moving_digits_are_pixels_in_range_with_their_label_and_move_smoothly():
    data, seen = MovingDigits(), set()
    for n in range(40):
        clip, label = data[n]
        seen.add(label)
        assert clip.shape == (1, 16, 32, 32) and clip.dtype == torch.float32
        assert clip.min() >= -1 and clip.max() <= 1 and clip.max() > 0.5
        ink = (clip[0] + 1) / 2
        mass = ink.sum((1, 2))
        assert mass.std() < 0.02 * mass.mean()  # the same digit in every frame, whole
        center = torch.stack([(ink.sum(d) * torch.arange(32)).sum(1) / mass for d in (1, 2)], 1)
        speed = center.diff(dim=0).norm(dim=1)
        assert 0.3 < speed.max() < 32 / 16 + 0.01
    assert seen == set(range(10))
    two, one = MovingDigits(digits=2)[0][0], MovingDigits()[0][0]
    assert two.sum() > one.sum()
    for size in (8, (8, 64), (64, 15)):
        with pytest.raises(DataError, match="size >= 16"):
            MovingDigits(size=size)


@pytest.mark.parametrize("height, width", [(16, 48), (48, 16)])
def test_moving_digits_of_any_shape_are_as_high_as_the_shorter_side_says_and_go_everywhere(height, width):
    data, square = MovingDigits(40, (height, width)), MovingDigits(40, 16)
    assert all(np.array_equal(a, b) for a, b in zip(data.glyphs, square.glyphs, strict=True))
    reached, masses = torch.zeros(height, width), []
    for n in range(40):
        clip, label = data[n]
        assert clip.shape == (1, 40, height, width) and clip.dtype == torch.float32
        ink = (clip[0] + 1) / 2
        reached = torch.maximum(reached, ink.amax(0))
        masses.append(ink.sum((1, 2)))
        assert masses[-1].std() < 0.02 * masses[-1].mean()  # never cut by an edge
        assert masses[-1].mean() == pytest.approx(data.glyphs[label].sum(), rel=0.02)
        for _, y, x in data.tracks(n):
            assert np.hypot(np.diff(y), np.diff(x)).max() <= 16 / 16 + 1e-9  # a frame, of the shorter side
    assert reached[1:-1, 1:-1].min() > 0


def test_one_number_for_a_size_is_a_square():
    assert height_width(24) == height_width((24, 24)) == (24, 24) and height_width([16, 32]) == (16, 32)
    for n in range(3):
        (one, label), (two, label_) = MovingDigits(8, 24)[n], MovingDigits(8, (24, 24))[n]
        assert torch.equal(one, two) and label == label_
    for size in ((16, 16, 16), (16,)):
        with pytest.raises(DataError, match="one number, or height and width, not "):
            MovingDigits(size=size)


def test_a_sample_number_is_the_same_clip_in_every_process():
    data = MovingDigits(seed=3)
    batches = [list(range(i, i + 4)) for i in range(0, 16, 4)]
    here = list(DataLoader(data, batch_sampler=batches))
    workers = list(DataLoader(data, batch_sampler=batches, num_workers=2))
    for (clip, label), (clip_, label_) in zip(here, workers, strict=True):
        assert torch.equal(clip, clip_) and torch.equal(label, label_)
    assert torch.equal(here[1][0][0], MovingDigits(seed=3)[4][0])
    assert not torch.equal(here[1][0][0], MovingDigits(seed=4)[4][0])
    assert not torch.equal(data[0][0], data[1][0])


# ---- Pictures and animations


def test_folder_finds_animations_and_counts_what_it_skips(clip_folder):
    data = FolderClips(clip_folder, frames=6, size=8)
    assert {source.files[0].name for source in data.sources} == {"a.gif", "b.webp", "c.png", "clear.webp"}
    found = "9 files found, 4 used, 4 clips of 33 frames in all (4 animations)"
    assert data.summary.startswith(f"{clip_folder}: {found}; skipped: 1 shorter than 6 frames (short.gif); 2 stills (")
    assert data.summary.endswith("; 2 that cannot be decoded (broken.gif, empty.webp)")
    windows = [data[n][0] for n in range(40)]
    assert all(w.shape == (3, 6, 8, 8) and w.min() >= -1 and w.max() <= 1 for w in windows)
    white = [n for n, w in enumerate(windows) if w.min() == 1]  # the fully transparent clip is white
    assert len(white) == 10 and {n // 4 for n in white} == set(range(10))  # every epoch shows every file once
    starts = set()
    for w in windows:
        if w.min() < 1 and w[2].std() < 0.01:  # a window is consecutive frames of one file
            red = (w[0, :, 4, 4] + 1) * 127.5
            starts.add(round(red[0].item() / 10))
            assert (red.diff() - 10).abs().max() < 6
    assert starts >= {0, 1, 2}
    assert torch.equal(FolderClips(clip_folder, 6, 8)[17][0], windows[17])
    assert torch.equal(FolderClips(clip_folder, 6, 8, cache_bytes=0)[17][0], windows[17])


def test_folder_crops_without_distortion(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (10, 0, 30, 20))  # the central square, and nothing else
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.rotate(180), image.rotate(90)])
    clip, label = FolderClips(tmp_path, frames=1, size=10)[0]
    assert label == -1 and clip.max() == -1


@pytest.mark.parametrize("height, width", [(8, 16), (16, 8), (5, 9)])
def test_folder_clips_of_a_height_and_a_width_are_cropped_to_that_shape_and_resized(height, width, tmp_path):
    image = Image.new("RGB", (40, 40), "white")
    top, left = (round(20 - 20 * side / max(height, width)) for side in (height, width))
    image.paste("black", (left, top, 40 - left, 40 - top))  # the largest part of that shape in the middle
    image.save(tmp_path / "a.gif", save_all=True, append_images=[Image.new("RGB", (40, 40), "white")])
    data = FolderClips(tmp_path, frames=1, size=(height, width))
    clip = data.window(data.sources[0], 0)
    assert clip.shape == (3, 1, height, width) and clip.max() < -0.9
    square = FolderClips(tmp_path, frames=1, size=40)
    assert square.window(square.sources[0], 0).max() == 1  # of a square the white is seen
    with pytest.raises(DataError, match=r"one number, or height and width, not \(8, 8, 8\)"):
        FolderClips(tmp_path, frames=1, size=(8, 8, 8))


def test_sub_folders_are_the_labels(tmp_path):
    for name in ("zebra/a.gif", "ape/a.gif", "ape/deep/b.gif", "rootless.gif"):
        animation(tmp_path / name, 3)
    data = FolderClips(tmp_path, frames=2, size=8, labels=True)
    assert data.classes == ("ape", "zebra") and "1 in no sub-folder" in data.summary
    assert sorted(data.classes[data[n][1]] for n in range(3)) == ["ape", "ape", "zebra"]
    animation(tmp_path / "zebra" / "a.gif", 3, green=250)
    data = FolderClips(tmp_path, frames=2, size=8, labels=True)
    assert all((data[n][0][1].mean() > 0.5) == (data[n][1] == 1) for n in range(6))


def numbered_stills(folder: Path, numbers, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(folder / f"frame{number}{suffix}", quality=95)


def reds(window: torch.Tensor) -> list[int]:
    """The numbers of a window's frames, read off their red."""
    return [round((red.item() + 1) * 127.5 / 10) for red in window[0].mean((1, 2))]


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_numbered_stills_of_a_folder_are_a_clip_in_the_order_of_their_numbers(tmp_path, suffix):
    numbered_stills(tmp_path / "clip", range(3, 13), suffix)
    numbered_stills(tmp_path / "gap", [1, 2, 3, 5, 6, 7], suffix)
    numbered_stills(tmp_path / "clip", range(13, 20), suffix.upper().replace("PNG", "jpeg").replace("JPG", "png"))
    data = FolderClips(tmp_path, frames=4, size=8)
    assert (
        "23 files found, 17 used, 2 clips of 17 frames in all (2 series of stills); skipped: 6 shorter than 4 frames ("
        in data.summary
    )
    assert len(FolderClips(tmp_path, frames=1, size=8).sources) == 23  # pictures alone
    data.sources = [source for source in data.sources if source.frames == 10]
    windows = [reds(data[n][0]) for n in range(40)]
    assert all(window == list(range(window[0], window[0] + 4)) for window in windows)
    assert {window[0] for window in windows} == set(range(3, 10))


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
    assert ((seen["cmyk"] - torch.tensor([1.0, -1, -1]).view(3, 1, 1)).abs() < 0.1).all()
    assert seen["turned"][0].mean(0).tolist() == [1, 1, -1, -1]


def test_animations_whose_names_are_numbered_stay_animations(tmp_path):
    for number in (1, 2):
        animation(tmp_path / f"{number}.png", 6)
    data = FolderClips(tmp_path, frames=4, size=8)
    assert [source.frames for source in data.sources] == [6, 6]


def test_frame_stride_flip_and_grayscale(tmp_path):
    numbered_stills(tmp_path, range(9))
    data = FolderClips(tmp_path, frames=3, size=8, frame_stride=3)
    assert {tuple(reds(data[n][0])) for n in range(30)} == {(0, 3, 6), (1, 4, 7), (2, 5, 8)}
    with pytest.raises(DataError, match="shorter than 10 frames"):
        FolderClips(tmp_path, frames=4, size=8, frame_stride=3)
    with pytest.raises(DataError, match="a latent scale is for latents"):
        FolderClips(tmp_path, frames=4, size=8, latent_scale=2)
    image = Image.new("RGB", (16, 16), "red")
    image.paste("white", (0, 0, 8, 16))
    image.save(tmp_path / "a.gif", save_all=True, append_images=[image.rotate(180)])
    for path in tmp_path.glob("frame*"):
        path.unlink()
    plain, flipped, grey = (FolderClips(tmp_path, 1, 8, **flag) for flag in ({}, {"flip": True}, {"grayscale": True}))
    mirrored = [torch.equal(flipped[n][0], plain[n][0].flip(-1)) for n in range(64)]
    assert all(mirrored[n] or torch.equal(flipped[n][0], plain[n][0]) for n in range(64)) and 16 < sum(mirrored) < 48
    assert grey.channels == 1 and grey[0][0].shape == (1, 1, 8, 8)
    assert {round(grey[n][0].min().item(), 1) for n in range(9)} == {round(76 / 127.5 - 1, 1)}  # the luminance of red


def test_a_clip_of_one_pixel_is_a_clip(tmp_path):
    animation(tmp_path / "a.gif", 8, size=(1, 1))
    assert FolderClips(tmp_path, frames=8, size=16)[0][0].shape == (3, 8, 16, 16)


# ---- Latents


def test_latents_are_cropped_at_the_centre_and_scaled(tmp_path):
    latent = torch.randn(5, 9, 8, 12, generator=seeded())
    np.save(tmp_path / "a.npy", latent.numpy())
    data = FolderClips(tmp_path, frames=9, size=8, latent_scale=0.5)
    assert data.latent and data.channels == 5
    torch.testing.assert_close(data[0][0], latent[..., 2:10] * 0.5)
    torch.testing.assert_close(FolderClips(tmp_path, frames=9, size=(6, 4))[0][0], latent[..., 1:7, 4:8])
    torch.testing.assert_close(FolderClips(tmp_path, frames=9, size=(8, 12))[0][0], latent)
    for size in ((12, 8), (9, 12), (8, 13)):
        with pytest.raises(DataError, match=rf"1 latents smaller than \({size[0]}, {size[1]}\)"):
            FolderClips(tmp_path, frames=9, size=size)
    (tmp_path / "a.npy").unlink()
    for name, content in {"list": [1], "flat": latent[0], "complex": latent.to(torch.complex64)}.items():
        torch.save(content, tmp_path / f"{name}.pt")
    torch.save(latent.bfloat16().requires_grad_(), tmp_path / "a.pt")
    summary = FolderClips(tmp_path, frames=9, size=8).summary
    for reason in (
        "1 that holds a list and not one tensor, the latent (list.pt)",
        "1 that holds complex64, and latents are floating-point numbers (complex.pt)",
        "1 that is of shape (9, 8, 12), and a latent is (C, T, H, W) (flat.pt)",
    ):
        assert reason in summary
    torch.testing.assert_close(FolderClips(tmp_path, frames=9, size=8)[0][0], latent[..., 2:10].bfloat16().float())
    with pytest.raises(DataError, match="neither mirrored nor made grey"):
        FolderClips(tmp_path, frames=9, size=8, flip=True)
    with pytest.raises(DataError, match="smaller than 16"):
        FolderClips(tmp_path, frames=9, size=16)
    animation(tmp_path / "b.gif", 9)
    with pytest.raises(DataError, match="a.pt and .*b.gif are not alike"):
        FolderClips(tmp_path, frames=9, size=8)


def test_what_latents_were_understood_to_be_is_said(tmp_path):
    for frames in (21, 13):
        torch.save(2 * torch.randn(16, frames, 6, 10, generator=seeded()), tmp_path / f"{frames}.pt")
    data = FolderClips(tmp_path, frames=13, size=None, latent_scale=0.5)
    assert (
        "2 clips of 34 frames in all (latents of 16 channels, 13 to 21 frames of 6x10, standard deviation 1);"
        in data.summary
    )
    assert "warning" not in data.summary and data.size == (6, 10) and data[0][0].shape == (16, 13, 6, 10)  # whole
    assert "warning: the latents' standard deviation is 2, " in FolderClips(tmp_path, frames=13, size=6).summary
    assert "; --latent-scale 0.498 makes it 1" in FolderClips(tmp_path, frames=13, size=6).summary
    torch.save(torch.randn(16, 13, 8, 8), tmp_path / "wide.pt")
    with pytest.raises(DataError, match=r"\(6, 10\) and \(8, 8\): --size crops them alike"):
        FolderClips(tmp_path, frames=13, size=None)


@pytest.mark.parametrize(
    "content, reason",
    [
        (np.zeros((20, 60, 64, 64), np.uint8), "holds uint8, and latents are floating-point numbers"),  # Moving MNIST
        (np.zeros((4, 16, 8, 8), np.uint16), "holds uint16, and latents are floating-point numbers"),
        (
            np.zeros((1, 4, 16, 8, 8), np.float32),
            r"is of shape \(1, 4, 16, 8, 8\), .*: take the batch's latents apart, a file each",
        ),
        (np.zeros((4, 0, 8, 8), np.float32), r"is of shape \(4, 0, 8, 8\), and a latent is \(C, T, H, W\)"),
    ],
)
def test_arrays_that_are_no_latents_are_refused_by_name(tmp_path, content, reason):
    np.save(tmp_path / "a.npy", content)
    with pytest.raises(DataError, match=rf"skipped: 1 that {reason} \(a.npy\)"):
        FolderClips(tmp_path, frames=16, size=8)


def test_latents_that_look_like_frames_first_are_warned_of(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).normal(size=(13, 16, 8, 8)).astype(np.float32))
    summary = FolderClips(tmp_path, frames=16, size=8).summary
    assert "warning: a.npy is of shape (13, 16, 8, 8), which looks like (T, C, H, W)" in summary


def test_windows_from_the_start_begin_with_the_first_frame(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(10, dtype=np.float32).reshape(1, 10, 1, 1).repeat(4, 0))
    data = FolderClips(tmp_path, frames=5, size=1, from_start=True)
    assert all(torch.equal(data[n][0][0, :, 0, 0], torch.arange(5.0)) for n in range(20))
    assert len({FolderClips(tmp_path, frames=5, size=1)[n][0][0, 0].item() for n in range(20)}) > 3


def test_clips_held_out_are_a_share_of_the_files_and_the_same_whatever_else_is_asked(tmp_path):
    for number in range(20):
        animation(tmp_path / str(number % 2) / f"{number}.gif", 4)
    options = {"frames": 2, "size": 8, "held_out": 0.2, "labels": True}
    rest, held = (FolderClips(tmp_path, **options, validation=part) for part in (False, True))
    names = [{source.files[0] for source in part.sources} for part in (rest, held)]
    assert (len(names[0]), len(names[1])) == (16, 4) and not names[0] & names[1]
    again = FolderClips(tmp_path, **options | {"seed": 5, "frames": 3}, validation=True)
    assert {source.files[0] for source in again.sources} == names[1]


# ---- What is found, what is skipped, and what is remembered


def test_the_index_spares_files_that_have_not_changed(clip_folder, tmp_path, monkeypatch):
    index, opened = tmp_path / "run" / "index.json", []
    probe = video._probe
    monkeypatch.setattr(video, "_probe", lambda files: opened.append(files[0].name) or probe(files))
    numbered_stills(clip_folder / "stills", range(6))
    first = FolderClips(clip_folder, 6, 8, index=index)
    assert len(opened) == 10
    again, broken = FolderClips(clip_folder, 6, 8, index=index), ["broken.gif", "empty.webp"]
    assert opened[10:] == broken and again.summary == first.summary and torch.equal(again[7][0], first[7][0])
    animation(clip_folder / "short.gif", 7)
    os.utime(clip_folder / "short.gif", (1, 1))
    (clip_folder / "a.gif").unlink()
    changed = FolderClips(clip_folder, 6, 8, index=index)
    assert opened[12:] == [*broken, "short.gif"] and "5 clips" in changed.summary
    assert "a.gif" not in index.read_text()
    status = (clip_folder / "short.gif").stat()
    animation(clip_folder / "short.gif", 6)
    os.utime(clip_folder / "short.gif", ns=(status.st_mtime_ns, status.st_mtime_ns))  # as old as what it replaces
    assert "of 37 frames" in FolderClips(clip_folder, 6, 8, index=index).summary
    index.write_text("[")  # damaged: written anew
    assert "of 37 frames" in FolderClips(clip_folder, 6, 8, index=index).summary and "a.gif" not in index.read_text()


def test_a_run_s_own_pictures_are_not_its_data(clip_folder):
    animation(clip_folder / "run" / "step-1.gif", 9)
    data = FolderClips(clip_folder, 6, 8, index=clip_folder / "run" / "index.json")
    assert len(data.sources) == 4 and len(FolderClips(clip_folder, 6, 8).sources) == 5


def test_a_file_damaged_further_in_is_named_and_skipped(clip_folder):
    content = bytearray((clip_folder / "deep" / "er" / "c.png").read_bytes())
    place = content.rindex(b"fdAT")
    content[place + 8 : place + 20] = bytes(12)
    (clip_folder / "damaged.png").write_bytes(content)
    data = FolderClips(clip_folder, frames=6, size=8)
    with pytest.warns(UserWarning, match="damaged.png"):
        whole = [data[n][0] for n in range(30)]
    assert all(window.shape == (3, 6, 8, 8) for window in whole)
    again = FolderClips(clip_folder, frames=6, size=8)
    with pytest.warns(UserWarning, match="damaged.png"):  # whatever was decoded before, a number is the same clip
        assert all(torch.equal(again[n][0], whole[n]) for n in reversed(range(30)))
    scarce = FolderClips(clip_folder, frames=6, size=8, cache_bytes=3000)
    with pytest.warns(UserWarning, match="damaged.png"):
        assert all(torch.equal(scarce[n][0], whole[n]) for n in range(30)) and scarce.room >= 0


@pytest.mark.filterwarnings("ignore:.*is skipped")
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_folder_of_files_all_damaged_further_in_ends_in_one_sentence(tmp_path, capfd, workers):
    (tmp_path / "clips").mkdir()
    np.save(tmp_path / "clips" / "a.npy", np.full((2, 8, 16, 16), np.nan, np.float32))
    words = [*TINY, "--data", str(tmp_path / "clips"), "--out", str(tmp_path / "run"), "--workers", workers]
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in error
    assert f"train.py: {tmp_path}/clips: not one file can be decoded" in error.splitlines()[-1]


def test_nothing_usable_is_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(DataError, match="gone is not a folder"):
        FolderClips(tmp_path / "gone")
    animation(tmp_path / "short.gif", 3)
    with pytest.raises(DataError, match=f"{tmp_path}.*1 files found, 0 used.*1 shorter than 16"):
        FolderClips(tmp_path)


# ---- What is saved


def test_gif_and_strip_show_every_clip_and_frame(tmp_path):
    x = torch.stack([torch.full((1, 6, 8, 8), value) for value in (-1.0, 0.0, 1.0)])
    x = x * torch.linspace(0.5, 1, 6).view(1, 1, 6, 1, 1)
    save_gif(x, tmp_path / "a.gif", columns=3, scale=2)
    save_strip(x, tmp_path / "a.png", scale=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.size == (64, 24) and gif.info["loop"] == 0
        gif.seek(5)
        assert [gif.convert("L").getpixel((12 + 20 * i, 12)) for i in range(3)] == pytest.approx([0, 128, 255], abs=2)
    with Image.open(tmp_path / "a.png") as strip:
        assert strip.size == ((6 * 10 + 2) * 2, (3 * 10 + 2) * 2)
    with pytest.raises(ValueError, match="4 channels"):
        save_gif(torch.zeros(1, 4, 2, 4, 4), tmp_path / "b.gif")
