"""Arrays that users have and that are no images: refused with what to do, or taken for what they are."""

from __future__ import annotations

import numpy as np
import pytest

from moesr.runtime.errors import InputError
from moesr.runtime.images.planes import split

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
    np.testing.assert_array_equal(planes.rgb[..., 0], GREY * 20)


def test_mapped_files_are_arrays(tmp_path):
    mapped = np.memmap(tmp_path / "a.bin", np.uint8, "w+", shape=(3, 4))
    assert split(mapped).rgb.shape == (3, 4, 3)
