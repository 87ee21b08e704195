"""A batch of files: how often files are opened and hashed, inputs that change or vanish, the progress."""

from __future__ import annotations

import errno
import os
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime.cli import batch, forecast
from moesr.runtime.cli.progress import Progress
from moesr.runtime.cli.run import main
from moesr.runtime.errors import OutputError
from moesr.runtime.images import provenance, reading, writing
from moesr.runtime.loop.admission import Admission
from moesr.runtime.system import console, file_hashes, files

RNG = np.random.default_rng(12)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a directory with 0.png to 3.png."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        picture(folder / f"{number}.png")
    return folder


def picture(path: Path) -> Path:
    Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return path


def run(engine: Path, *arguments: object) -> int:
    return main(["--engine", str(engine), *map(str, arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


OPENED: Counter[str] = Counter()
WATCHED: list[str] = []


def _count(event: str, arguments: tuple) -> None:
    if WATCHED and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        path = os.fspath(arguments[0])
        if path.startswith(WATCHED[0]):
            OPENED[Path(path).name] += 1


sys.addaudithook(_count)


@pytest.fixture
def opened(photos: Path):
    """Yield counts of how often each file of `photos` is opened."""
    OPENED.clear()
    WATCHED[:] = [str(photos)]
    yield OPENED
    WATCHED.clear()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list of the names of inputs that are hashed, in order."""
    found: list[str] = []
    of_path, of_stream = files.sha256_of, file_hashes.sha256_of_stream
    monkeypatch.setattr(files, "sha256_of", lambda path: found.append(path.name) or of_path(path))
    monkeypatch.setattr(
        file_hashes, "sha256_of_stream", lambda s, path: found.append(path.name) or of_stream(s, path)
    )
    return found


def test_inputs_are_read_at_most_twice_and_hashed_once(engine, photos, tmp_path, opened, hashed, monkeypatch):
    order = []
    save = writing.save
    monkeypatch.setattr(
        writing, "save", lambda path, *rest: order.append((path.name, len(inputs()))) or save(path, *rest)
    )

    def inputs() -> list[str]:
        return [name for name in hashed if name[0].isdigit() and "_" not in name]

    assert run(engine, photos, "-o", tmp_path / "out") == 0
    assert sorted(inputs()) == ["0.png", "1.png", "2.png", "3.png"]
    assert max(opened.values()) <= 2  # once to look for a record, once for the image
    assert order[0][1] <= 3  # work begins before all inputs are hashed
    hashed.clear()
    (tmp_path / "out" / "3_x4.png").unlink()
    assert run(engine, photos, "-o", tmp_path / "out") == 0
    assert sorted(inputs()) == ["0.png", "1.png", "2.png", "3.png"]


def test_only_inputs_with_a_result_are_hashed_before_reading(engine, photos, hashed):
    from moesr.runtime.cli.outputs import plan
    from moesr.runtime.images.provenance import Provenance

    wanted = Provenance(4, "synthetic", {})
    made = plan([photos], None, wanted, False)
    for found in made.listing.inputs:
        made.decide(found)
    assert not hashed
    writing.save(photos / "1_x4.png", Image.new("RGB", (48, 36)), wanted.of("1.png", "0" * 64))
    made = plan([photos], None, wanted, False)
    for found in made.listing.inputs:
        made.decide(found)
    assert hashed == ["1.png"]


def test_hashes_of_large_inputs_are_remembered(engine, photos, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "LARGE", 1)
    monkeypatch.setattr(file_hashes, "SETTLED_NS", 0)
    assert run(engine, photos, "-o", tmp_path / "out") == 0
    monkeypatch.setattr(files, "sha256_of", lambda path: pytest.fail(f"{path} is hashed again"))
    assert run(engine, photos, "-o", tmp_path / "out") == 0


@pytest.mark.parametrize("moment", ["before it is read", "while it is decoded", "while it is hashed"])
def test_input_that_vanishes_does_not_stop_the_others(engine, photos, tmp_path, moment, capsys, monkeypatch):
    victim = photos / "1.png"
    if moment == "before it is read":
        open_input = batch.open_input
        monkeypatch.setattr(
            batch, "open_input", lambda path: (victim.unlink(missing_ok=True), open_input(path))[1]
        )
    elif moment == "while it is decoded":
        load = reading.load
        monkeypatch.setattr(
            reading, "load", lambda path, stream: (victim.unlink(missing_ok=True), load(path, stream))[1]
        )
    else:
        of_stream = file_hashes.sha256_of_stream

        def fails(stream, path):
            if path == victim:
                raise OSError(errno.EIO, "Input/output error")
            return of_stream(stream, path)

        monkeypatch.setattr(file_hashes, "sha256_of_stream", fails)
    assert run(engine, photos, "-o", tmp_path / "out") in (0, 1)
    assert {"0_x4.png", "2_x4.png", "3_x4.png"} <= set(names(tmp_path / "out"))
    if moment != "while it is decoded":
        assert "1.png: " in capsys.readouterr().err


def test_disk_errors_do_not_stop_the_others(engine, photos, tmp_path, capsys, monkeypatch):
    def fails(path, *rest):
        if path.name == "2_x4.png":
            raise OSError(errno.EIO, "Input/output error")
        return save(path, *rest)

    save = writing.save
    monkeypatch.setattr(writing, "save", fails)
    assert run(engine, photos, "-o", tmp_path / "out") == 1
    assert names(tmp_path / "out") == ["0_x4.png", "1_x4.png", "3_x4.png"]
    err = capsys.readouterr().err
    assert "2.png: Input/output error" in err and "internal error" not in err


def test_input_replaced_while_read_is_recorded_as_the_old_file(engine, photos, tmp_path, monkeypatch):
    new = picture(tmp_path / "new.png")
    want = files.sha256_of(photos / "1.png")
    load = reading.load

    def replaced(path, stream):
        image = load(path, stream)
        if path.name == "1.png" and new.exists():
            new.replace(path)
        return image

    monkeypatch.setattr(reading, "load", replaced)
    assert run(engine, photos, "-o", tmp_path / "out") == 0
    record = provenance.read(tmp_path / "out" / "1_x4.png")
    assert record and record.digest == want
    assert run(engine, photos, "-o", tmp_path / "out") == 0
    again = provenance.read(tmp_path / "out" / "1_png_x4.png")  # the new image has its own result
    assert again and again.digest == files.sha256_of(photos / "1.png") != want


def test_input_modified_while_read_fails(engine, photos, tmp_path, capsys, monkeypatch):
    load = reading.load

    def grows(path, stream):
        image = load(path, stream)
        if path.name == "1.png":
            path.write_bytes(path.read_bytes() + b"more")
        return image

    monkeypatch.setattr(reading, "load", grows)
    assert run(engine, photos, "-o", tmp_path / "out") == 1
    assert "1.png: was modified while it was read" in capsys.readouterr().err
    assert names(tmp_path / "out") == ["0_x4.png", "2_x4.png", "3_x4.png"]


def test_progress_never_decreases_while_an_image_waits_for_memory(engine, photos, tmp_path, monkeypatch):
    reserve = Admission.reserve

    def one_at_once(self, *given):
        self._reservations = [r for r in self._reservations if r.stands]
        return None if self._reservations else reserve(self, *given)

    shown: list[float] = []

    class Bar:
        n = 0.0

        def update(self, more: float) -> None:
            self.n += more
            shown.append(self.n)

        def __getattr__(self, name: str):
            return lambda *_, **__: None

    monkeypatch.setattr(Admission, "reserve", one_at_once)
    monkeypatch.setattr(console, "bar", lambda *_, **__: Bar())
    assert run(engine, photos, "-o", tmp_path / "out") == 0
    assert shown == sorted(shown) and shown[-1] == pytest.approx(1.0)
    first = shown[: len(shown) // 4]
    assert max(first) <= 0.3  # a quarter of the ticks is a quarter of the work


def test_second_passes_do_not_block_each_other(engine, photos, tmp_path, monkeypatch):
    """Two images in flight need a second pass, but memory suffices for one job only."""
    reserve = Admission.reserve

    def one_at_once(self, *given):
        self._reservations = [r for r in self._reservations if r.stands]
        return None if self._reservations else reserve(self, *given)

    monkeypatch.setattr(Admission, "reserve", one_at_once)
    assert run(engine, photos, "-o", tmp_path / "out", "--scale", "6") == 0
    assert names(tmp_path / "out") == [f"{number}_x6.png" for number in range(4)]


def test_progress_over_images_of_several_sizes():
    progress = Progress(4)
    progress.unread -= 1
    progress.read(100)
    progress.begin(100)
    assert progress.update(5.0, 10.0) == pytest.approx(0.125)
    progress.unread -= 1
    progress.read(100)  # waits for memory
    assert progress.update(10.0, 10.0) == pytest.approx(0.25)
    progress.begin(100)
    assert progress.update(10.0, 20.0) == pytest.approx(0.25)
    progress.unread -= 2  # the others had been done before
    assert progress.update(15.0, 20.0) == pytest.approx(0.75)
    assert progress.update(11.0, 20.0) == pytest.approx(0.75)


def test_longest_possible_names(engine, tmp_path, capsys):
    for number, stem in enumerate(("n" * 246, "ä" * 123, "n" * 245 + "m")):
        picture(tmp_path / f"{stem}.png")
        assert run(engine, tmp_path / f"{stem}.png", "-o", f"{tmp_path}/out/") == 0
        assert len(names(tmp_path / "out")) == number + 1
        assert run(engine, tmp_path / f"{stem}.png", "-o", f"{tmp_path}/out/") == 0
        assert "skipped" in capsys.readouterr().err
    for name in names(tmp_path / "out"):
        assert name.endswith("_x4.png") and len(os.fsencode(name)) <= 255


def test_results_that_cannot_be_written_do_not_stop_a_batch(engine, photos, monkeypatch, capsys):
    def refuse(path, *rest):
        raise OutputError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(writing, "save", refuse)
    assert run(engine, photos) == 1
    assert capsys.readouterr().err.count("No space left") == 4


@pytest.mark.parametrize("refused", ["worker", "images-1"])
def test_threads_that_cannot_be_started(engine, photos, refused, monkeypatch, capsys):
    start = threading.Thread.start

    def limited(self: threading.Thread) -> None:
        if self.name.endswith(refused):
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert run(engine, photos) == (4 if refused == "worker" else 0)
    err = capsys.readouterr().err
    assert "internal error" not in err
    assert ("out of memory" in err) == (refused == "worker")


def test_out_of_memory_for_one_array(engine, photos, monkeypatch, capsys):
    def fails(path, stream):
        raise MemoryError("Unable to allocate 2.12 MiB")

    monkeypatch.setattr(reading, "load", fails)
    assert run(engine, photos) == 4
    assert (
        "0.png: out of memory (Unable to allocate 2.12 MiB); use a smaller image" in capsys.readouterr().err
    )


def test_the_run_says_what_it_expects(engine, photos, tmp_path, monkeypatch, capsys):
    """The time is unknown in the first run; the second one knows it from the first."""
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(forecast, "LONG_S", 1e-9)
    arguments = [photos, "-o", tmp_path / "out", "--force"]
    run(engine, *arguments)
    first = capsys.readouterr().err
    size = r"0\.png: 48x36 pixels; expected: "
    memory = r"[\d.]+ [kMG]B of memory \([\d.]+ [MG]B are free\)"
    assert re.search(f"{size}{memory}; the time is estimated after the first tiles\n", first)
    assert len(re.findall(r"expected: about \d+ s more for the images in work\n", first)) == 1
    run(engine, *arguments)
    second = capsys.readouterr().err
    assert re.search(rf"{size}about \d+ s, {memory}; all 4 inputs, if they are alike, \d+ s\n", second)
    assert second.count("pixels; expected: ") == 4  # every image takes long here
