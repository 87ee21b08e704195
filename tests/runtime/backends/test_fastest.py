"""The choice of a backend follows one cached measurement and never overrides an explicit choice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import build_engine

from moesr.runtime import EngineError, Upscaler
from moesr.runtime.backends import autotune
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.selection import BACKENDS, Backend, candidates
from moesr.runtime.cli import doctor
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.system import user_cache

ONE = np.ones(4, np.float32)
ORT, OV, BF16 = (
    Backend(name, SessionOptions(precision=precision), 1, version="1")
    for name, precision in (("onnxruntime", None), ("openvino", None), ("openvino", "bf16"))
)
Figures = dict[str, float | Exception | tuple[float, np.ndarray]]
Measure = Callable[[Figures], list[str]]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return build_engine(tmp_path / "engine")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_measured", {})
    return tmp_path / "cache" / autotune.FOLDER


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Return a function that replaces the timing of steps by given seconds, results or errors.

    That function returns the list of labels that were timed.
    """

    def give(figures: Figures) -> list[str]:
        asked: list[str] = []

        def time_step(backend: Backend, *_: object) -> tuple[float, np.ndarray]:
            asked.append(backend.label)
            figure = figures[backend.label]
            if isinstance(figure, Exception):
                raise figure
            return figure if isinstance(figure, tuple) else (figure, ONE)

        monkeypatch.setattr(autotune, "_time_step", time_step)
        return asked

    return give


def choose(engine: Path, *found: Backend) -> str:
    return autotune.choose(found, engine, read_manifest(engine))[0].label


@pytest.mark.parametrize(
    ("figures", "chosen"),
    [
        ({"onnxruntime": 2.0, "openvino": 1.0, "openvino bf16": 0.5}, "openvino bf16"),
        ({"onnxruntime": 2.0, "openvino": 1.0, "openvino bf16": (0.5, ONE * 1.02)}, "openvino"),
        ({"onnxruntime": 2.0, "openvino": 1.9, "openvino bf16": 1.95}, "onnxruntime"),
        ({"onnxruntime": 2.0, "openvino": 1.0, "openvino bf16": 0.95}, "openvino"),
        ({"onnxruntime": 2.0, "openvino": EngineError("no"), "openvino bf16": MemoryError()}, "onnxruntime"),
        ({"onnxruntime": EngineError("no"), "openvino": 1.0, "openvino bf16": 1.5}, "openvino"),
        ({"onnxruntime": (2.0, ONE * np.nan), "openvino": 1.0, "openvino bf16": 1.5}, "onnxruntime"),
        (dict.fromkeys(("onnxruntime", "openvino", "openvino bf16"), EngineError("no")), "onnxruntime"),
    ],
    ids=["fastest", "disagrees", "close", "coarser-is-close", "fails", "preferred-fails", "nan", "all-fail"],
)
def test_choice(engine: Path, measure: Measure, figures: Figures, chosen: str):
    measure(figures)
    assert choose(engine, ORT, OV, BF16) == chosen


def test_single_backend_is_not_measured(engine: Path, measure: Measure, cache: Path):
    asked = measure({})
    assert choose(engine, OV) == "openvino"
    assert not asked and not cache.exists()


def test_measured_once_and_cached(
    engine: Path,
    measure: Measure,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    asked = measure({"onnxruntime": 2.0, "openvino": 1.0})
    with caplog.at_level(logging.INFO, "moesr"):
        assert choose(engine, ORT, OV) == "openvino"
        monkeypatch.setattr(autotune, "_measured", {})  # as if in another process
        assert choose(engine, ORT, OV) == "openvino"
    assert asked == ["onnxruntime", "openvino"]
    assert caplog.messages[-1] == (
        "backend openvino 1 on cpu (a step takes onnxruntime 2000.0 ms, openvino 1000.0 ms)"
    )
    (path,) = cache.iterdir()
    assert json.loads(path.read_text())["seconds"] == {"onnxruntime": 2.0, "openvino": 1.0}


def test_measured_again_when_something_changes(engine: Path, measure: Measure, tmp_path: Path):
    asked = measure({"onnxruntime": 2.0, "openvino": 1.0, "openvino bf16": 0.5})
    other = build_engine(tmp_path / "other", tile=32)
    threaded = [replace(b, options=replace(b.options, threads=1)) for b in (ORT, OV)]
    for directory, found in (
        (engine, (ORT, OV)),
        (engine, (ORT, replace(OV, version="2"))),
        (engine, threaded),
        (engine, (ORT, OV, BF16)),
        (other, (ORT, OV)),
    ):
        before = len(asked)
        choose(directory, *found)
        assert len(asked) == before + len(found)


@pytest.mark.parametrize("content", ["", "[]", '{"chosen": "tvm"}', "\x00"])
def test_unreadable_cache_is_measured_again(engine: Path, measure: Measure, cache: Path, content: str):
    asked = measure({"onnxruntime": 2.0, "openvino": 1.0})
    path = user_cache.directory() / autotune.cache_name([ORT, OV], read_manifest(engine))  # type: ignore[operator]
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert choose(engine, ORT, OV) == "openvino"
    assert len(asked) == 2 and json.loads(path.read_text())["chosen"] == "openvino"


def test_cache_directory_that_cannot_be_written(
    engine: Path, measure: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "file" / "below"))
    asked = measure({"onnxruntime": 2.0, "openvino": 1.0})
    assert [choose(engine, ORT, OV) for _ in range(2)] == ["openvino"] * 2
    assert len(asked) == 2  # remembered by the process


def test_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    assert user_cache.directory() == tmp_path / "cache"
    monkeypatch.setenv("MOESR_CACHE", "relative")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache.directory() == tmp_path / "moesr"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_cache.directory() == tmp_path / "home" / ".cache" / "moesr"


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setitem(BACKENDS, "onnxruntime", "moesr.runtime.backends.ort")
    monkeypatch.setitem(BACKENDS, "openvino", "moesr.runtime.backends.ov")


@pytest.mark.usefixtures("both")
def test_lower_precision_only_on_request():
    assert {b.label for b in candidates()} == {"onnxruntime", "openvino"}
    assert {b.options.precision for b in candidates(precision="auto")} <= {None, "bf16"}


@pytest.mark.usefixtures("both")
def test_named_backend_is_never_replaced(engine: Path, measure: Measure):
    asked = measure({"onnxruntime": 2.0, "openvino": 1.0})
    with Upscaler(engine, backend="onnxruntime") as up:
        assert up.backend.name == "onnxruntime"
    assert not asked
    with Upscaler(engine) as up:
        assert up.backend.name == "openvino"


@pytest.mark.usefixtures("both")
def test_doctor_shows_the_measurement(engine: Path, cache: Path, capsys: pytest.CaptureFixture[str]):
    """The doctor prints the figures of a real measurement as they are stored in the cache."""
    assert doctor.main(["--engine", str(engine)]) == 0
    out = capsys.readouterr().out
    measured = json.loads(next(cache.iterdir()).read_text())
    assert set(measured["seconds"]) == {"onnxruntime", "openvino"} and not measured["refused"]
    parts = [f"{label} {1e3 * figure:.1f} ms" for label, figure in measured["seconds"].items()]
    assert f"measured, one step   {', '.join(parts)} ({autotune.machine()})" in out
    assert f"runs on              {measured['chosen']} " in out
    assert str(cache) in out
