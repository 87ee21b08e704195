"""The driver, the ledger and the pool of tiles while Ray loses actors and objects, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moesr.runtime.cli.batch import RunOptions
from moesr.runtime.cli.report import Entry, Report
from moesr.runtime.cluster import dataset
from moesr.runtime.cluster.dataset import ReportRows
from moesr.runtime.cluster.ledger import Counts, Ledger
from moesr.runtime.cluster.run import Driver
from moesr.runtime.cluster.tile_pool import LOSSES, TilePool
from moesr.runtime.errors import EngineError, MoesrError
from moesr.runtime.images.provenance import Provenance

ray = pytest.importorskip("ray", reason="ray is not installed")


def lost() -> Exception:
    return ray.exceptions.ActorUnavailableError("out of reach", None)


def test_calls_of_the_ledger_can_be_repeated():
    ledger = Ledger()
    assert [ledger.begin("a", token) for token in ("1", "1", "2")] == [1, 1, 2]
    ledger.end("a")
    assert ledger.begin("a", "3") == 1
    assert [ledger.starting("x", "1"), ledger.starting("x", "1"), ledger.starting("x", "2")] == [1, 1, 2]
    assert ledger.starting("y", "1") == 1
    ledger.opened("x")
    assert ledger.starting("x", "3") == 1


class Remote:
    """A method of an actor; the reference that it returns is a function that makes or raises the answer."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def remote(self, *arguments: Any) -> Callable[[], Any]:
        return lambda: self._answer(*arguments)


@pytest.fixture(autouse=True)
def references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Ray's functions take the references of `Remote`."""
    monkeypatch.setattr(ray, "get", lambda ref, timeout=None: ref())
    monkeypatch.setattr(ray, "wait", lambda refs, **_: (refs[:1], refs[1:]))
    monkeypatch.setattr(ray, "kill", lambda actor: None)


def test_progress_while_the_ledger_is_out_of_reach():
    """The driver goes on with the progress it knows, and with the greater one after a restart."""
    answers: Iterator[Any] = iter([Counts(5, True), lost(), Counts(), lost()])

    def counts() -> Counts:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    rows = ReportRows(iter(()), SimpleNamespace(counts=Remote(counts)))
    assert [rows.counts() for _ in range(3)] == [Counts(5, True)] * 3
    rows.close()
    assert rows.counts() == Counts(5, True)


def test_error_of_ray_becomes_a_message(monkeypatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    message = r"the cluster has stopped: .*run again to continue"
    with pytest.raises(MoesrError, match=message) as caught, dataset.connected(""):
        raise lost()
    assert caught.value.exit_code == 1


def test_run_that_ray_ends_has_a_summary(caplog):
    """The inputs that are done are in the report, and those that are left are counted."""

    def made() -> Iterator[dict[str, Any]]:
        done = Entry("a.png").line("done", Provenance(4, "engine", {}))
        yield {"line": json.dumps(done), "code": 0, "note": ""}
        raise lost()

    ledger = SimpleNamespace(counts=Remote(lambda: Counts(3)), end=Remote(lambda name: None))
    driver = Driver(RunOptions(quiet=True), Report(None))
    with caplog.at_level("INFO", "moesr"), pytest.raises(MoesrError, match="the cluster has stopped"):
        driver.run((), lambda: ReportRows(made(), ledger))
    assert "1 done, 0 skipped, 0 failed, 2 not begun" in caplog.text


def pool(monkeypatch: pytest.MonkeyPatch, answers: list[Any], workers: int = 2) -> TilePool:
    """Return a pool whose actors answer runs in turn: None stands for the outputs, an error is raised."""

    def run(role: str, tiles: Any, count: int) -> list[np.ndarray]:
        answer = answers.pop(0) if answers else None
        if answer:
            raise answer
        return [tiles["x"] * 2]

    actor = SimpleNamespace(run=Remote(run), tiles_per_run=Remote(lambda: 1))
    runner = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda *_: actor))
    monkeypatch.setattr(ray, "remote", lambda _: runner)
    return TilePool("engine", {}, workers, {})


def test_tiles_whose_outputs_are_lost_are_sent_again(monkeypatch):
    gone = ray.exceptions.ObjectLostError("00" * 28, None, "")
    tiles = pool(monkeypatch, [None, gone, lost(), None, ray.exceptions.NodeDiedError("node")])
    outputs = tiles.run("expert", [({"x": np.full(1, k)}, 1) for k in range(7)])
    assert [int(arrays[0][0]) for arrays in outputs] == [0, 2, 4, 6, 8, 10, 12]
    assert tiles.runs == 7


def test_tiles_that_end_every_worker_end_the_run(monkeypatch):
    tiles = pool(monkeypatch, [lost()] * (LOSSES + 1))
    with pytest.raises(EngineError, match=r"lost during the same tiles; .*--memory-per-worker"):
        tiles.run("expert", [({"x": np.zeros(1)}, 1)])
