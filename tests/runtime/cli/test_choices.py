"""Options about input and output files: sizes, subdirectories, formats, names, dates, frames, reports."""

from __future__ import annotations

import json
import os
import shlex
import zlib
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from PIL import Image, TiffImagePlugin

from moesr.runtime import Upscaler
from moesr.runtime.cli import sizes
from moesr.runtime.cli.run import main
from moesr.runtime.cli.sizes import Size
from moesr.runtime.errors import InputError
from moesr.runtime.images import provenance, reading
from moesr.runtime.images.resize import imresize

RNG = np.random.default_rng(21)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a directory with a.png, and deep/b.jpg and deep/er/a.png below it."""
    folder = tmp_path / "photos"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.png", "deep/b.jpg", "deep/er/a.png"):
        picture(folder / name)
    return folder


def picture(path: Path, width: int = 12, height: int = 9) -> Path:
    Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return path


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), *map(str, arguments)])


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


SIZES = [
    (["--scale", "2"], "a_x2.png", (24, 18)),
    (["--scale", "2.5"], "a_x2.5.png", (30, 23)),
    (["--scale", "0.5"], "a_x0.5.png", (6, 5)),
    (["--scale", "6"], "a_x6.png", (72, 54)),
    (["--scale", "16"], "a_x16.png", (192, 144)),
    (["--size", "50x40"], "a_50x40.png", (50, 40)),
    (["--size", "60x"], "a_w60.png", (60, 45)),
    (["--size", "X100"], "a_h100.png", (133, 100)),
]


@pytest.mark.parametrize(("options", "name", "size"), SIZES, ids=lambda v: str(v))
def test_results_of_a_chosen_size(engine, photos, options, name, size, capsys):
    assert run(engine, photos / "a.png", *options) == 0
    assert Image.open(photos / name).size == size
    assert run(engine, photos / "a.png", *options) == 0
    assert "skipped" in capsys.readouterr().err
    record = provenance.read(photos / name)
    assert record and ("scale" in record.settings or "size" in record.settings)


def test_small_sizes_are_resampled_and_large_sizes_take_two_passes(engine, photos):
    with Upscaler(engine) as up:
        source = np.asarray(Image.open(photos / "a.png"))
        once = up(source)
        np.testing.assert_array_equal(up(imresize(once, 14, 18)), twice := up(imresize(once, 14, 18)))
    assert run(engine, photos / "a.png", "--scale", "2") == 0
    np.testing.assert_array_equal(np.asarray(Image.open(photos / "a_x2.png")), imresize(once, 18, 24))
    assert run(engine, photos / "a.png", "--scale", "6") == 0
    np.testing.assert_array_equal(np.asarray(Image.open(photos / "a_x6.png")), imresize(twice, 54, 72))


def test_scale_of_the_engine_equals_the_default(engine, photos, capsys):
    assert run(engine, photos / "a.png", "--scale", "4") == 0
    assert run(engine, photos / "a.png") == 0
    assert "a.png: skipped" in capsys.readouterr().err
    assert tree(photos).count("a_x4.png") == 1


def test_sizes_beyond_two_passes_are_refused(engine, photos, capsys):
    assert run(engine, photos / "a.png", "--scale", "17") == 1
    assert "cannot become 204x153: this engine enlarges at most 16 times" in capsys.readouterr().err
    with pytest.raises(InputError):
        sizes.between((10, 10), (161, 10), 4)
    assert sizes.between((10, 10), (40, 40), 4) is None
    assert sizes.between((10, 10), (160, 41), 4) == (40, 11)
    assert Size(height=3).of(1000, 1) == (3, 1)


def test_results_of_another_size_are_not_inputs(engine, photos):
    assert run(engine, photos, "--scale", "2") == 0
    assert run(engine, photos) == 0
    assert tree(photos) == ["a.png", "a_x2.png", "a_x4.png", "deep/b.jpg", "deep/er/a.png"]


def test_subdirectories_are_mirrored(engine, photos, tmp_path, capsys):
    (photos / ".hidden").mkdir()
    picture(photos / ".hidden" / "c.png")
    (photos / "deep" / "again").symlink_to(photos)
    out = tmp_path / "out"
    assert run(engine, photos, "-o", f"{out}/", "--recursive") == 0
    assert tree(out) == ["a_x4.png", "deep/b_x4.png", "deep/er/a_x4.png"]
    assert "again: ignored, the same directory as" in capsys.readouterr().err
    assert run(engine, photos, "-o", f"{out}/", "--recursive") == 0
    assert "3 skipped" in capsys.readouterr().err
    inside = photos / "results"
    for _ in range(2):
        assert run(engine, photos, "-o", f"{inside}/", "--recursive") == 0
        assert tree(inside) == ["a_x4.png", "deep/b_x4.png", "deep/er/a_x4.png"]
    assert run(engine, photos, "--recursive", "--force") == 0
    assert "deep/er/a_x4.png" in tree(photos)
    assert run(engine, photos) == 0
    assert "deep: ignored, a directory; --recursive" in capsys.readouterr().err


def test_format_quality_and_suffix(engine, photos, tmp_path):
    sizes_bytes = []
    for quality in ("10", "95"):
        out = tmp_path / quality
        given = ("--format", "jpg", "--quality", quality, "--suffix=-big")
        assert run(engine, photos, "-o", f"{out}/", *given) == 0
        assert tree(out) == ["a-big.jpg"]
        assert Image.open(out / "a-big.jpg").format == "JPEG"
        sizes_bytes.append((out / "a-big.jpg").stat().st_size)
    assert sizes_bytes[0] < sizes_bytes[1]
    assert run(engine, photos / "a.png", "-o", f"{tmp_path}/same/", "--suffix", "", "--format", "webp") == 0
    assert tree(tmp_path / "same") == ["a.webp"]
    assert run(engine, photos / "a.png", "-o", f"{tmp_path}/a.webp", "--quality", "5") == 0


def test_results_of_other_file_settings_are_not_taken_for_finished(engine, photos, tmp_path, capsys):
    given = (photos, "-o", f"{tmp_path}/out/", "--format", "jpg")
    assert run(engine, *given, "--quality", "50") == 0
    assert run(engine, *given, "--quality", "60") == 0
    assert "made with quality 50 (now 60)" in capsys.readouterr().err
    assert run(engine, *given, "--quality", "60", "--force") == 0
    record = provenance.read(tmp_path / "out" / "a_x4.jpg")
    assert record and record.settings["quality"] == 60


def test_time_stamps_are_kept(engine, photos):
    os.utime(photos / "a.png", ns=(10**18, 10**18))
    assert run(engine, photos / "a.png", "--preserve-times") == 0
    assert (photos / "a_x4.png").stat().st_mtime_ns == 10**18
    assert run(engine, photos / "a.png", "--force") == 0
    assert (photos / "a_x4.png").stat().st_mtime_ns != 10**18


def test_fail_fast_stops_at_the_first_failure(engine, photos, capsys):
    for name in ("0.png", "b.png"):
        (photos / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert run(engine, photos, "--fail-fast") == 1
    assert "a_x4.png" not in tree(photos)
    err = capsys.readouterr().err
    assert "stopped after the first failure" in err and "1 failed, 2 not begun" in err
    assert run(engine, photos / "absent.png", photos, "--fail-fast") == 1
    assert run(engine, photos) == 1
    assert "a_x4.png" in tree(photos)


def test_log_has_one_line_per_file(engine, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    Image.fromarray(RNG.integers(0, 256, (9, 12, 4), np.uint8)).save(photos / "clear.png")
    log = tmp_path / "logs" / "moesr.jsonl"
    given = ("-o", f"{tmp_path}/out/", "--format", "jpg", "--log", log)
    assert run(engine, photos, tmp_path / "absent.png", *given) == 1
    assert run(engine, photos, *given) == 1
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == 7
    by_name = {Path(line["input"]).name: line for line in lines[:4]}
    assert {name: line["status"] for name, line in by_name.items()} == {
        "a.png": "done",
        "clear.png": "done",
        "broken.png": "failed",
        "absent.png": "failed",
    }
    done = by_name["clear.png"]
    assert done["result"] == str(tmp_path / "out" / "clear_x4.jpg") and done["seconds"] > 0
    assert any("flattened on white" in text for text in done["warnings"])
    assert done["settings"]["steps"] == 2 and done["error"] is None
    assert by_name["a.png"]["warnings"] == []
    assert "broken.png: " in by_name["broken.png"]["error"]
    assert [line["status"] for line in lines[4:]].count("skipped") == 2
    assert run(engine, photos, *given[:-1], tmp_path / "out") == 1  # a directory
    assert run(engine, photos / "a.png", "--log", "/dev/full") == 0


def test_progress_in_json_lines(engine, photos, capsys, monkeypatch):
    monkeypatch.setattr("moesr.runtime.cli.progress.EVENT_S", 0.0)
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    assert run(engine, photos, "--progress", "json") == 1
    out, err = capsys.readouterr()
    assert out == f"{photos / 'a.png'} -> {photos / 'a_x4.png'}\n"
    events = [json.loads(line) for line in err.splitlines()]
    kinds = {event["event"] for event in events}
    assert kinds == {"message", "progress", "file"}
    fractions = [event["fraction"] for event in events if event["event"] == "progress"]
    assert fractions == sorted(fractions) and fractions[0] >= 0 and fractions[-1] <= 1
    assert sorted(e["status"] for e in events if e["event"] == "file") == ["done", "failed"]
    assert any(e["event"] == "message" and e["level"] == "error" for e in events)


def test_random_seed_is_reported_and_recorded(engine, photos, capsys):
    seeds = []
    for _ in range(2):
        assert run(engine, photos / "a.png", "--seed", "random", "--force") == 0
        record = provenance.read(photos / "a_x4.png")
        assert record and f"moesr-run: seed {record.settings['seed']}\n" in capsys.readouterr().err
        seeds.append(record.settings["seed"])
    assert seeds[0] != seeds[1]
    assert run(engine, photos / "a.png", "--seed", "random") == 0  # any seed is accepted
    assert run(engine, photos / "a.png", "--seed", "random", "--steps", "1") == 1


def test_info_prints_the_command_that_repeats_a_result(engine, photos, capsys, monkeypatch):
    given = ["--steps", "1", "--sampler", "ddim", "--scale", "3", "--seed", "7", "--format", "webp"]
    (photos / "a.png").rename(photos / "a b.png")
    assert run(engine, photos / "a b.png", *given, "--quality", "80") == 0
    first = (photos / "a b_x3.webp").read_bytes()
    capsys.readouterr()
    monkeypatch.chdir(photos)
    assert main(["--info", "a b_x3.webp"]) == 0
    out = capsys.readouterr().out
    for text in ("input          a b.png", "steps          1", "engine         synthetic fp32"):
        assert text in out
    command = next(line for line in out.splitlines() if line.startswith("command"))
    words = shlex.split(command.removeprefix("command"))
    assert words[0] == "moesr-run" and "DIR" in words
    assert main([str(engine) if word == "DIR" else word for word in words[1:]]) == 0
    assert (photos / "a b_x3.webp").read_bytes() == first
    assert main(["--info", "a b.png"]) == 1
    assert "holds no record" in capsys.readouterr().err
    assert main(["--info", "absent.png"]) == 1


def test_bundled_engine_is_named_in_the_command(tmp_path, capsys):
    picture(tmp_path / "a.png", 8, 8)
    assert main([str(tmp_path / "a.png"), "--steps", "1"]) == 0
    assert main(["--info", str(tmp_path / "a_x4.png")]) == 0
    assert "--engine demo-x4" in capsys.readouterr().out


def test_comparison_page(engine, photos):
    (photos / "a.png").rename(photos / "a<b>.png")
    assert run(engine, photos / "a<b>.png", "--compare") == 0
    page = (photos / "a<b>_x4_compare.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "a&lt;b&gt;.png" in page and "a<b>" not in page
    assert "http" not in page.lower().replace("http-equiv", "")
    assert "%" not in page.replace("100%", "").replace("}%", "")


def test_colors_under_alpha_are_kept_on_request(engine, tmp_path, capsys):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (200, 40, 40, 255)
    pixels[:, 8:, 2] = 220  # blue pixels with alpha 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kept = []
    for option in ((), ("--keep-colors-under-alpha",)):
        target = tmp_path / f"{len(option)}.png"
        assert run(engine, tmp_path / "a.png", "--color-fix", "none", *option, "-o", target) == 0
        record = provenance.read(target)
        assert record
        kept.append((np.asarray(Image.open(target)), record.settings))
    assert kept[1][1]["keep_colors_under_alpha"] is True and "keep_colors_under_alpha" not in kept[0][1]
    assert (kept[0][0][..., :3] != kept[1][0][..., :3]).any()
    capsys.readouterr()
    assert main(["--info", str(tmp_path / "1.png")]) == 0
    assert "--keep-colors-under-alpha" in capsys.readouterr().out


def animation(path: Path, frames: int = 3, **options: object) -> Path:
    pictures = [Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)) for _ in range(frames)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_every_frame_of_an_animation(engine, tmp_path, extension, capsys):
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    source = animation(tmp_path / "a.webp", duration=[100, 250, 70], loop=3, lossless=True, exif=exif)
    given = (source, "--frames", "all", "--format", extension, "-o", tmp_path / f"r.{extension}")
    assert run(engine, *given) == 0
    with (
        Image.open(tmp_path / f"r.{extension}") as result,
        Image.open(source) as before,
        Upscaler(engine) as up,
    ):
        assert (result.n_frames, result.size, result.info["loop"]) == (3, (48, 36), 3)
        assert result.getexif()[0x010F] == "Maker"
        for number in range(3):
            result.seek(number), before.seek(number)
            result.load()
            assert result.info["duration"] == [100, 250, 70][number]
            want = np.asarray(up(np.asarray(before.convert("RGB"))), np.int16)
            assert np.abs(np.asarray(result.convert("RGB"), np.int16) - want).max() <= (
                0 if extension == "png" else 90
            )
    assert run(engine, *given) == 0
    assert "skipped" in capsys.readouterr().err


def test_every_page_of_a_tiff(engine, tmp_path, capsys):
    source = animation(tmp_path / "a.tif", 2)
    assert run(engine, source, "--frames", "all", "--format", "tif") == 0
    with Image.open(tmp_path / "a_x4.tif") as result:
        assert (result.n_frames, result.size) == (2, (48, 36))
        result.seek(1)
        assert result.size == (48, 36)
    assert provenance.read(tmp_path / "a_x4.tif")
    assert run(engine, source, "--frames", "all", "--format", "jpg") == 1
    assert "cannot hold 2 frames" in capsys.readouterr().err


def test_pages_of_several_sizes_need_a_tiff(engine, tmp_path, capsys):
    """In a PNG, a smaller page would be drawn over the one before it."""
    pages = [Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8)) for size in ((9, 12), (5, 7))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert run(engine, tmp_path / "a.tif", "--frames", "all") == 1
    assert "2 pages of several sizes, which only TIFF can; use --format tif" in capsys.readouterr().err
    assert run(engine, tmp_path / "a.tif", "--frames", "all", "--format", "tif") == 0
    with Image.open(tmp_path / "a_x4.tif") as result:
        result.seek(1)
        assert result.size == (28, 20)


def test_still_picture_of_an_animated_png_is_no_frame(engine, tmp_path):
    """A PNG may hold a picture for programs that show no animations, beside the frames."""
    frames = [Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)) for _ in range(3)]
    frames[0].save(
        tmp_path / "a.png", save_all=True, append_images=frames[1:], default_image=True, duration=[70, 90]
    )
    assert run(engine, tmp_path / "a.png", "--frames", "all", "-o", tmp_path / "b.png") == 0
    with Image.open(tmp_path / "b.png") as result:
        assert result.default_image and result.n_frames == 3
        result.seek(2)
        assert result.info["duration"] == 90
    assert run(engine, tmp_path / "a.png", "--frames", "all", "-o", tmp_path / "b.webp") == 0
    with Image.open(tmp_path / "b.webp") as result:
        assert result.n_frames == 2


def test_color_tags_of_an_animation_are_kept(engine, tmp_path):
    source = animation(tmp_path / "a.png", duration=100)
    content = source.read_bytes()
    chunk = b"gAMA" + (100_000).to_bytes(4, "big")
    packed = (4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    source.write_bytes(content[:33] + packed + content[33:])
    assert run(engine, source, "--frames", "all") == 0
    with Image.open(tmp_path / "a_x4.png") as result:
        assert result.n_frames == 3 and result.info["gamma"] == 1.0


def test_frames_keep_metadata(engine, tmp_path, capsys):
    """Pages and animations keep what single images keep."""
    xmp, options = b"<x:xmpmeta>a</x:xmpmeta>", {"duration": 100}
    animation(tmp_path / "a.gif", comment=b"my caption", **options)
    animation(tmp_path / "b.webp", xmp=xmp, lossless=True, **options)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[33550], tags[33550] = 12, (10.0, 10.0, 0.0)
    tags.tagtype[700], tags[700] = 1, xmp
    tags[274] = 6  # to be turned
    animation(tmp_path / "c.tif", 2, tiffinfo=tags, dpi=(100, 100))
    for name, extension in (("a.gif", "png"), ("b.webp", "png"), ("c.tif", "tif"), ("c.tif", "png")):
        given = (tmp_path / name, "--frames", "all", "--format", extension, "-o", tmp_path / extension)
        assert run(engine, *given) == 0
    loaded = {
        name: reading.load(tmp_path / name) for name in ("png/a_x4.png", "png/b_x4.png", "tif/c_x4.tif")
    }
    assert loaded["png/a_x4.png"].metadata.texts[0].value == "my caption"
    assert loaded["png/b_x4.png"].metadata.xmp == xmp
    page = loaded["tif/c_x4.tif"]
    assert page.pixels.shape[:2] == (48, 36) and page.metadata.xmp == xmp
    assert page.metadata.tags[33550].value == (2.5, 2.5, 0.0) and page.dpi == (400, 400)
    assert "PNG cannot hold its georeference" in capsys.readouterr().err


def test_frames_that_exceed_memory(engine, tmp_path, capsys, monkeypatch):
    source = animation(tmp_path / "a.webp", duration=100)
    monkeypatch.setattr("moesr.runtime.cli.frames.PIXEL_BYTES", 10**12)
    assert run(engine, source, "--frames", "all") == 4
    assert "3 frames of 48x36 pixels need" in capsys.readouterr().err
    assert run(engine, source) == 0


def test_damaged_frame_gives_one_error(engine, tmp_path, capsys):
    source = animation(tmp_path / "a.gif", 4, duration=100)
    source.write_bytes(source.read_bytes()[:-300])
    picture(tmp_path / "b.png")
    assert run(engine, tmp_path, "--frames", "all") in (0, 1)
    assert "b_x4.png" in tree(tmp_path)
    err = capsys.readouterr().err
    assert err.count("error:") <= 1 and "internal" not in err
