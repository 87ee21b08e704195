"""Arrays of other libraries, batches and floating-point images as sources of jobs.

An array on a GPU stays there: it is read, resized, corrected and written by kernels, in the order of the
caller's stream. An array on the host goes the way of a NumPy array. A result is an array of the same library,
dtype and layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesr.runtime.devices.image_kernels import Pixels, correct_bytes, resize_bytes
from moesr.runtime.devices.interface import Canvas
from moesr.runtime.errors import InputError, UsageError
from moesr.runtime.images import arrays
from moesr.runtime.images.arrays import GpuArray
from moesr.runtime.images.resize import Passes, passes
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.pictures import Picture, Source
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import Size, TileLayout

FLOAT_LEVELS = 65535
"""Levels to which floating-point images are rounded; they are processed with 16 bits."""

SUMS_PIXEL_BYTES = 16
"""Bytes per pixel of a result's sums, float32 of three channels, and of their weights."""

_SLACK = 1e-3  # by which values of a floating-point image may lie outside 0 to 1


@dataclass(frozen=True)
class Place:
    """The place where an Upscaler computes (the number of its GPU, None for the CPU), and its scale."""

    gpu: int | None
    scale: int


def picture_of(image: Any, place: Place, stream: Any = None) -> Source:
    """Return the source for one image of any type; InputError if it cannot be used.

    A batch of several images is refused; see `batch_of`.
    """
    if isinstance(image, (HostArray, DeviceArray)):
        return image
    if not arrays.is_foreign(image) and not (isinstance(image, np.ndarray) and _is_extended(image)):
        return Picture(image)
    found = batch_of(image, place, stream)
    if found is None:
        return _single(image, place, stream)
    first, whole = found.images[0], found.whole
    if len(found.images) == 1:
        return (
            HostArray(lambda result: whole([result]), first.pixels) if isinstance(first, HostArray) else first
        )
    raise InputError(
        f"got a batch of {len(found.images)} images, expected one; call the Upscaler with the batch, or map "
        "over its images"
    )


def batch_of(image: Any, place: Place, stream: Any = None) -> Batch | None:
    """Return the images of a batch [B, C, H, W]; None if the image is not a batch."""
    if isinstance(image, np.ndarray) or not arrays.is_foreign(image):
        if not isinstance(image, np.ndarray) or image.ndim != 4:
            return None
        return _host_batch(image, image)
    found = _on_this_gpu(image, place)
    if found is None:
        pixels = arrays.to_host(image)
        return _host_batch(image, pixels) if pixels.ndim == 4 else None
    if len(found.shape) != 4:
        return None
    out = arrays.empty_like(image, _enlarged(found.shape, place.scale))
    target, handle = arrays.on_gpu(out), arrays.stream_of(image, stream)
    assert target
    images = [
        DeviceArray(found.image(i), target.image(i), out, handle, wait=stream is None)
        for i in range(found.shape[0])
    ]
    return Batch(images, lambda results: out)


@dataclass(frozen=True)
class Batch:
    """The images of a batch, and a function that makes the whole result of their results."""

    images: Sequence[Source]
    whole: Callable[[Sequence[Any]], Any]


def _host_batch(image: Any, pixels: np.ndarray) -> Batch:
    images = [HostArray(None, plane.transpose(1, 2, 0)) for plane in pixels]

    def whole(results: Sequence[np.ndarray]) -> Any:
        return arrays.like(image, np.ascontiguousarray(np.stack([r.transpose(2, 0, 1) for r in results])))

    return Batch(images, whole)


def _single(image: Any, place: Place, stream: Any) -> Source:
    """Return the source for [H, W] or [H, W, C]."""
    found = None if isinstance(image, np.ndarray) else _on_this_gpu(image, place)
    if found is None:
        pixels = image if isinstance(image, np.ndarray) else arrays.to_host(image)
        return HostArray(lambda result: arrays.like(image, result), pixels)
    if len(found.shape) not in (2, 3):
        raise InputError(f"got an array of shape {found.shape}, expected [H, W, C] or [B, C, H, W]")
    out = arrays.empty_like(image, _enlarged(found.shape, place.scale))
    target = arrays.on_gpu(out)
    assert target
    return DeviceArray(
        _planes_first(found), _planes_first(target), out, arrays.stream_of(image, stream), wait=stream is None
    )


def _is_extended(image: np.ndarray) -> bool:
    """Return True for a batch or a floating-point image, which `Picture` does not take."""
    return image.ndim == 4 or image.dtype in (np.float16, np.float32)


def _on_this_gpu(image: Any, place: Place) -> GpuArray | None:
    """Return the array on the Upscaler's GPU; None if it is on the host; InputError if it is elsewhere."""
    found = arrays.on_gpu(image)
    if found is None:
        return None
    if place.gpu is None:
        raise InputError(
            "got an array on a GPU, and this Upscaler computes on the CPU; pass a copy on the host, or open "
            "the Upscaler with device='cuda'"
        )
    if found.device not in (None, place.gpu):
        raise InputError(
            f"got an array on GPU {found.device}, and this Upscaler computes on GPU {place.gpu}; copy the "
            f"array there, or open the Upscaler with device='cuda:{found.device}'"
        )
    return found


def _enlarged(shape: tuple[int, ...], scale: int) -> tuple[int, ...]:
    """Return the shape of the result."""
    rows = 2 if len(shape) == 4 else 0
    return tuple(size * scale if at in (rows, rows + 1) else size for at, size in enumerate(shape))


def _planes_first(array: GpuArray) -> GpuArray:
    """Return [H, W] or [H, W, C] as [C, H, W]."""
    shape, strides = array.shape, array.strides
    if len(shape) == 2:
        shape, strides = (*shape, 1), (*strides, 0)
    order = (2, 0, 1)
    moved = tuple(shape[i] for i in order), tuple(strides[i] for i in order)
    return GpuArray(array.address, *moved, array.dtype, array.device, array.owner)


class HostArray:
    """See `Source`: an array of the host, [H, W] or [H, W, C] of an integer or floating-point type."""

    def __init__(self, result: Callable[[np.ndarray], Any] | None, pixels: np.ndarray) -> None:
        """Take the pixels; `result` turns a NumPy array into the caller's type (None: it stays one)."""
        self._result, self.pixels = result, pixels
        self._float = pixels.dtype if pixels.dtype in (np.float16, np.float32) else None
        shown = pixels if self._float is None else np.broadcast_to(np.uint16(0), pixels.shape)
        self._picture = Picture(shown)
        self.size: Size = self._picture.size

    def prepare(self, layout: TileLayout, settings: Settings, spooled: bool = False) -> Job:
        """See `Source.prepare`."""
        if self._float is not None:
            self._picture = Picture(_levels(self.pixels))
        job = self._picture.prepare(layout, settings, spooled)
        self.pixels = self.pixels[:0].copy()  # the caller's array may change from now on
        return job

    def finish(self, job: Job) -> Any:
        """See `Source.finish`."""
        pixels = self._picture.finish(job)
        if self._float is not None:
            pixels = (pixels / np.float32(FLOAT_LEVELS)).astype(self._float)
        return self._result(pixels) if self._result else pixels

    def extra_bytes(self, layout: TileLayout, settings: Settings) -> int:
        """See `Source.extra_bytes`."""
        return 0


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Return a floating-point image of 0 to 1 as uint16; InputError for other values."""
    low, high = float(pixels.min(initial=1.0)), float(pixels.max(initial=0.0))
    if not (low >= -_SLACK and high <= 1 + _SLACK):  # NaN is outside too
        raise InputError(
            f"got floating-point values from {low:g} to {high:g}, expected 0 to 1; for values of 0 to 255 "
            "pass image / 255, or image.astype(np.uint8)"
        )
    return np.rint(pixels.astype(np.float32).clip(0, 1) * np.float32(FLOAT_LEVELS)).astype(np.uint16)


class DeviceArray:
    """See `Source`: an image in the Upscaler's GPU. The worker's thread calls `begin` and `end`.

    Values are read as they are: transparency is not supported, 16-bit values that use a part of the range
    are not stretched, and floating-point values outside 0 to 1 are clipped.
    """

    def __init__(self, image: GpuArray, target: GpuArray, result: Any, stream: int, *, wait: bool) -> None:
        """Take [C, H, W] and the memory for its result; with `wait` the host waits until it is written."""
        if image.shape[0] not in (1, 3):
            raise InputError(
                f"got {image.shape[0]} channels on a GPU, expected 1 or 3; pass color and alpha one by one"
            )
        self._image, self._target, self._result = image, target, result
        self._stream, self._wait = stream, wait
        self.size: Size = image.shape[1], image.shape[2]

    def prepare(self, layout: TileLayout, settings: Settings, spooled: bool = False) -> Job:
        """See `Source.prepare`; UsageError for settings that need an image on the host.

        Everything stays in the device's memory, spooled or not.
        """
        from_start = settings.start_step and layout.manifest.condition == "image"
        unfit = {"tileable": settings.tileable, "checkpoint_every": settings.checkpoint_every}
        for name, value in {**unfit, "start_step": from_start}.items():
            if value:
                raise UsageError(f"{name} needs an image on the host; pass a copy of the array, image.cpu()")
        job = Job(layout, np.empty((0, 0, 3), np.uint8), None, settings)
        job.on_device = self
        return job

    def finish(self, job: Job) -> Any:
        """See `Source.finish`."""
        return self._result

    def extra_bytes(self, layout: TileLayout, settings: Settings) -> int:
        """See `Source.extra_bytes`: working memory of resizing and correcting on the device.

        The input is resized before the sums of the result and their weights are allocated, which
        `image_bytes` counts. At the end each operation frees its memory before the next one begins.
        """
        m, frame, size = layout.manifest, layout.frame, (layout.height, layout.width)
        begin = resize_bytes(size, frame.canvas)
        if m.condition == "image":
            pads = m.framing.small == "pad"
            begin = max(begin, resize_bytes(size if pads else frame.canvas, layout.latent))
        end = correct_bytes(frame.image, settings.color_fix)
        if frame.image != layout.result:
            reduced = 12 * math.prod(layout.result)  # float32 [3, H, W]
            end = max(end, reduced + resize_bytes(frame.image, layout.result))
        return max(begin - SUMS_PIXEL_BYTES * math.prod(frame.canvas), end)

    def begin(self, device: Any, layout: TileLayout) -> tuple[Canvas, Canvas | None]:
        """Return the input at output size, and the condition unless an encoder makes it."""
        device.wait_for(self._stream)
        m, frame, source = layout.manifest, layout.frame, _pixels(self._image)
        matlab, floating = m.framing.resize == "matlab", source.dtype.startswith("f")
        dtype = "uint8" if source.dtype == "uint8" and (matlab or m.framing.small == "pad") else "uint16"
        deeper = 257 if (source.dtype, dtype) == ("uint8", "uint16") else 1
        rules = {"levels": FLOAT_LEVELS if floating else 0, "gain": deeper}
        lr = device.image(frame.canvas, dtype, m.latent_factor)
        if m.framing.small == "pad":
            padded = frame.canvas[0] // m.scale, frame.canvas[1] // m.scale
            made = passes(padded, frame.canvas, m.framing.resize).of_reflected(*self.size)
            smaller = passes(padded, layout.latent).of_reflected(*self.size)
        else:
            made = passes(self.size, frame.image, m.framing.resize).reflected(*frame.canvas)
            smaller = None
        device.images.resize(source, _canvas_pixels(lr), made, rounds=matlab, **rules)
        if m.condition != "image":
            return lr, None
        condition = device.image(layout.latent, dtype, 1)
        if smaller is not None:
            device.images.resize(source, _canvas_pixels(condition), smaller, **rules)
        else:
            device.images.resize(
                _canvas_pixels(lr), _canvas_pixels(condition), passes(frame.canvas, layout.latent)
            )
        return lr, condition

    def end(self, device: Any, layout: TileLayout, lr: Canvas, result: Canvas, settings: Settings) -> None:
        """Correct the colors of a result, and write its pixels to the caller's array."""
        content, sizes = _result_pixels(result, layout.frame.image), layout.frame.image
        style = _canvas_pixels(lr, sizes)
        colored = device.images.correct(content, style, settings.color_fix)
        if sizes != layout.result:
            reduced = device.canvas((3, *layout.result))
            content = self._reduced(device, content, reduced, passes(sizes, layout.result))
        device.images.write(content, colored, _pixels(self._target))
        device.signal(self._stream, wait=self._wait)

    def _reduced(self, device: Any, content: Pixels, reduced: Canvas, made: Passes) -> Pixels:
        target = _result_pixels(reduced, made.size)
        device.images.resize(content, target, made, rounds=False)
        return target


def _pixels(array: GpuArray) -> Pixels:
    """Return a caller's [C, H, W]."""
    (channels, height, width), (c, y, x) = array.shape, array.strides
    return Pixels(array.address, array.dtype, (height, width), (y, x, c), channels)


def _canvas_pixels(canvas: Canvas, size: Size | None = None) -> Pixels:
    """Return the top left part of an image [H, W, 3], or all of it."""
    height, width, _ = canvas.data.shape
    return Pixels(canvas.data.address, canvas.data.dtype.name, size or (height, width), (3 * width, 3, 1))


def _result_pixels(canvas: Canvas, size: Size) -> Pixels:
    """Return the top left part of a result [3, H, W]."""
    _, height, width = canvas.data.shape
    return Pixels(canvas.data.address, "float32", size, (width, 1, height * width))
