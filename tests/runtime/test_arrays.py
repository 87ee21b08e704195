"""Arrays of other libraries in and out of an Upscaler: on the simulated GPU, and on the host."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simulated_backend
import torch
from cuda_simulation import SimulatedDriver
from engines import build_engine
from gpu_arrays import STREAM, CapsuleArray, GPUArray, InterfaceArray

from moesr.runtime import Upscaler
from moesr.runtime.devices import cuda_driver, current_gpu
from moesr.runtime.errors import InputError, MemoryLimitError, UsageError
from moesr.runtime.images import arrays
from moesr.runtime.loop.admission import image_bytes
from moesr.runtime.loop.array_pictures import FLOAT_LEVELS, Place, picture_of
from moesr.runtime.loop.graph_memory import GPU
from moesr.runtime.loop.settings import resolve
from moesr.runtime.loop.tile_layout import TileLayout

RNG = np.random.default_rng(5)
SIZE = 19, 26
COLOR = RNG.integers(20, 230, (*SIZE, 3), np.uint8)
PAPER = COLOR.copy()
PAPER[:12, :15] = 255
LEVEL = {"uint8": 1, "uint16": 1, "float16": 2e-3, "float32": 1.01 / FLOAT_LEVELS}


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine") / "engine")


@pytest.fixture
def driver(tmp_path, monkeypatch) -> SimulatedDriver:
    """The GPU of Upscalers that are opened from now on, and of arrays."""
    simulated_backend.install(monkeypatch, tmp_path / "kernels")
    made = SimulatedDriver()
    monkeypatch.setattr(cuda_driver, "CudaDriver", lambda index: made)
    monkeypatch.setattr(GPUArray, "driver", made, raising=False)
    return made


def of_type(image: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "uint8":
        return image
    wide = image.astype(np.uint16) * np.uint16(257)
    return wide if dtype == "uint16" else (wide / FLOAT_LEVELS).astype(dtype)


def difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - want.astype(np.float64)).max())


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("image", [COLOR, COLOR[..., :1].repeat(3, 2)], ids=["color", "grey"])
def test_a_gpu_array_gives_the_result_of_the_host(engine, driver, image, color_fix):
    with Upscaler(engine) as up:
        want = up(image, steps=2, color_fix=color_fix)
        driver.log.clear()
        got = up(InterfaceArray.of(image), steps=2, color_fix=color_fix)
        assert type(got) is InterfaceArray and got.shape == want.shape and got.dtype == want.dtype
        assert difference(got.memory, want) <= 1
        assert driver.log.count("READ") <= 3  # the flags of the passes, not the image


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_white_paper_stays_white_on_a_gpu(engine, driver, color_fix):
    with Upscaler(engine) as up:
        got = up(InterfaceArray.of(PAPER), steps=2, color_fix=color_fix).memory
    assert (got[:40, :50] == 255).all()


@pytest.mark.parametrize("dtype", arrays.DTYPES)
@pytest.mark.parametrize("kind", [InterfaceArray, CapsuleArray])
def test_types_and_layouts(engine, driver, dtype, kind):
    image = of_type(COLOR, dtype)
    with Upscaler(engine) as up:
        want = up(image, steps=2)
        assert want.dtype == dtype and want.shape == (4 * SIZE[0], 4 * SIZE[1], 3)
        for given in (kind.of(image, unaligned=1), kind.of(np.asfortranarray(image))):
            assert difference(up(given, steps=2).memory, want) <= LEVEL[dtype]
        planes = np.stack([image, image[::-1]]).transpose(0, 3, 1, 2)
        for given in (planes, np.ascontiguousarray(planes)):
            got = up(kind.of(given, unaligned=3), steps=2)
            assert got.shape == (2, 3, 4 * SIZE[0], 4 * SIZE[1])
            assert difference(got.memory[0].transpose(1, 2, 0), want) <= LEVEL[dtype]
        assert difference(got.memory, up(np.ascontiguousarray(planes), steps=2)) <= LEVEL[dtype]


def test_grey_arrays(engine, driver):
    grey = COLOR[..., 0]
    with Upscaler(engine) as up:
        want = up(grey, steps=2)
        assert difference(up(InterfaceArray.of(grey), steps=2).memory, want) <= 1
        assert difference(up(InterfaceArray.of(grey[..., None]), steps=2).memory[..., 0], want) <= 1
        assert difference(up(InterfaceArray.of(grey[None, None]), steps=2).memory[0, 0], want) <= 1


def test_the_order_of_streams(engine, driver):
    """The image is read after the work on the caller's stream, which then waits for the result."""
    with Upscaler(engine) as up:
        up(COLOR, steps=2)
        for stream, number in ((None, STREAM), (5, 5), (0, 1)):
            driver.log.clear()
            got = up(InterfaceArray.of(COLOR), steps=2, stream=stream)
            log = driver.log
            first = next(i for i, name in enumerate(log) if name == "first_pass")
            last = max(i for i, name in enumerate(log) if name == "image_pixels")
            assert log.index(f"wait for stream {number}") < first
            assert log.index(f"signal stream {number}") > last
            assert stream is None or driver._done != driver._enqueued  # the host did not wait
            driver.synchronize()
            assert got.memory.any()


class ForeignContext:
    """The functions of a driver that tell and set the context of a thread; 7 is one of the caller's."""

    context = 7

    def cuCtxGetCurrent(self, place: Any) -> int:
        place._obj.value = self.context
        return 0

    def cuCtxSetCurrent(self, context: Any) -> int:
        self.context = context.value
        return 0


def test_the_gpu_of_the_caller_stays_current(engine, driver, monkeypatch):
    threads = ForeignContext()
    monkeypatch.setattr(current_gpu, "_driver", lambda: threads)

    def opened(index: int) -> SimulatedDriver:
        threads.context = 9  # as `CudaDriver` does
        return driver

    monkeypatch.setattr(cuda_driver, "CudaDriver", opened)
    up = Upscaler(engine)
    assert threads.context == 7
    close = driver.close
    monkeypatch.setattr(driver, "close", lambda: (setattr(threads, "context", 9), close()))
    up.close()
    assert threads.context == 7 and driver.closed


def test_handles_and_streams_of_images(engine, driver):
    with Upscaler(engine) as up:
        want = up(COLOR, steps=2)
        assert difference(up.submit(InterfaceArray.of(COLOR), steps=2).result(60).memory, want) <= 1
        images = [InterfaceArray.of(COLOR), COLOR, torch.from_numpy(COLOR)]
        for got in up.map(images, steps=2):
            values = got.memory if isinstance(got, GPUArray) else np.asarray(got)
            assert difference(values, want) <= 1


def leave(up: Upscaler, driver: SimulatedDriver, nbytes: int) -> None:
    """Leave this much of the GPU's memory to images."""
    gc.collect()
    device: Any = up._worker._device
    device._collect()
    driver.set_free(nbytes)


def needed(up: Upscaler, size: tuple[int, int], color_fix: str) -> tuple[int, int]:
    """Return the bytes of an image that every image takes, and those that one on the GPU takes besides."""
    layout, given = TileLayout(up.manifest, *size), InterfaceArray.of(np.zeros((*size, 3), np.uint8))
    source = picture_of(given, Place(0, up.manifest.scale))
    return image_bytes(layout, GPU), source.extra_bytes(layout, resolve(up.manifest, color_fix=color_fix))


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("side", [9, 40], ids=["enlarged to a tile", "several tiles"])
def test_the_memory_of_an_image_on_a_gpu_is_counted(engine, driver, side, color_fix):
    image = RNG.integers(0, 256, (side, side + 5, 3), np.uint8)
    with Upscaler(engine) as up:
        up(InterfaceArray.of(image), steps=2, color_fix=color_fix)  # takes the memory of the graphs
        leave(up, driver, 1 << 30)
        up(InterfaceArray.of(image), steps=2, color_fix=color_fix)
        assert (1 << 30) - driver.least_free <= sum(needed(up, image.shape[:2], color_fix))


def test_an_image_waits_for_the_memory_of_its_color_correction(engine, driver):
    """Memory for the wavelets of one image is there, then for half of them only."""
    with Upscaler(engine) as up:
        want = up(InterfaceArray.of(COLOR), steps=2, color_fix="wavelet").memory
        plain, extra = needed(up, SIZE, "wavelet")
        leave(up, driver, plain + 3 * extra // 2)
        for got in up.map([InterfaceArray.of(COLOR)] * 3, steps=2, color_fix="wavelet"):
            driver.synchronize()
            assert difference(got.memory, want) == 0
        leave(up, driver, plain + extra // 2)
        with pytest.raises(MemoryLimitError, match=r"of memory of the GPU, .* are free; .* would fit"):
            up(InterfaceArray.of(COLOR), steps=2, color_fix="wavelet")


def test_memory_is_given_back(engine, driver):
    with Upscaler(engine) as up:
        sizes = []
        for _ in range(8):
            up(InterfaceArray.of(COLOR), steps=2)
            gc.collect()
            driver.synchronize()
            up._worker._device._collect()
            driver.synchronize()
            sizes.append(len(driver.blocks) - 3 * (len(sizes) + 1))  # three are of the caller
        assert max(sizes[2:]) - min(sizes[2:]) <= 1, sizes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InterfaceArray.of(COLOR.astype(np.int32)), "array of int32 on a GPU, expected uint8"),
        (lambda: InterfaceArray.of(COLOR[..., :2]), "2 channels on a GPU, expected 1 or 3"),
        (lambda: InterfaceArray((0, 4, 3), np.uint8), "expected some pixels"),
        (lambda: InterfaceArray((2, 2, 2, 2, 2), np.uint8), r"expected \[H, W, C\] or \[B, C, H, W\]"),
        (lambda: InterfaceArray(SIZE, ">u2"), "in this machine's byte order"),
    ],
)
def test_unfit_gpu_arrays_are_refused(engine, driver, make, message):
    with Upscaler(engine) as up, pytest.raises(InputError, match=message):
        up(make(), steps=2)


def test_an_array_whose_library_refuses_is_an_input_error(engine, driver):
    class Refusing(CapsuleArray):
        @property
        def __cuda_array_interface__(self) -> dict:
            raise RuntimeError("tensors that require a gradient have no interface")

        def __dlpack__(self, *, stream: int) -> Any:
            raise BufferError("bfloat16 is not supported")

    match = r"Refusing on a GPU that cannot be read \(bfloat16 is not supported\)"
    with Upscaler(engine) as up, pytest.raises(InputError, match=match):
        up(Refusing.of(COLOR), steps=2)


@pytest.mark.parametrize("option", [{"tileable": True}, {"checkpoint_every": 1}, {"start_step": 1}])
def test_options_that_need_the_host_are_refused(engine, driver, option):
    name = next(iter(option))
    with Upscaler(engine) as up, pytest.raises(UsageError, match=f"{name} needs an image on the host"):
        up(InterfaceArray.of(np.zeros((16, 16, 3), np.uint8)), steps=2, **option)


def test_arrays_elsewhere_are_refused(engine, driver, monkeypatch):
    monkeypatch.setattr(CapsuleArray, "device", 1)
    image = CapsuleArray.of(COLOR)
    with Upscaler(engine) as up, pytest.raises(InputError, match=r"on GPU 1, and .* computes on GPU 0"):
        up(image, steps=2)


def test_arrays_of_a_gpu_need_an_upscaler_on_it(engine, monkeypatch):
    monkeypatch.setattr(GPUArray, "driver", SimulatedDriver(), raising=False)
    match = "computes on the CPU; pass a copy on the host"
    with Upscaler(engine, device="cpu") as up, pytest.raises(InputError, match=match):
        up(CapsuleArray.of(COLOR), steps=2)


@pytest.mark.parametrize("dtype", arrays.DTYPES)
def test_tensors_of_the_host_stay_tensors(engine, dtype):
    image = of_type(COLOR, dtype)
    with Upscaler(engine, device="cpu") as up:
        want = up(image, steps=2)
        tensor = torch.from_numpy(image)
        got = up(tensor, steps=2)
        assert isinstance(got, torch.Tensor) and got.dtype == tensor.dtype
        np.testing.assert_array_equal(got.numpy(), want)
        batch = torch.stack([tensor, tensor.flip(0)]).permute(0, 3, 1, 2)
        got = up(batch, steps=2)
        assert isinstance(got, torch.Tensor) and got.shape == (2, 3, 4 * SIZE[0], 4 * SIZE[1])
        np.testing.assert_array_equal(got[0].permute(1, 2, 0).numpy(), want)
        np.testing.assert_array_equal(up(batch.numpy(), steps=2), got.numpy())
        one = up.submit(batch[:1], steps=2).result(60)
        assert torch.equal(one, got[:1])


def test_floating_point_images_are_close_to_those_of_integers(engine):
    with Upscaler(engine, device="cpu") as up:
        want = up(COLOR, steps=2).astype(np.float32) / 255
        got = up((COLOR / np.float32(255)).astype(np.float32), steps=2)
        assert difference(got, want) < 2 / 255


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (COLOR.astype(np.float32), "values from .* expected 0 to 1; .* image / 255"),
        (np.full((4, 4, 3), np.nan, np.float32), "expected 0 to 1"),
        (torch.zeros(4, 4, 3, dtype=torch.bfloat16), "Tensor that NumPy cannot read"),
        (torch.zeros(4, 4, 3, dtype=torch.float64), "float64, expected uint8"),
        (np.zeros((2, 3, 4, 4), np.int16), "int16, expected uint8"),
    ],
)
def test_unfit_arrays_of_the_host_are_refused(engine, image, message):
    with Upscaler(engine, device="cpu") as up, pytest.raises(InputError, match=message):
        up(image, steps=2)


def test_a_batch_is_one_call(engine):
    batch = np.zeros((3, 3, 8, 8), np.uint8)
    with Upscaler(engine, device="cpu") as up:
        with pytest.raises(InputError, match="batch of 3 images, expected one; call the Upscaler"):
            up.submit(batch, steps=2).result(60)
        assert up(batch, steps=2).shape == (3, 3, 32, 32)


def test_libraries_that_cannot_make_a_result_are_named(driver):
    class Other:
        dtype = np.dtype(np.uint8)

        def __init__(self) -> None: ...

    with pytest.raises(InputError, match=r"cannot be made as Other .* torch\.from_dlpack"):
        arrays.empty_like(Other(), (1, 2))


def test_handles_of_streams():
    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 9

    class Attribute:
        def __init__(self, name: str, value: Any) -> None:
            setattr(self, name, value)

    streams = [7, 0, Protocol(), Attribute("cuda_stream", 8), Attribute("ptr", 6), Attribute("handle", None)]
    assert [arrays.stream_of(None, stream) for stream in streams] == [7, 1, 9, 8, 6, 1]
    assert arrays.stream_of(None, streams[3]).owner is streams[3]  # so that it is not destroyed
    own = Attribute("__cuda_array_interface__", {"stream": 2})
    for per_thread in (
        arrays.stream_of(None, 2),
        arrays.stream_of(None, Attribute("ptr", 2)),
        arrays.stream_of(own),
    ):
        assert per_thread == 1  # the number 2 would be the worker's own default stream
    with pytest.raises(InputError, match="stream of type str"):
        arrays.stream_of(None, "main")
