"""The Python interface: types, channels and sizes of images, options, errors, threads, memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import build_engine
from PIL import Image

from moesr.runtime import EngineError, InputError, MemoryLimitError, NonFiniteError, Upscaler, UsageError
from moesr.runtime.engine import locate as engines_module
from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.images.planes import fill_transparent
from moesr.runtime.images.resize import imresize
from moesr.runtime.loop import admission, processing
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.system import memory

RNG = np.random.default_rng(11)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def up(engine: Path) -> Iterator[Upscaler]:
    with Upscaler(engine) as upscaler:
        yield upscaler


def image(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 5, 1), (7, 5, 2), (1, 1, 3), (16, 16, 3), (3, 90, 3), (33, 17, 4)], ids=str
)
def test_arrays_keep_dtype_and_channels(up: Upscaler, shape: tuple[int, ...], dtype: type):
    sr = up(image(*shape, dtype=dtype), steps=2)
    assert (sr.shape, sr.dtype) == ((shape[0] * 4, shape[1] * 4, *shape[2:]), dtype)


@pytest.mark.parametrize(
    ("mode", "returned"),
    [
        *(("L", "L"), ("LA", "LA"), ("RGB", "RGB"), ("RGBA", "RGBA"), ("I;16", "I;16")),
        *(("1", "L"), ("P", "RGB"), ("CMYK", "RGB"), ("YCbCr", "RGB")),
    ],
)
def test_pil_modes(up: Upscaler, mode: str, returned: str):
    sr = up(Image.new(mode, (6, 5)), steps=1)
    assert (sr.mode, sr.size) == (returned, (24, 20))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_result_equals_the_image(up: Upscaler, color_fix: str, dtype: type):
    """The synthetic decoder returns the LR image and a trace of the latent, so a wrong layout would show."""
    levels = np.linspace(0.2, 0.8, 24 * 36 * 3).reshape(24, 36, 3) * np.iinfo(dtype).max
    lr = levels.astype(dtype)
    sr = up(lr, color_fix=color_fix, sampler="ddim").astype(float)
    want = imresize(lr, 96, 144).astype(float)
    noise = 0.15 if color_fix == "none" else 0.1
    assert np.abs(sr - want).mean() < noise * np.iinfo(dtype).max
    assert np.corrcoef(sr.mean(axis=(1, 2)), want.mean(axis=(1, 2)))[0, 1] > 0.95


@pytest.mark.parametrize(("color_fix", "agrees"), [("adain", True), ("wavelet", True), ("none", False)])
def test_colors_are_corrected_over_the_whole_image(up: Upscaler, color_fix: str, agrees: bool):
    lr = np.full((40, 40, 3), (60, 120, 180), np.uint8)
    lr[10:30, 10:30] += 20
    sr = up(lr, color_fix=color_fix, fidelity=0.5, sampler="ddim").astype(
        float
    )  # half of the contrast is lost
    error = np.abs(sr.mean(axis=(0, 1)) - imresize(lr, 160, 160).mean(axis=(0, 1))).max()
    assert (error < 1.5) == agrees


def test_fidelity_is_passed_to_the_decoder(up: Upscaler):
    lr = np.full((16, 16, 3), 250, np.uint8)
    free, faithful = (int(up(lr, fidelity=w, color_fix="none").mean()) for w in (0.0, 1.0))
    assert free < 200 < faithful


def test_same_seed_gives_the_same_result(up: Upscaler):
    lr = image(20, 30, 3)
    first, again, other = up(lr, seed=5), up(lr, seed=5), up(lr, seed=6)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_grey_equals_grey_in_three_channels(up: Upscaler):
    grey = image(9, 9)
    color = up(np.repeat(grey[..., None], 3, axis=2), color_fix="none")
    luma = np.rint(color @ np.array([0.299, 0.587, 0.114]))
    assert np.abs(up(grey, color_fix="none") - luma).max() <= 1


def test_alpha_is_resized_and_hidden_color_does_not_spread(up: Upscaler):
    lr = np.zeros((16, 16, 4), np.uint8)
    lr[:, 8:] = (200, 200, 200, 255)
    lr[:, :8] = (255, 0, 255, 0)  # an arbitrary color under full transparency
    hidden = lr.copy()
    hidden[:, :8, :3] = 7
    sr, other = up(lr), up(hidden)
    np.testing.assert_array_equal(sr, other)
    np.testing.assert_array_equal(sr[..., 3], imresize(lr[..., 3], 64, 64))


def test_fill_transparent():
    rgb, alpha = image(5, 7, 3), np.zeros((5, 7), np.uint8)
    np.testing.assert_array_equal(fill_transparent(rgb, alpha), rgb)  # no visible pixel to take colors from
    alpha[2, 3] = 1
    assert (fill_transparent(rgb, alpha) == rgb[2, 3]).all()
    alpha[0, 0] = 255
    filled = fill_transparent(rgb, alpha)
    np.testing.assert_array_equal(filled[alpha > 0], rgb[alpha > 0])


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_scales(tmp_path: Path, scale: int):
    with Upscaler(build_engine(tmp_path, scale=scale)) as up:
        for size in ((5, 7, 3), (33, 18, 3)):
            assert up(image(*size), steps=1).shape == (size[0] * scale, size[1] * scale, 3)


def test_progress_counts_to_the_total_in_the_calling_thread(up: Upscaler):
    calls: list[tuple[float, float, str]] = []
    threads = set()

    def progress(done: float, total: float, stage: str) -> None:
        calls.append((done, total, stage))
        threads.add(threading.get_ident())

    up(image(20, 20, 3), steps=3, progress=progress)
    shares = [done / total for done, total, _ in calls]
    assert shares[0] == 0 and shares[-1] == pytest.approx(1)
    assert calls[0][2] == "sampling" and calls[-1][2] == "decoding"
    assert threads == {threading.get_ident()}


def test_progress_weights_work_by_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before a measurement the cost is in multiply-accumulates: here 16 times as many to decode a tile."""
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))  # other tests measure engines like this one
    engine = build_engine(tmp_path, experts=1)
    manifest = read_manifest(engine)
    graphs = manifest.graphs | {"decoder": replace(manifest.graphs["decoder"], macs=16_000)}
    write_manifest(replace(manifest, graphs=graphs), engine)
    with Upscaler(engine) as up:
        calls: list[tuple[float, float, str]] = []
        up(image(8, 8, 3), steps=4, progress=lambda *call: calls.append(call))
    (_, total, _), expert_s = calls[0], 1000 * 1e-11
    assert total == pytest.approx((4 + 16) * expert_s)


@pytest.mark.parametrize("max_batch", [1, 3])
def test_map_keeps_order_and_values(engine: Path, up: Upscaler, max_batch: int):
    images = [image(16, 16, 3), image(5, 40), image(30, 20, 4), image(16, 16, 3), image(2, 2, 3)]
    with Upscaler(engine, max_batch=max_batch) as batched:
        results = list(batched.map(iter(images), steps=3))
    for got, source in zip(results, images, strict=True):
        np.testing.assert_array_equal(got, up(source, steps=3))


def test_map_yields_errors_in_place(up: Upscaler):
    images = [image(4, 4), np.zeros((4, 4)), image(5, 5), "text", np.zeros((0, 4, 3), np.uint8)]
    kinds = [type(result) for result in up.map(images, return_errors=True, steps=1)]
    assert kinds == [np.ndarray, InputError, np.ndarray, InputError, InputError]
    with pytest.raises(InputError, match="float64, expected uint8"):
        list(up.map(images, steps=1))
    assert up(image(4, 4), steps=1).shape == (16, 16)


def test_abandoned_iterator_leaves_nothing_behind(engine: Path):
    with Upscaler(engine, max_batch=3) as up:
        results = up.map([image(16, 16) for _ in range(5)], steps=2)
        next(results)
        results.close()  # type: ignore[attr-defined]
        assert up._worker._jobs == []


def test_next_image_is_read_while_one_is_processed(engine: Path):
    """Reading overlaps with inference even if tiles run one at a time."""
    fetched: list[int] = []

    def source() -> Iterator[np.ndarray]:
        for k in range(4):
            fetched.append(k)
            yield image(8, 8)

    with Upscaler(engine, max_batch=1) as up:
        results = up.map(source(), steps=1)
        next(results)
        assert fetched == [0, 1]
        next(results)
        assert fetched == [0, 1, 2]


def test_images_wait_for_memory_reserved_by_others_in_flight(engine: Path, monkeypatch: pytest.MonkeyPatch):
    with Upscaler(engine) as up:
        up(image(64, 64), steps=1)
        need = admission.image_bytes(TileLayout(up.manifest, 64, 64))
        monkeypatch.setattr(memory, "available_bytes", lambda: int(1.5 * need))
        most: list[int] = []
        prepare = processing.prepare

        def spy(*arguments: Any) -> Any:
            job = prepare(*arguments)
            most.append(sum(r.stands for r in up._admission._reservations))
            return job

        monkeypatch.setattr(processing, "prepare", spy)
        assert len(list(up.map([image(64, 64) for _ in range(4)], steps=2))) == 4
        threads = [threading.Thread(target=up, args=(image(64, 64),), kwargs={"steps": 2}) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert most == [1] * 8
        monkeypatch.setattr(memory, "available_bytes", lambda: need // 2)
        with pytest.raises(MemoryLimitError):
            up(image(64, 64))


def test_suspended_iterator_does_not_block_others(engine: Path, monkeypatch: pytest.MonkeyPatch):
    """Its finished images hold memory that counts as used, and no waiting would ever free it."""
    with Upscaler(engine) as up:
        up(image(64, 64), steps=1)
        need = admission.image_bytes(TileLayout(up.manifest, 64, 64))
        monkeypatch.setattr(memory, "available_bytes", lambda: int(2.5 * need))
        results = up.map([image(64, 64) for _ in range(3)], steps=1)
        next(results)
        assert up(image(64, 64), steps=1).shape == (256, 256)
        results.close()  # type: ignore[attr-defined]


def test_closing_ends_images_in_flight_with_a_clear_error(engine: Path):
    with Upscaler(engine) as up:
        results = up.map([image(8, 8) for _ in range(3)], steps=1, return_errors=True)
        next(results)
        up.close()
        with pytest.raises(UsageError, match="is closed"):
            list(results)


def test_closing_while_a_graph_runs(engine: Path):
    up, caught, begun = Upscaler(engine), [], threading.Event()

    def work() -> None:
        try:
            up(image(40, 40, 3), steps=1000, progress=lambda done, *_: begun.set() if done else None)
        except UsageError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert begun.wait(60)
    up.close()
    thread.join(timeout=60)
    assert [str(error) for error in caught] == ["this Upscaler is closed; open another"]


def test_forgotten_upscaler_closes(engine: Path):
    up = Upscaler(engine)
    up(image(4, 4), steps=1)
    thread = up._worker._thread
    del up
    gc.collect()
    assert thread and not thread.is_alive()


def test_closed(engine: Path):
    with Upscaler(engine) as up:
        pass
    with pytest.raises(UsageError, match="is closed"):
        up(image(4, 4))


BAD_OPTIONS = {
    "steps 0": {"steps": 0},
    "steps beyond the schedule": {"steps": 1001},
    "steps not whole": {"steps": 2.5},
    "sampler": {"sampler": "euler"},
    "seed": {"seed": -1},
    "color_fix": {"color_fix": "sepia"},
    "fidelity": {"fidelity": 1.5},
    "fidelity nan": {"fidelity": float("nan")},
}


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_are_named_before_any_work(up: Upscaler, options: dict):
    (name,) = options
    with pytest.raises(UsageError, match=f"{name} is .*, expected"):
        up(image(4, 4), **options)
    with pytest.raises(UsageError):
        up.map([], **options)


def test_bad_setup(engine: Path):
    with pytest.raises(UsageError, match="unknown backend 'tvm'"):
        Upscaler(engine, backend="tvm")
    with pytest.raises(UsageError, match="threads is 0"):
        Upscaler(engine, threads=0)
    with pytest.raises(UsageError, match="device is 'cuda:x'"):
        Upscaler(engine, device="cuda:x")
    with pytest.raises(EngineError, match="cannot use device 'npu' here"):
        Upscaler(engine, device="npu")


def test_missing_bundled_engine_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines_module.importlib.resources, "files", lambda _: tmp_path)
    for name in (None, "demo-x8"):
        with pytest.raises(EngineError, match=r"no bundled demo engine .* moesr-export"):
            Upscaler(name)


def test_directory_takes_precedence_over_the_bundled_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    bundled = engines_module.engine_directory("demo-x4")
    assert bundled == engines_module.engine_directory() and bundled.is_absolute()
    (tmp_path / "demo-x4").mkdir()
    assert engines_module.engine_directory("demo-x4") == Path("demo-x4")
    with pytest.raises(EngineError, match=r"demo-x5: no such engine .*no bundled engine .*demo-x4, demo-x8"):
        Upscaler("demo-x5")


def test_graph_that_onnxruntime_cannot_load(tmp_path: Path):
    engine = build_engine(tmp_path)
    (engine / "expert_0.onnx").write_bytes(b"not a graph")
    with (
        Upscaler(engine, verify=False) as up,
        pytest.raises(EngineError, match=r"expert_0\.onnx: (onnxruntime cannot run it|not an ONNX file)"),
    ):
        up(image(4, 4), steps=1)


def test_graph_with_another_boundary(tmp_path: Path):
    engine, other = build_engine(tmp_path / "a", experts=2), build_engine(tmp_path / "b", tile=32)
    (engine / "expert_1.onnx").write_bytes((other / "expert_1.onnx").read_bytes())
    (engine / "decoder.onnx").write_bytes((engine / "expert_0.onnx").read_bytes())
    with Upscaler(engine, verify=False) as up:
        with pytest.raises(EngineError, match=r"is z_t .* 8, 8\].*, expected .* 16, 16\]"):
            up(image(4, 4), steps=2)
        with pytest.raises(EngineError, match=r"decoder\.onnx: is z_t .* expected z .*, lr"):
            up(image(4, 4), steps=1)


def test_nan_guard(tmp_path: Path):
    engine = build_engine(tmp_path, nan_expert=0, precision="fp16")
    with Upscaler(engine) as up, pytest.raises(NonFiniteError, match=r"expert_0\.onnx.*without --fp16"):
        up(image(4, 4))


def test_memory_is_checked_before_work(up: Upscaler, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 50_000_000)
    assert up(image(8, 8), steps=1).shape == (32, 32)
    huge = np.broadcast_to(np.uint8(0), (30_000, 20_000, 3))
    with pytest.raises(MemoryLimitError, match=r"20000x30000 to 80000x120000 .*50 MB are free"):
        up(huge)


def test_threads_get_their_own_results(engine: Path, up: Upscaler):
    images = [image(18, 18, 3) for _ in range(4)]
    results: dict[int, np.ndarray] = {}
    with Upscaler(engine, max_batch=2) as shared:
        workers = [
            threading.Thread(target=lambda k=k: results.update({k: shared(images[k], steps=3)}))
            for k in range(4)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(timeout=60)
    for k, source in enumerate(images):
        np.testing.assert_array_equal(results[k], up(source, steps=3))


def test_available_memory_respects_the_container(tmp_path: Path):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    cgroup.mkdir()
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert memory.available_bytes(proc, cgroup) == 8000 * 1024
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("4000\n")
    assert memory.available_bytes(proc, cgroup) == 8000 * 1024
    (cgroup / "memory.max").write_text("5000\n")
    (cgroup / "memory.stat").write_text("anon 1\ninactive_file 300\n")
    assert memory.available_bytes(proc, cgroup) == 1300
