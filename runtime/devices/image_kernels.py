"""Images on a GPU: resizing, color correction and conversion of a caller's arrays, without the host.

Every method only enqueues launches. Arrays are described by `Pixels`: an address with strides, so that a
caller's memory of any layout is read and written in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesr.runtime.devices.driver import Driver
from moesr.runtime.devices.kernel_search import AnyKernels
from moesr.runtime.devices.operator_plan import OperatorPlan, Scalar
from moesr.runtime.images.resize import Passes

CODES = {"uint8": 1, "uint16": 2, "float16": 3, "float32": 4}
"""Codes of data types in the shapes of plans."""

ALIGNMENT = 16
"""Alignment of every pointer that a kernel gets, in bytes. A caller's array may have another one."""

METHODS = {"none": 0, "adain": 1, "wavelet": 2}
"""Codes of methods in the shapes of plans."""

Size = tuple[int, int]
"""Height and width in pixels."""

PARTIAL_SUMS = 256  # programs of the reduction, as `kernels/image_color/op.py` has them


@dataclass(frozen=True)
class Pixels:
    """An image in a GPU's memory; `strides` of y, x and channel count elements."""

    address: int
    dtype: str  # one of CODES
    size: tuple[int, int]
    strides: tuple[int, int, int]
    channels: int = 3

    @property
    def base(self) -> int:
        """The last address at or before the image that is aligned as kernels expect it."""
        return self.address // ALIGNMENT * ALIGNMENT

    @property
    def offset(self) -> int:
        """The number of elements from `base` to the image."""
        return (self.address - self.base) // np.dtype(self.dtype).itemsize


class ImageKernels:
    """The launches. `allocate` returns an array of a shape and dtype, `upload` a copy of a host array.

    The memory of an array is freed in the order of the stream once nothing refers to the array, so an array
    that is needed for one call only may be dropped when the call returns.
    """

    def __init__(
        self,
        driver: Driver,
        kernels: AnyKernels,
        allocate: Callable[[tuple[int, ...], Any], Any],
        upload: Callable[[np.ndarray], Any],
    ) -> None:
        self._driver, self._kernels = driver, kernels
        self._allocate, self._upload = allocate, upload

    def resize(
        self,
        source: Pixels,
        target: Pixels,
        made: Passes,
        *,
        levels: int = 0,
        gain: int = 1,
        rounds: bool = True,
    ) -> None:
        """Resize an image in two passes; see `imresize`, whose results these equal.

        Values are multiplied by `gain` first. With `levels` they are floats of 0 to 1 that become so many
        integers first. With `rounds` the first pass rounds to the target's integers too.
        """
        vertical, horizontal = made.vertical, made.horizontal
        first, second = (vertical, horizontal) if made.rows_first else (horizontal, vertical)
        rows, columns = made.size
        between = between_passes(source.size, made.size, rows_first=made.rows_first)
        top = float(np.iinfo(target.dtype).max) if target.dtype.startswith("u") else 0.0
        work = self._allocate((*between, 3), np.float64)
        tables = [
            [self._upload(t.index.astype(np.int32)), self._upload(np.ascontiguousarray(t.weight, np.float64))]
            for t in (first, second)
        ]
        scalars = {
            "height": between[0], "width": between[1], "out_height": rows, "out_width": columns,
            "taps_1": first.index.shape[1], "taps_2": second.index.shape[1],
            "rows_1": int(made.rows_first), "rows_2": int(not made.rows_first),
            "gain": float(levels or gain), "levels": float(levels),
            "top_1": top if rounds else 0.0, "top_2": top,
            "offset": source.offset,
            **_strides("source", source, alike=source.channels == 1), **_strides("target", target),
        }  # fmt: skip
        buffers = {"source": source.base, "target": target.address, "between": work.address}
        for i, (index, weight) in enumerate(tables, 1):
            buffers |= {f"index_{i}": index.address, f"weight_{i}": weight.address}
        plans = [
            self._kernels.plan("image_resize", "fp32", {"source": CODES[source.dtype]}),
            self._kernels.plan("image_resize", "fp32", {"target": CODES[target.dtype]}),
        ]
        for i, plan in enumerate(plans):
            self._kernels.bind(plan.launches[i], buffers, scalars, keep=False).enqueue(self._driver)

    def correct(self, content: Pixels, style: Pixels, method: str) -> Any:
        """Correct a float32 result in place by a method of `fix_color`, over the whole image.

        `style` is the enlarged input, uint8 or uint16 [H, W, 3]. Of flat regions only white and black ones
        are protected. Returns an int32 array [1] that is not 0 if the channels of the style differ anywhere.
        """
        height, width = content.size
        shape = {"pixel_bytes": np.dtype(style.dtype).itemsize, "method": METHODS[method]}
        plan = self._kernels.plan("image_color", "fp32", shape)
        colored = self._upload(np.zeros(1, np.int32))
        scratch = scratch_of(content.size, method)
        arrays = {name: self._allocate(*what) for name, what in scratch.items()}
        cells = scratch["flags"][0]
        buffers = {name: array.address for name, array in arrays.items()}
        buffers |= {"content": content.address, "style": style.address, "colored": colored.address}
        scalars = {
            "height": height, "width": width, "cells_h": cells[1], "cells_w": cells[2],
            "content_plane": content.strides[2], "content_row": content.strides[0],
            "style_row": style.strides[0],
        }  # fmt: skip
        self._run(plan, buffers, scalars)
        return colored

    def write(self, content: Pixels, colored: Any, target: Pixels) -> None:
        """Write a float32 result in [-1, 1] as integers, or as floats of 0 to 1; grey if not `colored`."""
        plan = self._kernels.plan("image_pixels", "fp32", {"target": CODES[target.dtype]})
        scalars = {
            "height": target.size[0], "width": target.size[1], "channels": target.channels,
            "content_plane": content.strides[2], "content_row": content.strides[0],
            "offset": target.offset,
            "top": 255.0 if target.dtype == "uint8" else 65535.0,
        } | dict(zip(("stride_y", "stride_x", "stride_c"), target.strides, strict=True))  # fmt: skip
        buffers = {"content": content.address, "colored": colored.address, "target": target.base}
        self._run(plan, buffers, scalars)

    def _run(self, plan: OperatorPlan, buffers: Mapping[str, int], scalars: Mapping[str, Scalar]) -> None:
        """Enqueue the launches of a plan."""
        given = {**plan.scalars, **scalars}
        for launch in plan.launches:
            self._kernels.bind(launch, buffers, given, keep=False).enqueue(self._driver)


def between_passes(source: Size, size: Size, *, rows_first: bool) -> Size:
    """Return height and width of the values between the two passes of a resize."""
    return (size[0], source[1]) if rows_first else (source[0], size[1])


def scratch_of(size: Size, method: str) -> dict[str, tuple[tuple[int, ...], type]]:
    """Return shape and dtype of the arrays that `correct` needs for a result of this size, by their names."""
    cells, planes = (3, -(-size[0] // 4), -(-size[1] // 4)), (3, *size)
    between: dict[str, dict[str, tuple[tuple[int, ...], type]]] = {
        "none": {},
        "adain": {"partial": ((3, 5, PARTIAL_SUMS), np.float64), "gain": ((3, 2), np.float32)},
        "wavelet": {"low": (planes, np.float32), "spare": (planes, np.float32)},
    }
    clipping = {"flags": (cells, np.uint8), "regions": (cells, np.uint8), "fade": (cells, np.float32)}
    return {**clipping, **between[method]}


def correct_bytes(size: Size, method: str) -> int:
    """Return the bytes of device memory that `correct` takes while it runs."""
    arrays = scratch_of(size, method).values()
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def resize_bytes(source: Size, size: Size) -> int:
    """Return the bytes of device memory that `resize` takes while it runs the passes of `imresize`."""
    rows_first = size[0] * source[1] <= size[1] * source[0]
    between = between_passes(source, size, rows_first=rows_first)
    taps = [4 * max(-(-old // new), 1) + 2 for old, new in zip(source, size, strict=True)]
    tables = sum(12 * count * new for count, new in zip(taps, size, strict=True))  # an int32 and a float64
    return 3 * 8 * math.prod(between) + tables


def _strides(name: str, pixels: Pixels, *, alike: bool = False) -> dict[str, int]:
    """The strides of an image as scalars; with one channel all three are read from it."""
    y, x, c = pixels.strides
    return {f"{name}_y": y, f"{name}_x": x, f"{name}_c": 0 if alike else c}
