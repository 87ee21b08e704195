"""Arrays as users pass them: they are split into color and alpha, and joined again."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from moesr.runtime.errors import InputError

_FREE_BITS = 2  # 16-bit data with at least this number of unused bits are stretched
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # luma weights of ITU-R BT.601

log = logging.getLogger("moesr")

_CURES = {
    "b": "for black and white pass image.astype(np.uint8) * 255",
    "f": "for values of 0 to 1 pass (image * 255).round().astype(np.uint8)",
    "O": "its rows may be of several lengths; pass np.asarray(rows, np.uint8)",
}
"""Advice for arrays of other types, by NumPy's letter for the kind."""


@dataclass(frozen=True, eq=False)
class Planes:
    """An image in parts: `rgb` [H, W, 3] and `alpha` [H, W] or None, both uint8 or both uint16.

    `grey` images have three equal channels in `rgb`. `channels` and `ndim` describe the original array. The
    values of `rgb` are `(value - base) << shift` of the original values (see `_used_range`).
    """

    rgb: np.ndarray
    alpha: np.ndarray | None
    ndim: int
    channels: int
    grey: bool
    base: int = 0
    shift: int = 0


def split(image: Any, *, keep_colors_under_alpha: bool = False) -> Planes:
    """Split a uint8 or uint16 array HxW or HxWxC; C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.

    An image whose channels are equal everywhere is grey, even if it has three channels. Colors of fully
    transparent pixels are usually arbitrary; they are replaced by those of visible pixels nearby, so that
    they cannot spread to these. `keep_colors_under_alpha` keeps them, for textures with a mask in alpha.
    16-bit values that use a quarter of the range or less are stretched. Raises InputError for anything that
    is not such an array.
    """
    image = checked(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    grey = channels < 3
    image = np.asarray(image, image.dtype.newbyteorder("="))
    planes = image.reshape(*image.shape[:2], channels)
    rgb = np.repeat(planes[..., :1], 3, axis=2) if grey else np.ascontiguousarray(planes[..., :3])
    alpha = np.ascontiguousarray(planes[..., -1]) if channels in (2, 4) else None
    if alpha is not None and not keep_colors_under_alpha and not alpha.all():
        rgb = fill_transparent(rgb, alpha)
    base, shift = _used_range(rgb)
    if shift:
        rgb = (rgb - np.uint16(base)) << np.uint16(shift)
    return Planes(rgb, alpha, image.ndim, channels, grey or _is_neutral(rgb), base, shift)


def _used_range(rgb: np.ndarray) -> tuple[int, int]:
    """Return the lowest value and the number of unused bits of 16-bit data that use part of the range.

    Instruments deliver 10, 12 or 14 bits in 16-bit files. A model sees such data as an almost black image,
    and its error is as large as in a bright one, which is a large part of the range in use. Photographs use
    more than a quarter of the range and are not changed. The lowest value is subtracted only from data in a
    narrow range far from 0, such as signed values with an offset; otherwise it is 0, so that 12-bit data give
    the same result as the same data stored 16 times as large.
    """
    if rgb.dtype != np.uint16:
        return 0, 0
    low, high = int(rgb.min()), int(rgb.max())
    base = low if 4 * (high - low) < high else 0
    shift = 16 - (high - base).bit_length()
    if shift < _FREE_BITS or high == base:
        return 0, 0
    log.info("16-bit values lie within %d..%d: they are stretched for the model, and scaled back", low, high)
    return base, shift


def _is_neutral(rgb: np.ndarray) -> bool:
    """Return True if red, green and blue are equal everywhere."""
    return bool((rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 1] == rgb[..., 2]).all())


def checked(image: Any) -> np.ndarray:
    """Return the image as a plain array for `split`, without copying pixels; InputError as for `split`."""
    image = _plain(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or image.size == 0:
        raise InputError(
            f"got an array of shape {image.shape}, expected HxW or HxWxC with C of 1 to 4, and some pixels"
        )
    return image


def _plain(image: Any) -> np.ndarray:
    """Return a plain array of uint8 or uint16; otherwise raise an InputError that says what to do."""
    if isinstance(image, np.ma.MaskedArray):
        raise InputError("got a masked array, expected a plain one; pass image.filled(0), or image.data")
    if isinstance(image, np.matrix):
        raise InputError("got a np.matrix, expected an array; pass np.asarray(image)")
    if not isinstance(image, np.ndarray):
        cure = "; pass np.asarray(image, np.uint8)" if isinstance(image, (list, tuple)) else ""
        raise InputError(f"got {type(image).__name__}, expected a NumPy array or a PIL image{cure}")
    if image.dtype.kind != "u" or image.dtype.itemsize > 2:
        cure = _CURES.get(image.dtype.kind, "convert it with image.astype(np.uint8)")
        raise InputError(
            f"got an array of {image.dtype}, expected uint8 (0..255) or uint16 (0..65535); {cure}"
        )
    return np.asarray(image)


def join(rgb: np.ndarray, alpha: np.ndarray | None, like: Planes) -> np.ndarray:
    """Join a result in the layout, and in the range of values, of the array from which `like` was split."""
    color = grey_of(rgb)[..., None] if like.grey else rgb
    if like.shift:
        color = _scaled_back(color, like)
    planes = [color.repeat(3, axis=2) if like.grey and like.channels > 2 else color]
    if alpha is not None:
        planes.append(alpha[..., None])
    image = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
    return image[..., 0] if like.ndim == 2 else image


def _scaled_back(values: np.ndarray, like: Planes) -> np.ndarray:
    """Undo the stretch of `split`, with rounding, and limited to the bits that were in use."""
    values = (values.astype(np.uint32) + (1 << (like.shift - 1))) >> like.shift
    top = min((1 << (16 - like.shift)) - 1, 0xFFFF - like.base)
    return (np.minimum(values, top) + like.base).astype(np.uint16)


def to_unit(pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Map uint8 or uint16 values to [-1, 1] in `out`, float32 of the same shape."""
    np.multiply(pixels, np.float32(2.0 / np.iinfo(pixels.dtype).max), out=out)
    return np.subtract(out, np.float32(1.0), out=out)


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """Return the rounded luma of uint8 or uint16 [H, W, 3]: [H, W] of the same type."""
    return np.rint(rgb @ _LUMA).astype(rgb.dtype)


def fill_transparent(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Replace colors where `alpha` is 0 by means over increasing neighborhoods; others stay as they are.

    Takes [H, W, 3] and [H, W] and returns a new array. An image without a visible pixel is returned
    unchanged.
    """
    visible = alpha > 0
    if not visible.any():
        return rgb
    filled = _fill(rgb.astype(np.float32), visible.astype(np.float32))
    return np.where(visible[..., None], rgb, np.rint(filled).astype(rgb.dtype))


def _fill(color: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Average known colors down a pyramid of 2x2 means, and fill the gaps from it upwards."""
    if weight.all():
        return color
    height, width = weight.shape
    odd = ((0, height % 2), (0, width % 2))
    weighted = np.pad(color * weight[..., None], (*odd, (0, 0)))
    half = (-(-height // 2), 2, -(-width // 2), 2)
    total = np.pad(weight, odd).reshape(half).sum(axis=(1, 3))
    mean = weighted.reshape(*half, 3).sum(axis=(1, 3)) / np.maximum(total, 1.0)[..., None]
    coarse = _fill(mean, np.minimum(total, 1.0))
    pushed = coarse.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return np.where(weight[..., None] > 0, color, pushed)
