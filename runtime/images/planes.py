"""Arrays as users have them, taken apart into color and alpha and put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesr.runtime.errors import InputError

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

_CURES = {
    "b": "for black and white pass image.astype(np.uint8) * 255",
    "f": "for values of 0 to 1 pass (image * 255).round().astype(np.uint8)",
    "O": "its rows may be of several lengths; pass np.asarray(rows, np.uint8)",
}
"""What to do with an array, by the kind of its type."""


@dataclass(frozen=True, eq=False)
class Planes:
    """An image in parts; `rgb` [H, W, 3] and `alpha` [H, W] or None are of one type, uint8 or uint16."""

    rgb: np.ndarray
    alpha: np.ndarray | None
    ndim: int  # of the array they came from
    grey: bool


def split(image: Any) -> Planes:
    """Take apart a uint8 or uint16 array of shape HxW or HxWxC; C is 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA.

    Grey becomes three equal channels. Color under fully transparent pixels, which is arbitrary, is replaced
    by that of visible pixels nearby, so that it cannot bleed into them. Raises InputError for anything else.
    """
    image = _plain(image)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim not in (2, 3) or channels not in (1, 2, 3, 4) or image.size == 0:
        raise InputError(
            f"got an array of shape {image.shape}, expected HxW or HxWxC with C of 1 to 4, and some pixels"
        )
    grey = channels < 3
    planes = image.reshape(*image.shape[:2], channels)
    rgb = np.repeat(planes[..., :1], 3, axis=2) if grey else np.ascontiguousarray(planes[..., :3])
    alpha = np.ascontiguousarray(planes[..., -1]) if channels in (2, 4) else None
    if alpha is not None and not alpha.all():
        rgb = fill_transparent(rgb, alpha)
    return Planes(rgb, alpha, image.ndim, grey)


def _plain(image: Any) -> np.ndarray:
    """A plain array of native uint8 or uint16; InputError with what to do for whatever else was given."""
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
    return np.asarray(image, image.dtype.newbyteorder("="))


def join(rgb: np.ndarray, alpha: np.ndarray | None, like: Planes) -> np.ndarray:
    """Put a result together in the layout of the array that `like` came from."""
    planes = [grey_of(rgb)[..., None]] if like.grey else [rgb]
    if alpha is not None:
        planes.append(alpha[..., None])
    image = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
    return image[..., 0] if like.ndim == 2 else image


def to_unit(pixels: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Map uint8 or uint16 values to [-1, 1] in `out`, float32 of the same shape."""
    np.multiply(pixels, np.float32(2.0 / np.iinfo(pixels.dtype).max), out=out)
    return np.subtract(out, np.float32(1.0), out=out)


def grey_of(rgb: np.ndarray) -> np.ndarray:
    """Luma of uint8 or uint16 [H, W, 3], rounded: [H, W] of the same type."""
    return np.rint(rgb @ _LUMA).astype(rgb.dtype)


def fill_transparent(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Replace colors where `alpha` is 0 by means over ever wider surroundings; others stay as they are.

    [H, W, 3] and [H, W]; returns a new array. An image without a visible pixel is returned unchanged.
    """
    visible = alpha > 0
    if not visible.any():
        return rgb
    filled = _fill(rgb.astype(np.float32), visible.astype(np.float32))
    return np.where(visible[..., None], rgb, np.rint(filled).astype(rgb.dtype))


def _fill(color: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Pull known colors down a pyramid of 2x2 means, and push them back into the gaps."""
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
