"""The kernels for images on a GPU, in NumPy, for the simulated driver."""

from __future__ import annotations

from typing import Any

import numpy as np

from moesr.kernels.image_color import reference

TYPES = {"*u8": np.uint8, "*u16": np.uint16, "*fp16": np.float16, "*fp32": np.float32}


def strided(driver: Any, address: int, dtype: Any, shape: tuple, strides: tuple) -> np.ndarray:
    """A view of memory with strides in elements; all of it must be in one block."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    flat, size = driver.view(address, reach, dtype), np.dtype(dtype).itemsize
    return np.lib.stride_tricks.as_strided(flat, shape, tuple(stride * size for stride in strides))


def rounded(values: np.ndarray, top: float) -> np.ndarray:
    return np.rint(values).clip(0, top) if top else values


def weighted(source: np.ndarray, index: np.ndarray, weight: np.ndarray, along_rows: int) -> np.ndarray:
    """Sums along the first or second axis of [H, W, 3], tap by tap."""
    moved = source if along_rows else source.swapaxes(0, 1)
    total = np.zeros((len(index), *moved.shape[1:]))
    for tap in range(index.shape[1]):
        total += moved[index[:, tap]] * weight[:, tap, None, None]
    return total if along_rows else total.swapaxes(0, 1)


def tables(driver: Any, index: int, weight: int, taps: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    found = driver.view(index, count * taps, np.int32), driver.view(weight, count * taps, np.float64)
    return found[0].reshape(count, taps), found[1].reshape(count, taps)


def first_pass(
    driver, constants, grid, source, between, index, weight, taps, height, width, along_rows, offset, *rest
) -> None:
    y, x, c, gain, levels, top, *_ = rest
    dtype = TYPES[constants["types"][0]]
    count = height if along_rows else width
    positions, weights = tables(driver, index, weight, taps, count)
    reached = int(positions.max()) + 1
    shape = (reached, width, 3) if along_rows else (height, reached, 3)
    values = strided(driver, source + offset * np.dtype(dtype).itemsize, dtype, shape, (y, x, c))
    values = rounded(np.nan_to_num(values.astype(np.float64) * gain), levels)
    out = driver.view(between, height * width * 3, np.float64).reshape(height, width, 3)
    out[...] = rounded(weighted(values, positions, weights, along_rows), top)


def second_pass(
    driver, constants, grid, between, target, index, weight, taps, height, width, source_width, *rest
) -> None:
    along_rows, y, x, c, top, *_ = rest
    positions, weights = tables(driver, index, weight, taps, height if along_rows else width)
    rows = int(positions.max()) + 1 if along_rows else height
    source = driver.view(between, rows * source_width * 3, np.float64).reshape(rows, source_width, 3)
    out = strided(driver, target, TYPES[constants["types"][1]], (height, width, 3), (y, x, c))
    out[...] = rounded(weighted(source, positions, weights, along_rows), top)


def unit(driver: Any, style: int, bytes_: int, height: int, width: int, row: int) -> np.ndarray:
    """The enlarged input as float32 [3, H, W] in [-1, 1]."""
    dtype = np.uint8 if bytes_ == 1 else np.uint16
    pixels = strided(driver, style, dtype, (height, width, 3), (row, 3, 1)).transpose(2, 0, 1)
    return pixels.astype(np.float32) * np.float32(2.0 / np.iinfo(dtype).max) - np.float32(1.0)


def planes(driver: Any, address: int, height: int, width: int, plane: int, row: int) -> np.ndarray:
    return strided(driver, address, np.float32, (3, height, width), (plane, row, 1))


def cells_of(driver: Any, address: int, cells_h: int, cells_w: int, dtype: Any = np.uint8) -> np.ndarray:
    return driver.view(address, 3 * cells_h * cells_w, dtype).reshape(3, cells_h, cells_w)


def clip_cells(
    driver, constants, grid, style, flags, colored, height, width, row, cells_h, cells_w, *_
) -> None:
    values = unit(driver, style, constants["BYTES"], height, width, row)
    if (values != values[:1]).any():
        driver.view(colored, 1, np.int32)[0] = 1
    out = cells_of(driver, flags, cells_h, cells_w)
    for channel in range(3):
        out[channel] = reference.flags_of(values[channel])


def clip_regions(driver, constants, grid, flags, regions, cells_h, cells_w, *_) -> None:
    known = cells_of(driver, flags, cells_h, cells_w)
    out = cells_of(driver, regions, cells_h, cells_w)
    for channel, bits in enumerate(known):
        out[channel] = reference.regions_of(bits)


def clip_fade(driver, constants, grid, regions, fade, cells_h, cells_w, *_) -> None:
    out = cells_of(driver, fade, cells_h, cells_w, np.float32)
    for channel, region in enumerate(cells_of(driver, regions, cells_h, cells_w)):
        out[channel] = reference.fade(region != 0)


def pixels_of(regions: np.ndarray, height: int, width: int) -> np.ndarray:
    return regions.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width] != 0


def statistics(
    driver, constants, grid, content, style, regions, partial, height, width, plane, row, style_row, *cells
) -> None:
    free = ~pixels_of(cells_of(driver, regions, *cells[:2]), height, width)
    a = planes(driver, content, height, width, plane, row).astype(np.float64)
    b = unit(driver, style, constants["BYTES"], height, width, style_row).astype(np.float64)
    out = driver.view(partial, 15 * grid[0], np.float64).reshape(3, 5, grid[0])
    out[...] = 0
    for c in range(3):
        x, y = a[c][free[c]], b[c][free[c]]
        out[c, :, 0] = x.size, x.sum(), (x * x).sum(), y.sum(), (y * y).sum()


def gains(driver, constants, grid, partial, gain, *_) -> None:
    programs = constants["PROGRAMS"]
    sums = driver.view(partial, 15 * programs, np.float64).reshape(3, 5, programs).sum(axis=2)
    out = driver.view(gain, 6, np.float32).reshape(3, 2)
    for c, (count, *both) in enumerate(sums):
        means, deviations = [], []
        for total, squares in (both[:2], both[2:]):
            means.append(total / max(count, 1))
            variance = (squares - count * means[-1] ** 2) / max(count - 1, 1)
            deviations.append(np.sqrt(max(variance, 0) + 1e-5))
        factor = deviations[1] / deviations[0]
        out[c] = factor - 1, means[1] - means[0] * factor


def difference(
    driver, constants, grid, content, style, regions, low, height, width, plane, row, style_row, *cells
) -> None:
    clipped = pixels_of(cells_of(driver, regions, *cells[:2]), height, width)
    value = unit(driver, style, constants["BYTES"], height, width, style_row)
    value = value - planes(driver, content, height, width, plane, row)
    planes(driver, low, height, width, height * width, width)[...] = np.where(clipped, 0, value)


def blur(driver, constants, grid, source, target, height, width, distance, along_rows, *_) -> None:
    values = planes(driver, source, height, width, height * width, width)
    axis = 1 if along_rows else 2
    at, last = np.arange(values.shape[axis]), values.shape[axis] - 1
    total = values * np.float32(2) + values.take(np.maximum(at - distance, 0), axis)
    total += values.take(np.minimum(at + distance, last), axis)
    planes(driver, target, height, width, height * width, width)[...] = total * np.float32(0.25)


def correct(
    driver,
    constants,
    grid,
    content,
    style,
    regions,
    fade,
    given,
    height,
    width,
    plane,
    row,
    style_row,
    *cells,
) -> None:
    values = planes(driver, content, height, width, plane, row)
    target = unit(driver, style, constants["BYTES"], height, width, style_row)
    region, free = cells_of(driver, regions, *cells[:2]), cells_of(driver, fade, *cells[:2], np.float32)
    corrections = np.zeros(values.shape, np.float32)
    if constants["METHOD"] == 2:
        corrections = planes(driver, given, height, width, height * width, width).copy()
    elif constants["METHOD"] == 1:
        factors = driver.view(given, 6, np.float32).reshape(3, 2, 1, 1)
        corrections = values * factors[:, 0] + factors[:, 1]
    for c in range(3):
        values[c] = reference.protected(values[c], corrections[c], target[c], region[c] != 0, free[c])


def image_pixels(
    driver, constants, grid, content, colored, target, height, width, plane, row, channels, offset, *rest
) -> None:
    y, x, c, top, *_ = rest
    dtype = np.dtype(TYPES[constants["types"][2]])
    values = planes(driver, content, height, width, plane, row)
    levels = np.rint(((values + np.float32(1)) * np.float32(top / 2)).clip(0, top)).transpose(1, 2, 0)
    if channels == 1 or not driver.view(colored, 1, np.int32)[0]:
        levels = np.rint(levels @ np.array([0.299, 0.587, 0.114], np.float32))[..., None].repeat(3, axis=2)
    levels = levels[..., :channels]
    out = strided(driver, target + offset * dtype.itemsize, dtype, levels.shape, (y, x, c))
    out[...] = levels / np.float32(top) if dtype.kind == "f" else levels


RUN = {
    function.__name__: function
    for function in (
        first_pass, second_pass, clip_cells, clip_regions, clip_fade, statistics, gains, difference, blur,
        correct, image_pixels,
    )
}  # fmt: skip
