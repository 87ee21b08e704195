"""Whole runs on difficult images: white paper, narrow 16-bit data, grey stored as RGB."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from engines import build_engine

from moesr.runtime import Upscaler, UsageError

RNG = np.random.default_rng(5)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upscaler]:
    with Upscaler(build_engine(tmp_path_factory.mktemp("engine"))) as upscaler:
        yield upscaler


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("share", [0, 1], ids=["black", "white"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_flat_white_and_black_stay(up: Upscaler, dtype: type, color_fix: str, share: int, channels: int):
    top = np.iinfo(dtype).max
    image = RNG.integers(0, top, (40, 48, channels), dtype, endpoint=True)
    image[:, 16:, : 3 if channels == 4 else channels] = share * top
    result = up(image, steps=2, color_fix=color_fix)
    flat = result[:, 18 * 4 :, :3].astype(int)
    assert np.abs(flat - share * top).max() <= 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("level", [250, 242, 9])
def test_paper_that_is_nearly_white_or_black_stays(up: Upscaler, dtype: type, level: int):
    image = RNG.integers(0, 256, (40, 48, 3), np.uint8)
    image[:, 16:] = level
    image = image.astype(dtype) * dtype(np.iinfo(dtype).max // 255)
    flat = up(image, steps=2)[:, 21 * 4 :].astype(int)
    assert np.abs(flat - int(image[0, -1, 0])).max() <= 1


def test_12_bit_data_give_the_result_of_16_bit_data(up: Upscaler):
    narrow = RNG.integers(0, 4096, (20, 24), np.uint16)
    narrow[0, 0] = 4095
    wide = up(narrow * np.uint16(16), steps=2).astype(float) / 16
    assert np.abs(up(narrow, steps=2) - wide).max() < 1  # values above 4095 would be clipped


def test_grey_stored_as_rgb_stays_grey(up: Upscaler):
    grey = RNG.integers(0, 256, (18, 20, 1), np.uint8)
    result = up(np.repeat(grey, 3, axis=2), steps=2)
    assert result.shape == (72, 80, 3)
    assert (result == result[..., :1]).all()
    np.testing.assert_array_equal(result[..., :1], up(grey, steps=2))


def test_colors_under_alpha_are_kept_on_request(up: Upscaler):
    image = np.full((16, 16, 4), 40, np.uint8)
    image[:, 8:] = (200, 90, 30, 0)
    options = {"steps": 2, "color_fix": "adain"}
    filled, kept = up(image, **options), up(image, keep_colors_under_alpha=True, **options)
    assert np.abs(kept[:, 44:, :3].astype(int) - (200, 90, 30)).mean() < 40
    assert np.abs(filled[:, 44:, :3].astype(int) - 40).mean() < 40
    np.testing.assert_array_equal(kept[..., 3], filled[..., 3])
    with pytest.raises(UsageError, match="keep_colors_under_alpha is 1, expected True or False"):
        up(image, keep_colors_under_alpha=1)  # type: ignore[arg-type]
