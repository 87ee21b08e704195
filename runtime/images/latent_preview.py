"""A small picture of a predicted clean latent, without a decoder.

Its brightness is a linear function of the latent. Its hue is that of the LR image, to which the colors of
results are corrected too; latents of some models hold little color, as their decoder sees the LR image.
"""

from __future__ import annotations

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # luma weights of ITU-R BT.601


def picture(
    clean: np.ndarray,
    lr: np.ndarray | None,
    weights: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    adds_lr: bool = False,
) -> np.ndarray | None:
    """Return uint8 [h, w, 3] of a latent float32 [C, h, w] and the LR image float32 [h, w, 3] in [-1, 1].

    `weights` [3, C] and `bias` [3] map a latent to RGB in [-1, 1]. Without them its channels are fitted to
    the LR image. Early predictions of small networks are noisy, so the brightness is fitted to that of the LR
    image by least squares, which makes noise faint instead of saturated. With `adds_lr` the latent encodes
    what the LR image lacks; the LR image is added, and nothing is fitted. Without an LR image the colors are
    those of the map. None if there is neither, or if the missing LR image is to be added.
    """
    mapped = None
    if weights is not None and bias is not None:
        mapped = np.tensordot(clean, weights.astype(np.float32), (0, 1)) + bias.astype(np.float32)
    if lr is None:
        return None if mapped is None or adds_lr else _bytes(mapped)
    if adds_lr and mapped is not None:
        return _bytes(lr + mapped)
    luma = lr @ _LUMA
    seen = clean.reshape(len(clean), -1) if mapped is None else (mapped @ _LUMA).reshape(1, -1)
    fitted = _fit(seen, luma.reshape(-1)).reshape(luma.shape)
    return _bytes(lr + (fitted - luma)[..., None])


def block_means(values: np.ndarray, size: int) -> np.ndarray:
    """Return the means of [C, H, W] over blocks of `size` pixels; a rest at the end makes no block."""
    channels, height, width = values.shape
    rows, columns = height // size, width // size
    whole = values[:, : rows * size, : columns * size]
    return whole.reshape(channels, rows, size, columns, size).mean(axis=(2, 4), dtype=np.float32)


def _fit(inputs: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the linear function of inputs [C, N] (and a constant) nearest to `wanted` [N]."""
    centered = np.nan_to_num(inputs - inputs.mean(axis=1, keepdims=True)).astype(np.float64)
    mean = wanted.mean()
    covariance, moments = centered @ centered.T, centered @ (wanted - mean).astype(np.float64)
    gains = np.linalg.lstsq(covariance, moments, rcond=1e-6)[0]
    return (gains @ centered + mean).astype(np.float32)


def _bytes(values: np.ndarray) -> np.ndarray:
    """Map [-1, 1] to 0..255."""
    return np.rint(np.clip(np.nan_to_num(values) * 127.5 + 127.5, 0, 255)).astype(np.uint8)
