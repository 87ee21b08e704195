"""Names of results, recognition of finished results, and files that must be neither replaced nor redone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime import errors, opened
from moesr.runtime.cli.outputs import Task, plan
from moesr.runtime.cli.run import main
from moesr.runtime.images import provenance, reading, writing
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.system import files

RNG = np.random.default_rng(11)
WANTED = Provenance(4, "synthetic", {"steps": 2, "seed": 42})


def picture(path: Path, mode: str = "RGB") -> Path:
    Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).convert(mode).save(path)
    return path


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a directory with a.png and b.jpg."""
    (tmp_path / "photos").mkdir()
    picture(tmp_path / "photos" / "b.jpg")
    return picture(tmp_path / "photos" / "a.png").parent


@dataclass
class Decisions:
    tasks: list[Task]
    skipped: list[str]
    failed: list[errors.MoesrError]
    notes: list[str]


def planned(
    *inputs: Path,
    output: Path | str | None = None,
    wanted: Provenance = WANTED,
    force: bool = False,
    **options: object,
) -> Decisions:
    """Return the decisions about all inputs of a plan."""
    made = plan(inputs, None if output is None else str(output), wanted, force, **options)  # type: ignore
    decisions = Decisions([], [], [error for _, error in made.listing.failed], made.notes)
    for found in made.listing.inputs:
        try:
            decided = made.decide(found)
        except errors.MoesrError as error:
            decisions.failed.append(error)
        else:
            (decisions.tasks if isinstance(decided, Task) else decisions.skipped).append(decided)  # type: ignore
    return decisions


def do(made: Decisions, wanted: Provenance = WANTED) -> list[str]:
    """Write a result for every task and return the names of the results."""
    assert not made.failed, made.failed
    for task in made.tasks:
        record = wanted.of(task.source.name, files.sha256_of(task.source))
        writing.save(task.target, Image.new("RGB", (48, 36)), record)
    return [task.target.name for task in made.tasks]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), *map(str, arguments)])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_result_records_how_it_was_made(tmp_path: Path, suffix: str, mode: str):
    record = WANTED.of("Bäume \udcff.png", "0" * 64)
    pixels = Image.new(mode, (8, 8)) if mode != "I;16" else Image.fromarray(np.zeros((8, 8), np.uint16))
    path = tmp_path / f"a{suffix}"
    writing.save(path, pixels, record)
    assert provenance.read(path) == (None if suffix == ".bmp" else record)
    assert provenance.is_whole(path) == (suffix != ".bmp")
    writing.save(path, pixels)
    assert provenance.read(path) is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_record_keeps_the_metadata_and_is_not_copied(tmp_path: Path, suffix: str):
    exif = Image.Exif()
    exif[0x010F], exif[0x0131] = "Maker", "Editor 5"
    picture(tmp_path / "source.png").rename(tmp_path / "plain.png")
    Image.open(tmp_path / "plain.png").save(tmp_path / "source.png", exif=exif)
    loaded = reading.load(tmp_path / "source.png")
    writing.save(tmp_path / f"once{suffix}", loaded, WANTED)
    again = reading.load(tmp_path / f"once{suffix}")
    writing.save(tmp_path / f"twice{suffix}", again, WANTED.of("x", "y"))
    tags = Image.open(tmp_path / f"twice{suffix}").getexif()
    assert tags[0x010F] == "Maker"
    assert str(tags[0x0131]).startswith("Editor 5")
    assert str(tags).count("moesr {") <= 1
    assert provenance.read(tmp_path / f"twice{suffix}") == WANTED.of("x", "y")
    block = Image.Exif()
    block.load(reading.load(tmp_path / f"twice{suffix}").exif)
    assert (block[0x010F], block[0x0131]) == ("Maker", "Editor 5")


def test_results_of_another_scale_are_not_inputs(photos: Path):
    assert do(planned(photos)) == ["a_x4.png", "b_x4.png"]
    again = planned(photos, wanted=Provenance(8, "other", {}))
    assert [task.target.name for task in again.tasks] == ["a_x8.png", "b_x8.png"]
    assert [note for note in again.notes if "results of its images (2)" in note]
    every = [photos / name for name in names(photos)]
    assert [task.source.name for task in planned(*every, wanted=Provenance(8, "other", {})).tasks] == [
        "a.png",
        "b.jpg",
    ]
    assert planned(photos / "a_x4.png").tasks  # named without its source, so it is an input
    shutil.copytree(photos, photos.parent / "copied")
    for name in ("a.png", "b.jpg"):
        (photos.parent / "copied" / name).unlink()
    assert len(planned(photos.parent / "copied").tasks) == 2


def test_photograph_with_the_name_of_a_result_is_an_input(photos: Path):
    genuine = picture(photos / "a_x4.png").read_bytes()
    for force in (False, True, True):
        made = planned(photos, force=force)
        assert do(made) == ["a_png_x4.png", "a_x4_x4.png", "b_x4.png"]
        assert (photos / "a_x4.png").read_bytes() == genuine
    assert not planned(photos).tasks


def test_damaged_result_is_made_again(photos: Path):
    do(planned(photos))
    whole = (photos / "a_x4.png").read_bytes()
    middle = len(whole) - 40
    for content in (b"", whole[:-20], whole[:middle] + b"??" + whole[middle + 2 :]):
        (photos / "a_x4.png").write_bytes(content)
        made = planned(photos)
        assert [line.split(":")[0] for line in made.skipped] == [str(photos / "b.jpg")]
        assert do(made) == ["a_x4.png"]
    assert len(planned(photos).skipped) == 2


def test_names_given_to_results_do_not_change(photos: Path):
    do(planned(photos))
    picture(photos / "a.jpg")
    made = planned(photos)
    assert do(made) == ["a_jpg_x4.png"]
    picture(photos / "a_jpg.png")
    assert do(planned(photos)) == ["a_jpg_png_x4.png"]
    picture(photos / "a_jpg_png.png")
    (photos / "a_jpg_png_png_x4.png").mkdir()
    assert do(planned(photos)) == ["a_jpg_png_png_2_x4.png"]
    assert not planned(photos).tasks and len(planned(photos).skipped) == 5


def test_inputs_that_differ_only_in_their_suffix(photos: Path, tmp_path: Path):
    picture(photos / "a.jpg")
    picture(photos / "a_png.png")
    made = planned(photos, output=tmp_path / "out")
    assert do(made) == ["a_jpg_x4.png", "a_png_x4.png", "a_png_png_x4.png", "b_x4.png"]
    other = tmp_path / "other"
    other.mkdir()
    picture(other / "b.jpg")
    assert do(planned(photos / "b.jpg", other / "b.jpg", output=tmp_path / "new")) == [
        "b_jpg_x4.png",
        "b_jpg_2_x4.png",
    ]


def test_results_of_other_folders_are_not_replaced(photos: Path, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    picture(other / "b.jpg")
    assert do(planned(photos, output=tmp_path / "out")) == ["a_x4.png", "b_x4.png"]
    assert do(planned(other, output=tmp_path / "out")) == ["b_jpg_x4.png"]
    assert not planned(other, output=tmp_path / "out").tasks
    assert not planned(photos, output=tmp_path / "out").tasks
    picture(other / "b.jpg")
    assert do(planned(other / "b.jpg", output=f"{tmp_path}/out/")) == ["b_jpg_2_x4.png"]


def test_force_replaces_only_files_that_are_not_inputs_or_other_results(photos: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a_x4.png").write_bytes(b"of an earlier version, without a mark")
    assert do(planned(photos, output=out)) == ["a_png_x4.png", "b_x4.png"]
    (out / "a_png_x4.png").unlink()
    assert do(planned(photos, output=out, force=True)) == ["a_x4.png", "b_x4.png"]
    picture(photos / "b.png")
    assert do(planned(photos / "b.png", output=f"{out}/", force=True)) == ["b_png_x4.png"]


def test_file_with_several_names_is_done_once(photos: Path, monkeypatch: pytest.MonkeyPatch):
    (photos / "latest.png").symlink_to("a.png")
    monkeypatch.chdir(photos)
    twice = Path("a.png")
    made = planned(twice, twice, photos / "a.png", Path("./a.png"), photos)
    assert [task.target.name for task in made.tasks] == ["a_x4.png", "b_x4.png"]
    assert sum("ignored, the same" in note for note in made.notes) == 5


def test_files_that_are_not_images_are_noted(photos: Path):
    (photos / "gone.png").symlink_to("nowhere.png")
    (photos / "loop.png").symlink_to("loop.png")
    (photos / "sub.png").mkdir()
    os.mkfifo(photos / "pipe.png")
    for name in ("notes.txt", "a.xmp", "b.xmp", "c.xmp", ".hidden"):
        (photos / name).touch()
    made = planned(photos)
    assert [task.source.name for task in made.tasks] == ["a.png", "b.jpg"]
    text = "\n".join(made.notes)
    for words in (
        "gone.png: ignored, a link",
        "sub.png: ignored, a dir",
        "pipe.png: ignored, a pipe",
    ):
        assert words in text
    assert "not images: a.xmp, b.xmp, c.xmp, ... (4 in all)" in text
    assert len(made.notes) == 4
    assert ["loop.png: cannot be examined" in str(error) for error in made.failed] == [True]


def test_unreadable_inputs_do_not_stop_the_others(photos: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(photos / "pipe")
    (photos / "link").symlink_to("nowhere")
    (photos / "closed").mkdir()
    iterdir = Path.iterdir

    def closed(self: Path):
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", closed)
    bad = [photos / "pipe", photos / ("n" * 256), photos / "link", photos / "a\0b", photos / "closed"]
    made = planned(*bad, photos / "a.png")
    assert [task.source.name for task in made.tasks] == ["a.png"]
    wanted = (
        "is a pipe, expected a file",
        "shorten it",
        "a file that does not exist",
        "not a possible",
        "Permission denied",
    )
    for words, error in zip(wanted, made.failed, strict=True):
        assert words in str(error)


def test_existing_files_are_not_overwritten(photos: Path):
    result, source = photos / "a_x4.png", photos / "a.png"
    result.write_bytes(b"precious")
    (error,) = planned(source).failed
    assert "exists and is not a result of" in str(error) and "--force" in str(error)
    assert do(planned(source, force=True)) == ["a_x4.png"]
    (error,) = planned(source, output=source, force=True).failed
    assert "its own result would overwrite it" in str(error)
    (error,) = planned(source, output=photos / "b.jpg").failed
    assert "b.jpg: exists and is not a result of" in str(error)
    (photos / "a_x4.png").unlink()
    for make, kind in ((Path.mkdir, "directory"), (os.mkfifo, "pipe")):
        make(photos / "a_x4.png")
        (error,) = planned(source, force=True).failed
        assert f"is a {kind}; name another file" in str(error)
        if kind == "directory":
            (photos / "a_x4.png").rmdir()


def test_results_of_other_settings_or_engines_are_reported(photos: Path):
    do(planned(photos))
    other = Provenance(4, "retrained", {"steps": 9, "seed": 42})
    made = planned(photos, wanted=other)
    assert not made.tasks
    assert "made with engine synthetic (now retrained), steps 2 (now 9)" in made.skipped[0]
    assert "made with" not in planned(photos).skipped[0]
    assert not planned(photos / "a.png").failed  # named directly, and made with the same settings
    (error,) = planned(photos / "a.png", wanted=other).failed
    assert "steps 2 (now 9); pass --force" in str(error)
    assert do(planned(photos, wanted=other, force=True), other) == ["a_x4.png", "b_x4.png"]
    picture(photos / "a.png")
    assert "another version of a.png" in planned(photos, wanted=other).skipped[0]


def test_unwritable_output_is_found_before_any_work(engine, photos, tmp_path, capsys, monkeypatch):
    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("work was begun")

    monkeypatch.setattr(opened, "engine_directory", unexpected)
    for place, code in ((photos / "a.png" / "sub", 1), (tmp_path / ("n" * 256), 1), (photos / "a.png", 2)):
        assert run(engine, photos, "-o", place) == code
    err = capsys.readouterr().err
    assert (
        "cannot be written to" in err and "cannot be examined" in err and "is a file, expected a dir" in err
    )
    assert names(tmp_path) == ["photos"]


def test_unwritable_directory_of_the_inputs(photos: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(directory: Path) -> None:
        raise errors.OutputError(f"{directory}: cannot be written to: Read-only file system")

    monkeypatch.setattr("moesr.runtime.cli.outputs.check_writable", refuse)
    made = planned(photos)
    assert not made.tasks and len(made.failed) == 2
    assert "name another place with -o" in str(made.failed[0])
    monkeypatch.undo()
    do(planned(photos))
    monkeypatch.setattr("moesr.runtime.cli.outputs.check_writable", refuse)
    assert len(planned(photos).skipped) == 2  # nothing has to be written


def test_folder_run_ends_with_a_summary(engine: Path, photos: Path, capsys: pytest.CaptureFixture[str]):
    assert run(engine, photos / "a.png") == 0
    assert "1 done" not in capsys.readouterr().err
    (photos / "c.png").write_bytes((photos / "a.png").read_bytes()[:50])
    (photos / "notes.txt").touch()
    assert run(engine, photos) == 1
    err = capsys.readouterr().err
    assert "2/3 b.jpg: 100%" in err
    lines = err.splitlines()
    assert lines[-1] == "moesr-run: 1 done, 1 skipped, 1 failed"
    assert sum("skipped," in line and "a_x4.png exists (--force" in line for line in lines) == 1
    (photos / "c.png").unlink()
    assert run(engine, photos, "--seed", 7) == 0
    assert "made with seed 42 (now 7)" in capsys.readouterr().err
    record = provenance.read(photos / "a_x4.png")
    assert record and record.settings == {
        "steps": 2,
        "sampler": "ddpm",
        "seed": 42,
        "color_fix": "adain",
        "fidelity": 1.0,
        "tiling": "shifted",
    }


def test_terminated_program_leaves_no_temporary_file(engine: Path, photos: Path):
    script = """
import os, signal, sys
from PIL import Image
def save(self, stream, *args, **kwargs):
    stream.write(b"half")
    os.kill(os.getpid(), signal.SIGTERM)
Image.Image.save = save
from moesr.runtime.cli.run import main
sys.exit(main())
"""
    command = [sys.executable, "-c", script, "--engine", str(engine), str(photos / "a.png")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 143, result.stderr
    assert "ended by SIGTERM; finished results are kept" in result.stderr
    assert names(photos) == ["a.png", "b.jpg"]


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "2>&-", ">&- 2>&-"])
def test_results_are_written_even_if_streams_are_closed(engine: Path, photos: Path, redirection: str):
    command = f"exec '{sys.executable}' -m moesr.runtime.cli.run --engine '{engine}' '{photos}' {redirection}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert result.returncode == (0 if redirection == "2>&-" else 1), result.stderr
    assert "internal error" not in result.stderr
    assert names(photos) == ["a.png", "a_x4.png", "b.jpg", "b_x4.png"]
    for name in ("a_x4.png", "b_x4.png"):
        assert provenance.is_whole(photos / name)
