"""Color correction of a super-resolved image towards its low-resolution input, over the whole image.

Both methods are StableSR's (Section 3.1): matching of channel statistics (Eq. 2) and exchange of the low
wavelet band (Eq. 3-5). Images are float32 [..., H, W]: the leading axes are channels, each corrected alone,
so that one channel at a time needs working memory.
"""

from __future__ import annotations

import numpy as np

COLOR_FIXES = ("adain", "wavelet", "none")
"""Names that `fix_color` takes."""

_VARIANCE_EPS = 1e-5  # added to the variance by the published code
_ROWS_PER_BLOCK = 64


def fix_color(sr: np.ndarray, lr_up: np.ndarray, method: str, *, out: np.ndarray | None = None) -> np.ndarray:
    """Correct `sr` by `method` (one of `COLOR_FIXES`) towards `lr_up`, the input resized to the same size.

    "none" returns `sr` itself, or a copy in `out`; otherwise as `adain` and `wavelet`.
    """
    if method == "adain":
        return adain(sr, lr_up, out=out)
    if method == "wavelet":
        return wavelet(sr, lr_up, out=out)
    if method != "none":
        raise ValueError(f"unknown color correction {method!r}; choose one of {', '.join(COLOR_FIXES)}")
    if out is None or out is sr:
        return sr
    out[...] = sr
    return out


def adain(content: np.ndarray, style: np.ndarray, *, out: np.ndarray | None = None) -> np.ndarray:
    """Give each channel of `content` the mean and standard deviation of `style`'s (StableSR, Eq. 2).

    Float32 [..., H, W] both, with equal leading axes; `style` may have another height and width. The variance
    is the unbiased one plus 1e-5. Written to `out` if given, which may be `content`. Raises ValueError where
    the leading axes differ.
    """
    if content.ndim < 2 or content.shape[:-2] != style.shape[:-2]:
        raise ValueError(
            f"content {content.shape} and style {style.shape} must have the same channels before H, W"
        )
    out = np.empty_like(content) if out is None else out
    for channel in np.ndindex(content.shape[:-2]):
        content_mean, content_std = _statistics(content[channel])
        style_mean, style_std = _statistics(style[channel])
        gain = style_std / content_std
        np.multiply(content[channel], np.float32(gain), out=out[channel])
        out[channel] += np.float32(style_mean - content_mean * gain)
    return out


def wavelet(
    content: np.ndarray, style: np.ndarray, levels: int = 5, *, out: np.ndarray | None = None
) -> np.ndarray:
    """Keep the high frequencies of `content`, take the low ones of `style` (StableSR, Eq. 3-5).

    The detail bands sum to `content - low(content)`, and the low-pass filter is linear (with replicated edges
    too), so the result is `content + low(style - content)`: one cascade of blurs in place of two. Float32
    [..., H, W], equal shapes; written to `out` if given, which may be `content` but not `style`. Working
    memory is two channels. Raises ValueError where the shapes differ.
    """
    if content.ndim < 2 or content.shape != style.shape:
        raise ValueError(f"content and style must have equal shapes, got {content.shape} and {style.shape}")
    out = np.empty_like(content) if out is None else out
    low = np.empty(content.shape[-2:], np.float32)
    scratch = np.empty_like(low)
    for channel in np.ndindex(content.shape[:-2]):
        np.subtract(style[channel], content[channel], out=low)
        for level in range(levels):
            _blur_rows(low, scratch, 2**level)
            _blur_rows(scratch.T, low.T, 2**level)
        np.add(content[channel], low, out=out[channel])
    return out


def _blur_rows(source: np.ndarray, out: np.ndarray, dilation: int) -> None:
    """[1 2 1] / 4 down the first axis, taps `dilation` apart, edges replicated.

    Run along both axes this is the 3x3 kernel of StableSR's Eq. 4.
    """
    reach = min(dilation, len(source))
    np.multiply(source, np.float32(2.0), out=out)
    out[reach:] += source[: len(source) - reach]
    out[:reach] += source[0]
    out[: len(source) - reach] += source[reach:]
    out[len(source) - reach :] += source[-1]
    out *= np.float32(0.25)


def _statistics(plane: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of [H, W], summed in float64 by blocks of rows."""
    mean = float(np.mean(plane, dtype=np.float64))
    squares = 0.0
    for start in range(0, len(plane), _ROWS_PER_BLOCK):
        deviation = plane[start : start + _ROWS_PER_BLOCK].astype(np.float64)
        deviation -= mean
        squares += float(np.vdot(deviation, deviation))
    variance = squares / max(plane.size - 1, 1)  # a single pixel has no spread
    return mean, float(np.sqrt(variance + _VARIANCE_EPS))
