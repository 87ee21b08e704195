"""Color correction in rows equals the correction of the whole image."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.images import color_rows
from moesr.runtime.images.color import COLOR_FIXES, fix_color
from moesr.runtime.images.color_rows import RowCorrection

HEIGHT, WIDTH = 203, 57


def planes(clipped: bool) -> tuple[np.ndarray, np.ndarray]:
    """A result and its enlarged input [3, H, W]; the input has white and black regions if `clipped`."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    style = np.stack([np.sin(y / (9 + c)) * np.cos(x / 11) * 0.8 for c in range(3)]).astype(np.float32)
    if clipped:
        style[:, 60:150, 10:50], style[1, 170:, 20:] = 1.0, -1.0
    content = style * 0.8 + 0.1 + 0.2 * rng.standard_normal(style.shape).astype(np.float32)
    return content.astype(np.float32), style


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped"])
@pytest.mark.parametrize("method", COLOR_FIXES)
def test_rows_are_those_of_the_whole_image(method: str, clipped: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(color_rows, "STRIP_PX", 20 * WIDTH)
    content, style = planes(clipped)
    want = fix_color(content, style, method)

    def rows_of(image: np.ndarray) -> color_rows.Rows:
        return lambda start, stop: image[:, start:stop].transpose(1, 0, 2).copy()

    made = RowCorrection(rows_of(content), rows_of(style), HEIGHT, WIDTH, 3, method)
    got = np.full_like(content, np.nan)
    for start, rows in made.corrected():
        got[:, start : start + len(rows)] = rows.transpose(1, 0, 2)
    if method == "adain":
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    else:
        np.testing.assert_array_equal(got, want)
