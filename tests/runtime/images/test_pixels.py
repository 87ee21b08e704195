"""Arrays as users pass them: refused with advice, or split into planes and joined again."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.errors import InputError
from moesr.runtime.images.planes import join, split

GREY = np.arange(12, dtype=np.uint8).reshape(3, 4)

REFUSED = {
    "list": (GREY.tolist(), r"got list, .*np\.asarray\(image, np\.uint8\)"),
    "ragged": ([[1, 2], [3]], r"got list, .*np\.asarray"),
    "bool": (GREY > 3, r"of bool, .*image\.astype\(np\.uint8\) \* 255"),
    "float": (GREY / 11, r"of float64, .*\* 255\)\.round\(\)"),
    "int": (GREY.astype(int), r"of int64, .*image\.astype\(np\.uint8\)"),
    "object": (np.array([[1, 2], [3]], dtype=object), "of object, .*of several lengths"),
    "matrix": (GREY.view(np.matrix), r"got a np\.matrix, .*np\.asarray\(image\)"),
    "masked": (np.ma.masked_less(GREY, 3), r"got a masked array, .*image\.filled\(0\)"),
    "text": (np.array([["a"]]), "of <U1, expected uint8"),
    "structure": (np.zeros((2, 2), [("r", "u1")]), "expected uint8"),
    "none": (None, "got NoneType, expected a NumPy array or a PIL image"),
    "empty": (GREY[:0], "shape"),
}


@pytest.mark.parametrize(("image", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(image: object, message: str):
    with pytest.raises(InputError, match=message):
        split(image)


@pytest.mark.parametrize("kind", ["<u2", ">u2", "=u2", ">u1"])
def test_any_byte_order(kind: str):
    planes = split((GREY * 20).astype(kind))
    assert planes.rgb.dtype.isnative
    np.testing.assert_array_equal(join(planes.rgb, None, planes), GREY * 20)


def test_mapped_files_are_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "a.bin", np.uint8, "w+", shape=(3, 4))
    assert split(mapped).rgb.shape == (3, 4, 3)


RNG = np.random.default_rng(8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [3, 4])
def test_equal_channels_stay_equal(dtype: type, channels: int):
    top = np.iinfo(dtype).max
    image = np.repeat(RNG.integers(0, top, (6, 5, 1), dtype), channels, axis=2)
    image[0, 0, :3], image[-1, -1, :3] = 0, top
    planes = split(image)
    noisy = RNG.integers(0, top, (12, 10, 3), dtype)
    result = join(noisy, None if channels == 3 else noisy[..., 0], planes)
    assert result.shape == (12, 10, channels) and result.dtype == dtype
    assert (result[..., :1] == result[..., :3]).all()
    np.testing.assert_array_equal(join(split(image).rgb, planes.alpha, planes), image)
    image[2, 2, 1] ^= 1
    assert not split(image).grey


def test_one_transparent_color_pixel_leaves_an_image_grey():
    image = np.full((4, 4, 4), 90, np.uint8)
    image[1, 1] = (255, 0, 255, 0)
    assert split(image).grey
    assert not split(image, keep_colors_under_alpha=True).grey


@pytest.mark.parametrize(
    ("bits", "offset"), [(1, 0), (8, 0), (10, 0), (12, 0), (14, 0), (1, 30_000), (10, 60_000), (12, 32_768)]
)
def test_narrow_16_bit_data_fill_the_range(bits: int, offset: int):
    values = RNG.integers(0, 2**bits, (7, 9), np.uint16)
    values[0, :2] = 0, 2**bits - 1
    planes = split(values + np.uint16(offset))
    np.testing.assert_array_equal(planes.rgb[..., 0], values << np.uint16(16 - bits))
    np.testing.assert_array_equal(join(planes.rgb, None, planes), values + offset)
    high = join(np.full_like(planes.rgb, 65535), None, planes)
    assert (high == offset + 2**bits - 1).all()  # rounding does not overflow


@pytest.mark.parametrize("values", [[0, 65535], [0, 16_384], [20_000, 65_535], [40_000, 40_000], [0, 0]])
def test_photographs_and_flat_images_are_not_stretched(values: list[int]):
    image = np.array([values], np.uint16)
    planes = split(image)
    assert (planes.base, planes.shift) == (0, 0)
    np.testing.assert_array_equal(planes.rgb[..., 0], image)


def test_8_bit_data_are_never_stretched():
    assert split(GREY).shift == 0


def test_colors_under_alpha_can_be_kept():
    image = RNG.integers(0, 256, (6, 6, 4), np.uint8)
    image[..., 3] = 255 * (np.arange(6) > 2)
    assert (split(image).rgb[:, :3] != image[:, :3, :3]).any()
    np.testing.assert_array_equal(split(image, keep_colors_under_alpha=True).rgb, image[..., :3])
