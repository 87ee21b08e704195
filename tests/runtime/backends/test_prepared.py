"""Graphs prepared by ONNX Runtime: prepared once with equal results, and prepared again after any change."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from engines import build_engine, expert_graph

from moesr.runtime import EngineError, Upscaler
from moesr.runtime.backends import graph_cache, ort
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.selection import Backend
from moesr.runtime.cli import run
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.system import cpu


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return build_engine(tmp_path / "engine")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects the file names of graphs when they are prepared."""
    names, prepare = [], ort._prepare
    monkeypatch.setattr(
        ort, "_prepare", lambda lib, path, directory: names.append(path.name) or prepare(lib, path, directory)
    )
    return names


def step(engine: Path, cache: Path | None, role: str = "expert_0") -> np.ndarray:
    """Run a graph on seeded inputs and return its outputs."""
    session = Backend("onnxruntime", SessionOptions(threads=1, cache=cache), 1).open(
        engine, read_manifest(engine, verify=False).graphs[role]
    )
    rng = np.random.default_rng(0)
    specs = (*session.boundary.inputs, *session.boundary.outputs)
    buffers = {s.name: rng.standard_normal(s.shape(1)).astype(np.float32) for s in specs}
    session.bind(buffers, 1)
    session.enqueue(1)
    session.close()
    return buffers[session.boundary.outputs[0].name].copy()


def entries(cache: Path) -> list[Path]:
    folder = cache / graph_cache.FOLDER
    return sorted(folder.iterdir()) if folder.is_dir() else []


def test_prepared_once_with_equal_results(engine: Path, cache: Path, made: list[str]):
    want = [step(engine, None, role) for role in ("expert_0", "decoder")]
    for _ in range(2):
        got = [step(engine, cache, role) for role in ("expert_0", "decoder")]
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
    assert made == ["expert_0.onnx", "decoder.onnx"]
    assert [path.name[:12] for path in entries(cache)] == ["onnxruntime-"] * 2


def test_bundled_engine_with_external_weights_gives_the_same(cache: Path, made: list[str]):
    """These graphs are large enough for external weights, packed convolutions and folded kernels."""
    image = np.random.default_rng(1).integers(0, 256, (20, 24, 3), np.uint8)
    results = []
    for keep in (False, cache, cache):
        with Upscaler(backend="onnxruntime", cache=keep, threads=1) as up:
            results.append(up(image, steps=4))
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])
    assert sorted(made) == ["decoder.onnx", *(f"expert_{k}.onnx" for k in range(4))]
    assert len(list((cache / graph_cache.FOLDER).glob("*/weights.bin"))) == 5


def test_nothing_is_cached_if_caching_is_off(engine: Path, cache: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESR_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    Upscaler(engine, cache=False).close()
    with Upscaler(engine, backend="onnxruntime", cache=False) as up:
        up(np.zeros((8, 8, 3), np.uint8), steps=1)
    assert run.parser().parse_args(["a.png", "--no-cache"]).cache is False
    assert not entries(cache)
    with Upscaler(engine, backend="onnxruntime") as up:
        up(np.zeros((8, 8, 3), np.uint8), steps=1)
    assert entries(cache)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _other_bytes(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _gone(path: Path) -> None:
    path.unlink()


def _not_json(path: Path) -> None:
    (path.parent / graph_cache.RECORD_NAME).write_text("{")


def _no_record(path: Path) -> None:
    (path.parent / graph_cache.RECORD_NAME).unlink()


def _nested_record(path: Path) -> None:
    (path.parent / graph_cache.RECORD_NAME).write_text("[" * 200_000)


def _record_with_large_number(path: Path) -> None:
    record = path.parent / graph_cache.RECORD_NAME
    record.write_text(re.sub(r'"size": \d+', '"size": 1' + "0" * 400, record.read_text()))


def _same_stamp(path: Path) -> None:
    """Damage a file as a failing disk does: its size and time of modification stay the same."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replaced(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _pipe(path: Path) -> None:
    _replaced(path, os.mkfifo)


def _endless(path: Path) -> None:
    _replaced(path, lambda p: p.symlink_to("/dev/zero"))


def _linked(path: Path) -> None:
    aside = path.with_name("aside")
    path.rename(aside)
    path.symlink_to(aside)


def _record_is_a_pipe(path: Path) -> None:
    _replaced(path.parent / graph_cache.RECORD_NAME, os.mkfifo)


def _record_is_endless(path: Path) -> None:
    _replaced(path.parent / graph_cache.RECORD_NAME, lambda p: p.symlink_to("/dev/zero"))


def _entry_is_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.touch()


def _entry_is_a_link(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.symlink_to("/proc")


DAMAGE = (
    *(
        _cut,
        _other_bytes,
        _gone,
        _not_json,
        _no_record,
        _nested_record,
        _record_with_large_number,
        _same_stamp,
    ),
    *(_pipe, _endless, _linked, _record_is_a_pipe, _record_is_endless, _entry_is_a_file, _entry_is_a_link),
)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("name", ["graph.onnx", "weights.bin"])
def test_damaged_entry_is_made_again(cache: Path, made: list[str], damage: Callable[[Path], None], name: str):
    from moesr.runtime.engine.locate import engine_directory

    engine = engine_directory()
    want = step(engine, cache)
    (entry,) = entries(cache)
    damage(entry / name)
    np.testing.assert_array_equal(step(engine, cache), want)
    assert len(made) == 2 and len(entries(cache)) == 1
    np.testing.assert_array_equal(step(engine, cache), want)
    assert len(made) == 2


def test_entry_that_does_not_load_is_bypassed(engine: Path, cache: Path, made: list[str]):
    """The checksums of the entry are right, but the library cannot load its graph."""
    want = step(engine, cache)
    (entry,) = entries(cache)
    (entry / "graph.onnx").write_bytes(b"nothing that loads")
    record = json.loads((entry / graph_cache.RECORD_NAME).read_text())
    for made in record["made"]:
        if made["name"] == "graph.onnx":
            made |= {"size": 18, "crc32": zlib.crc32(b"nothing that loads")}
    (entry / graph_cache.RECORD_NAME).write_text(json.dumps(record))
    np.testing.assert_array_equal(step(engine, cache), want)
    assert not entries(cache)


def test_changed_graph_replaces_its_old_entry(engine: Path, cache: Path, made: list[str]):
    before = step(engine, cache)
    onnx.save(expert_graph(16, shift=3.0), engine / "expert_0.onnx")
    os.utime(engine / "expert_0.onnx", ns=(1, 1))
    np.testing.assert_allclose(step(engine, cache), before + 3.0, atol=1e-5)
    assert len(made) == 2 and len(entries(cache)) == 1


@pytest.mark.parametrize("what", ["version", "processor", "options"])
def test_other_library_or_processor_has_its_own_entry(
    engine: Path, cache: Path, made: list[str], monkeypatch: pytest.MonkeyPatch, what: str
):
    step(engine, cache)
    if what == "version":
        import onnxruntime

        monkeypatch.setattr(onnxruntime, "__version__", "0.0")
    elif what == "processor":
        monkeypatch.setattr(cpu, "extensions", lambda: "sse")
    else:
        monkeypatch.setattr(ort, "_PREPARATION", "others")
    step(engine, cache)
    assert len(made) == 2 and len(entries(cache)) == 2


def test_entries_of_missing_or_unused_graphs_are_removed(engine: Path, tmp_path, cache: Path):
    step(engine, cache)
    (first,) = entries(cache)
    other = build_engine(tmp_path / "other", experts=2)
    step(other, cache)
    old = time.time() - graph_cache.UNUSED_AGE_S - 1
    os.utime(first / graph_cache.RECORD_NAME, (old, old))
    step(engine, cache, "decoder")
    assert first not in entries(cache) and len(entries(cache)) == 2
    shutil.rmtree(other)
    step(engine, cache, "expert_1")
    assert len(entries(cache)) == 2  # the decoder and expert 1 of the first engine


def test_without_verify_checksums_are_not_compared(engine: Path, cache: Path):
    files = read_manifest(engine, verify=False).graphs["decoder"].files
    origin = graph_cache.origin(engine, files, "a", "1", "options")
    directory = graph_cache.write(cache, origin, lambda new: (new / "weights").write_bytes(b"abc"))
    assert directory
    _same_stamp(directory / "weights")
    assert graph_cache.find(cache, origin, verify=False) == directory
    assert graph_cache.find(cache, origin) is None
    assert not directory.exists()


@pytest.mark.parametrize("verify", [True, False])
def test_verify_of_the_upscaler_reaches_its_sessions(engine: Path, cache: Path, verify: bool):
    with Upscaler(engine, backend="onnxruntime", cache=cache, verify=verify) as up:
        assert up.backend.options.verify is verify


def test_entries_without_a_record_are_removed_by_the_next_write(engine: Path, cache: Path):
    step(engine, cache)
    (first,) = entries(cache)
    (first / graph_cache.RECORD_NAME).unlink()
    step(engine, cache, "decoder")
    assert first not in entries(cache) and len(entries(cache)) == 1


def test_used_entry_is_kept(engine: Path, cache: Path):
    step(engine, cache)
    (entry,) = entries(cache)
    os.utime(entry / graph_cache.RECORD_NAME, (1, 1))
    step(engine, cache)
    assert time.time() - (entry / graph_cache.RECORD_NAME).stat().st_mtime < 1000


def test_full_disk_is_left_alone(engine: Path, cache: Path, made: list[str], monkeypatch):
    monkeypatch.setattr(graph_cache, "ROOM", 1 << 60)
    np.testing.assert_array_equal(step(engine, cache), step(engine, None))
    assert not made and not entries(cache)


def test_cache_directory_that_cannot_be_written(engine: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    np.testing.assert_array_equal(step(engine, tmp_path / "file" / "below"), step(engine, None))


def test_invalid_graph_gives_the_same_error_as_without_a_cache(engine: Path, cache: Path):
    (engine / "expert_0.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match=r"expert_0.onnx: onnxruntime cannot run it"):
        step(engine, cache)
    assert not entries(cache)
