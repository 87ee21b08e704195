"""Handles of submitted images: results, progress, canceling, asyncio, order, memory, errors, collection."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime import InputError, MemoryLimitError, Upscaler, UsageError
from moesr.runtime.loop import admission, pictures, processing, worker
from moesr.runtime.loop.scheduler import Scheduler
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.system import memory

RNG = np.random.default_rng(21)
LONG = {"steps": 1000}
"""Options of an image that is still in work when a test inspects it."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def up(engine: Path) -> Iterator[Upscaler]:
    with Upscaler(engine, backend="onnxruntime", threads=1) as upscaler:
        yield upscaler


def image(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, np.uint8)


def eventually(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def at_work(handle: Any) -> bool:
    return handle.progress.fraction > 0


def idle(up: Upscaler) -> bool:
    """Return True if nothing is in flight and no memory is reserved."""
    rooms = up._admission._reservations
    return not (up._worker._jobs or up._pipeline._active or any(room.stands for room in rooms))


class Gate:
    """Replaces a function of a module; callers wait in it until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        function = getattr(module, name)

        def wait(*arguments: Any) -> Any:
            self.entered.set()
            assert self.opened.wait(60)
            return function(*arguments)

        monkeypatch.setattr(module, name, wait)


def test_result_equals_that_of_a_call(up: Upscaler):
    lr = image(20, 30, 3)
    handle = up.submit(lr, steps=3, seed=4)
    assert isinstance(handle, concurrent.futures.Future)
    np.testing.assert_array_equal(handle.result(60), up(lr, steps=3, seed=4))
    assert handle.done() and not handle.running() and not handle.cancelled() and handle.exception() is None
    assert (handle.progress.fraction, handle.progress.stage, handle.progress.seconds_left) == (1, "done", 0)
    assert not handle.cancel()
    picture = up.submit(Image.new("LA", (6, 5)), steps=1).result(60)
    assert (picture.mode, picture.size) == ("LA", (24, 20))


def test_progress_tells_the_seconds_of_each_stage(up: Upscaler):
    begin = time.monotonic()
    handle = up.submit(image(20, 30, 3), steps=3)
    handle.result(60)
    whole, seconds = time.monotonic() - begin, handle.progress.seconds
    assert [*seconds] == ["waiting", "preparing", "running", "sampling", "decoding", "finishing"]
    assert all(value >= 0 for value in seconds.values()) and 0 < sum(seconds.values()) <= whole
    assert seconds == handle.progress.seconds, "nothing is counted after the end"


def test_progress_goes_from_waiting_to_done(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    preparing, finishing = Gate(monkeypatch, processing, "prepare"), Gate(monkeypatch, processing, "finish")
    handle = up.submit(image(40, 40, 3), steps=5)
    assert preparing.entered.wait(60)
    assert handle.progress.stage == "preparing" and handle.running() and handle.progress.position == 0
    seen: list[tuple[float, str]] = []
    preparing.opened.set()
    while not finishing.entered.is_set():
        seen.append((handle.progress.fraction, handle.progress.stage))
    assert handle.progress.stage == "finishing" and handle.progress.fraction == pytest.approx(1)
    finishing.opened.set()
    handle.result(60)
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions) and max(fractions) <= 1
    assert {stage for _, stage in seen} <= {"preparing", "sampling", "decoding", "finishing"}


def test_remaining_time_includes_the_other_images(up: Upscaler):
    up(image(16, 16, 3), steps=20)  # measures the costs
    first = up.submit(image(64, 64, 3), **LONG)
    eventually(lambda: at_work(first))
    alone = first.progress.seconds_left
    second = up.submit(image(16, 16, 3), steps=20)
    assert first.progress.seconds_left > 0.5 * alone > second.progress.seconds_left > 0
    first.cancel()
    assert first.progress.stage == "cancelled" and first.progress.seconds_left == 0
    second.result(60)


def test_statistics(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    assert up.statistics.ticks == up.statistics.active == 0 and not up.statistics.loaded
    up(image(64, 64), steps=2)
    done = up.statistics
    assert done.tiles == done.ticks > 50 and done.max_batch == 1 and "decoder" in done.loaded
    tight(up, monkeypatch, 1.5)
    first = up.submit(image(64, 64), **LONG)
    eventually(lambda: at_work(first))
    second = up.submit(image(64, 64), **LONG)
    assert (up.statistics.active, up.statistics.waiting) == (1, 1)
    assert up.statistics.seconds_left > first.progress.seconds_left
    first.cancel(), second.cancel()
    eventually(lambda: up.statistics.active == up.statistics.waiting == up.statistics.seconds_left == 0)


def test_canceling_takes_effect_at_the_next_tick(up: Upscaler):
    handle, other = up.submit(image(64, 64, 3), **LONG), up.submit(image(16, 16, 3), steps=3)
    eventually(lambda: at_work(handle))
    assert handle.running() and handle.cancel()
    ticks = up.statistics.ticks
    assert handle.cancelled() and handle.done() and not handle.running()
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result(0)
    assert handle.cancel()  # a second time
    other.result(60)
    eventually(lambda: idle(up))
    assert up.statistics.ticks - ticks < 20  # the other image takes a few; the canceled one had 1000 to go
    assert concurrent.futures.wait([handle], timeout=1).done == {handle}
    assert next(concurrent.futures.as_completed([handle], timeout=1)) is handle


@pytest.mark.parametrize("name", ["prepare", "finish"])
def test_canceling_outside_the_worker(up: Upscaler, monkeypatch: pytest.MonkeyPatch, name: str):
    gate = Gate(monkeypatch, processing, name)
    handle = up.submit(image(16, 16, 3), steps=1)
    assert gate.entered.wait(60)
    assert handle.cancel() and handle.cancelled()
    gate.opened.set()
    eventually(lambda: idle(up))
    assert up(image(4, 4), steps=1).shape == (16, 16)


def tight(up: Upscaler, monkeypatch: pytest.MonkeyPatch, images: float, side: int = 64) -> None:
    """Leave memory for this number of images of `side` x `side` pixels."""
    up(image(16, 16), steps=1)
    need = admission.image_bytes(TileLayout(up.manifest, side, side))
    monkeypatch.setattr(memory, "available_bytes", lambda: int(images * need))


def test_images_wait_for_memory_in_order_and_can_be_canceled(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    tight(up, monkeypatch, 1.5)
    ended: list[int] = []
    first = up.submit(image(64, 64), **LONG)
    eventually(lambda: at_work(first))
    began = time.monotonic()
    rest = [up.submit(image(side, side), steps=1) for side in (64, 64, 64)]
    assert time.monotonic() - began < 1
    for number, handle in enumerate(rest):
        handle.add_done_callback(lambda _, number=number: ended.append(number))
    assert [handle.progress.position for handle in rest] == [1, 2, 3]
    assert {handle.progress.stage for handle in rest} == {"waiting"}
    assert not any(handle.running() for handle in rest)
    assert rest[1].cancel()
    assert [handle.progress.position for handle in (rest[0], rest[2])] == [1, 2]
    first.cancel()
    for handle in (rest[0], rest[2]):
        handle.result(60)
    eventually(lambda: len(ended) == 3)
    assert ended == [1, 0, 2]
    eventually(lambda: idle(up))


def test_priorities_while_waiting(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    tight(up, monkeypatch, 1.5)
    first = up.submit(image(64, 64), **LONG)
    eventually(lambda: at_work(first))
    normal = [up.submit(image(64, 64), steps=1) for _ in range(20)]
    high = up.submit(image(64, 64), steps=1, priority="high")
    low = up.submit(image(64, 64), steps=1, priority="low")
    assert [handle.progress.position for handle in (normal[0], high, normal[-1], low)] == [1, 5, 21, 22]
    for handle in (*normal, high, low, first):
        handle.cancel()
    with pytest.raises(UsageError, match="priority is 'urgent', expected one of low, normal, high"):
        up.submit(image(4, 4), priority="urgent")


def test_failed_image_frees_its_memory(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    jobs: list[weakref.ref] = []
    prepare = processing.prepare

    def spy(*arguments: Any) -> Any:
        job = prepare(*arguments)
        jobs.append(weakref.ref(job))
        return job

    monkeypatch.setattr(processing, "prepare", spy)
    monkeypatch.setattr(processing, "finish", lambda *_: 1 // 0)
    handle = up.submit(image(64, 64, 3), steps=1)
    assert isinstance(handle.exception(60), ZeroDivisionError)
    assert handle.progress.stage == "failed"
    cancelled = up.submit(image(64, 64, 3), **LONG)
    eventually(lambda: at_work(cancelled))
    cancelled.cancel()
    eventually(lambda: idle(up) and not any(job() for job in jobs), 5)  # even if the handles are kept


def test_errors_are_raised_by_their_handles(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    assert isinstance(up.submit(np.zeros((4, 4)), steps=1).exception(0), InputError)  # type: ignore[arg-type]
    assert isinstance(up.submit(Image.new("L", (0, 4)), steps=1).exception(0), InputError)
    with pytest.raises(UsageError, match="steps is 0"):
        up.submit(image(4, 4), steps=0)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    assert isinstance(up.submit(image(64, 64), steps=1).exception(60), MemoryLimitError)
    monkeypatch.undo()
    running = up.submit(image(64, 64), **LONG)
    up.close()
    assert isinstance(running.exception(60), UsageError)
    with pytest.raises(UsageError, match="closed"):
        up.submit(image(4, 4))


def test_asyncio(up: Upscaler):
    lr = image(16, 16, 3)

    async def work() -> None:
        np.testing.assert_array_equal(await asyncio.wrap_future(up.submit(lr, steps=2)), up(lr, steps=2))
        handle = up.submit(image(64, 64, 3), **LONG)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(handle), 0.2)
        assert handle.cancelled()

    asyncio.run(work())
    eventually(lambda: idle(up))


def test_callbacks_may_use_the_upscaler(up: Upscaler):
    again: list[Any] = []
    closed = threading.Event()

    def on_first(_: Any) -> None:
        again.append(up.submit(image(8, 8), steps=1))
        again[0].add_done_callback(lambda _: (up.close(), closed.set()))

    up.submit(image(8, 8), steps=1).add_done_callback(on_first)
    assert closed.wait(60)
    assert again[0].result(60).shape == (32, 32)


def test_handle_keeps_its_upscaler_open(engine: Path):
    assert Upscaler(engine, threads=1).submit(image(8, 8), steps=1).result(60).shape == (32, 32)


def test_progress_function_that_raises_cancels_the_call(up: Upscaler):
    def stop(done: float, *_: Any) -> None:
        if done:
            raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"):
        up(image(64, 64), progress=stop, **LONG)
    eventually(lambda: idle(up))


def test_iterable_may_reuse_one_array(up: Upscaler):
    sources = [image(20, 20, 3) for _ in range(4)]

    def frames() -> Iterator[np.ndarray]:
        frame = np.empty_like(sources[0])
        for source in sources:
            frame[...] = source
            yield frame

    for got, source in zip(up.map(frames(), steps=2), sources, strict=True):
        np.testing.assert_array_equal(got, up(source, steps=2))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
def test_interrupted_preparation_leaves_no_reservation(
    up: Upscaler, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
):
    """With little memory the next call would wait for the reservation for ever."""
    tight(up, monkeypatch, 1.5)

    def interrupted(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(processing, "prepare", interrupted)
        with pytest.raises(error):
            up(image(64, 64), steps=1)
    assert up.submit(image(64, 64), steps=1).result(60).shape == (256, 256)


def test_worker_survives_an_error_of_the_scheduler(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "next_batches", broken)
        with pytest.raises(RuntimeError, match="a defect"):
            up.submit(image(16, 16), steps=1).result(60)
    assert up.submit(image(16, 16), steps=1).result(60).shape == (64, 64)


def test_ending_thread_ends_its_jobs(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(worker.Worker, "_turn", broken)
    told = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda _: told.set())
    with pytest.raises(UsageError, match="closed"):
        up.submit(image(16, 16), steps=1).result(60)


@pytest.mark.parametrize("kind", [np.asarray, Image.fromarray])
def test_memory_is_checked_before_pixels_are_touched(
    up: Upscaler, monkeypatch: pytest.MonkeyPatch, kind: Callable[[np.ndarray], Any]
):
    """The separation of transparency needs 62 bytes per pixel."""
    lr = np.full((1000, 1000, 4), 200, np.uint8)
    lr[0, 0, 3] = 0
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000_000)
    picture = kind(lr)
    tracemalloc.start()
    try:
        with pytest.raises(MemoryLimitError):
            up(picture, steps=1)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_waiting_image_is_separated_into_planes_once(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    tight(up, monkeypatch, 1.5)
    calls: list[Any] = []
    split = pictures.split
    monkeypatch.setattr(pictures, "split", lambda *given, **how: calls.append(given) or split(*given, **how))
    assert len(list(up.map([image(64, 64)] * 4, steps=1))) == 4
    assert len(calls) == 4


@pytest.mark.parametrize("thread", ["worker", "images"])
def test_collection_in_a_thread_of_the_runtime(engine: Path, monkeypatch: pytest.MonkeyPatch, thread: str):
    """An Upscaler in a reference cycle is collected in the thread whose allocation starts the collector."""
    module, name = (worker.Worker, "_tick") if thread == "worker" else (processing, "finish")
    complaints, collect, function = [], threading.Event(), getattr(module, name)

    def collecting(*given: Any) -> Any:
        if collect.is_set():
            gc.collect()
        return function(*given)

    monkeypatch.setattr(module, name, collecting)
    monkeypatch.setattr(threading, "excepthook", complaints.append)
    monkeypatch.setattr("sys.unraisablehook", complaints.append)
    gc.disable()
    try:
        up = Upscaler(engine, backend="onnxruntime", threads=1)
        results = up.map([image(20, 20)] * 4, steps=300)
        next(results)
        used, pipeline = up._worker, up._pipeline
        cycle: list[Any] = [up, results]
        cycle.append(cycle)
        del up, results, cycle
        collect.set()
        eventually(lambda: pipeline.refusal and not (used._thread and used._thread.is_alive()))
    finally:
        gc.enable()
    assert not used._residency.loaded
    assert not complaints
