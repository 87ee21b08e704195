"""Color correction of a super-resolved image towards its low-resolution input, over the whole image.

Both methods come from StableSR (Section 3.1): matching of channel statistics (Eq. 2) and exchange of the low
wavelet band (Eq. 3-5). Images are float32 [..., H, W] in [-1, 1]. The leading axes are channels; each channel
is corrected separately, so working memory is needed for one channel at a time.

`adain` and `wavelet` are the published methods. `fix_color` also keeps the level of flat regions (see
`flat_regions`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moesr.runtime.images import flat_regions
from moesr.runtime.images.flat_regions import LEVEL, Protection, Regions, Search

COLOR_FIXES = ("adain", "wavelet", "none")
"""The names of methods for `fix_color`."""

LEVELS = 5
"""Blurs of the wavelet method."""

VARIANCE_EPS = 1e-5  # added to the variance by the published code
_ROWS_PER_BLOCK = 64


def fix_color(sr: np.ndarray, lr_up: np.ndarray, method: str, *, out: np.ndarray | None = None) -> np.ndarray:
    """Correct `sr` by `method` (one of `COLOR_FIXES`) towards `lr_up`, the input resized to the same size.

    Regions where `lr_up` is flat white or black become `lr_up` whatever the method; "none" does nothing else,
    and returns `sr` itself if there are none and no `out`. The other methods also leave the level of flat
    regions as it is (see `flat_regions`). `out` may be `sr`. Raises ValueError for an unknown method or
    unequal shapes.
    """
    if method not in COLOR_FIXES:
        raise ValueError(f"unknown color correction {method!r}; choose one of {', '.join(COLOR_FIXES)}")
    _check_shapes(sr, lr_up)
    correct = {"adain": _adain_around, "wavelet": _wavelet_around, "none": _pinned}[method]
    for channel in np.ndindex(sr.shape[:-2]):
        content, style = sr[channel], lr_up[channel]
        regions = _regions(content, style, method)
        if regions is None and method == "none" and (out is None or out is sr):
            continue
        out = (sr.copy() if method == "none" else np.empty_like(sr)) if out is None else out
        if regions is not None:
            correct(content, style, out[channel], regions)
        elif method == "none":
            out[channel] = content
        else:
            (_adain_plane if method == "adain" else _wavelet_plane)(content, style, out[channel])
    return sr if out is None else out


def _regions(content: np.ndarray, style: np.ndarray, method: str) -> Regions | None:
    """Return the regions of `style` [H, W] whose level `method` keeps; None if there are none."""
    search = Search()
    for rows in _blocks(len(style)):
        search.add(style[rows], content[rows])
    return search.clipped() if method == "none" else search.flat()


def adain(content: np.ndarray, style: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Give each channel of `content` the mean and standard deviation of that of `style` (StableSR, Eq. 2).

    Both are float32 [..., H, W] with equal leading axes; `style` may have another height and width. The
    variance is the unbiased one plus 1e-5. The result is written to `out` if given, which may be `content`.
    Raises ValueError if the leading axes differ.
    """
    if content.ndim < 2 or content.shape[:-2] != style.shape[:-2]:
        raise ValueError(
            f"content {content.shape} and style {style.shape} must have the same channels before H, W"
        )
    out = np.empty_like(content) if out is None else out
    for channel in np.ndindex(content.shape[:-2]):
        _adain_plane(content[channel], style[channel], out[channel])
    return out


def wavelet(
    content: np.ndarray, style: np.ndarray, levels: int = LEVELS, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Combine the high frequencies of `content` with the low frequencies of `style` (StableSR, Eq. 3-5).

    The detail bands sum to `content - low(content)`, and the low-pass filter is linear (with replicated edges
    too), so the result is `content + low(style - content)`: one cascade of blurs instead of two. Both images
    are float32 [..., H, W] of equal shape. The result is written to `out` if given, which may be `content`
    but not `style`. Working memory is two channels. Raises ValueError if the shapes differ.
    """
    _check_shapes(content, style)
    out = np.empty_like(content) if out is None else out
    for channel in np.ndindex(content.shape[:-2]):
        _wavelet_plane(content[channel], style[channel], out[channel], levels)
    return out


def _check_shapes(content: np.ndarray, style: np.ndarray) -> None:
    if content.ndim < 2 or content.shape != style.shape:
        raise ValueError(f"content and style must have equal shapes, got {content.shape} and {style.shape}")


def _adain_plane(content: np.ndarray, style: np.ndarray, out: np.ndarray) -> None:
    gain, offset, _ = _gain_and_offset(content, style)
    np.multiply(content, np.float32(gain), out=out)
    out += np.float32(offset)


def _adain_around(content: np.ndarray, style: np.ndarray, out: np.ndarray, regions: Regions) -> None:
    """`_adain_plane` with the level of flat regions kept, and statistics of what is not near white or black.

    An image of one level has no other deviation than the one that its correction takes away.
    """
    gain, offset, deviation = _gain_and_offset(content, style, regions.near)
    if deviation < LEVEL:
        regions = regions.without_steady
    protection = Protection(regions, content.shape[1])
    for rows in _blocks(len(content)):
        correction = content[rows] * np.float32(gain - 1.0) + np.float32(offset)
        protection.apply(rows, content[rows], correction, style[rows], out[rows])


def _pinned(content: np.ndarray, style: np.ndarray, out: np.ndarray, regions: Regions) -> None:
    """`content` with the pinned regions of `style`."""
    protection = Protection(regions, content.shape[1])
    for rows in _blocks(len(content)):
        protection.pin(rows, content[rows], style[rows], out[rows])


def _wavelet_plane(content: np.ndarray, style: np.ndarray, out: np.ndarray, levels: int = LEVELS) -> None:
    low = np.empty(content.shape, np.float32)
    np.subtract(style, content, out=low)
    np.add(content, low_band(low, levels), out=out)


def _wavelet_around(content: np.ndarray, style: np.ndarray, out: np.ndarray, regions: Regions) -> None:
    """`_wavelet_plane` with pinned regions of `style`, whose difference does not spread to what is around."""
    regions = regions.without_steady
    low = np.empty(content.shape, np.float32)
    np.subtract(style, content, out=low)
    protection = Protection(regions, content.shape[1])
    for rows in _blocks(len(content)):
        low[rows][flat_regions.expand(regions.pinned, rows, content.shape[1])] = 0.0
    low_band(low, LEVELS)
    for rows in _blocks(len(content)):
        protection.apply(rows, content[rows], low[rows], style[rows], out[rows])


def low_band(plane: np.ndarray, levels: int) -> np.ndarray:
    """Blur [H, W] in place `levels` times, with taps 1, 2, 4, ... pixels apart, and return it.

    A value depends on those at most `2**levels - 1` rows and columns away.
    """
    scratch = np.empty_like(plane)
    for level in range(levels):
        _blur_rows(plane, scratch, 2**level)
        _blur_rows(scratch.T, plane.T, 2**level)
    return plane


def _blur_rows(source: np.ndarray, out: np.ndarray, dilation: int) -> None:
    """Apply [1 2 1] / 4 along the first axis, with taps `dilation` apart and replicated edges.

    Applied along both axes this is the 3x3 kernel of StableSR's Eq. 4.
    """
    reach = min(dilation, len(source))
    np.multiply(source, np.float32(2.0), out=out)
    out[reach:] += source[: len(source) - reach]
    out[:reach] += source[0]
    out[: len(source) - reach] += source[reach:]
    out[len(source) - reach :] += source[-1]
    out *= np.float32(0.25)


def _gain_and_offset(
    content: np.ndarray, style: np.ndarray, cells: np.ndarray | None = None
) -> tuple[float, float, float]:
    """Return the factor and offset that give `content` the mean and deviation of `style`, and that deviation.

    Pixels in `cells` do not count.
    """
    content_mean, content_std = _statistics(content, cells)
    style_mean, style_std = _statistics(style, cells)
    gain = style_std / content_std
    return gain, style_mean - content_mean * gain, style_std


def _statistics(plane: np.ndarray, cells: np.ndarray | None = None) -> tuple[float, float]:
    """Return the mean and deviation of [H, W] in float64, by blocks of rows, without pixels in `cells`."""
    if cells is None:
        count, mean = plane.size, float(np.mean(plane, dtype=np.float64))
    else:
        sums = [(values.size, float(values.sum())) for values in _outside(plane, cells)]
        count = sum(size for size, _ in sums)
        mean = sum(total for _, total in sums) / max(count, 1)
    squares = 0.0
    for values in _outside(plane, cells):
        values -= mean
        squares += float(np.vdot(values, values))
    variance = squares / max(count - 1, 1)  # a single pixel has no deviation
    return mean, float(np.sqrt(variance + VARIANCE_EPS))


def _outside(plane: np.ndarray, cells: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield float64 copies of the pixels outside `cells`, by blocks of rows."""
    for rows in _blocks(len(plane)):
        block = plane[rows]
        if cells is not None:
            block = block[~flat_regions.expand(cells, rows, plane.shape[1])]
        yield block.astype(np.float64)


def _blocks(rows: int) -> Iterator[slice]:
    """Yield slices of rows that begin at multiples of the side of a cell."""
    return (slice(start, min(start + _ROWS_PER_BLOCK, rows)) for start in range(0, rows, _ROWS_PER_BLOCK))
