"""Cures for Triton's interpreter.

Up to 3.9 at least it multiplies the bits of bfloat16 as integers and cuts float32 off where a GPU rounds it
to bfloat16; 3.6 cannot loop up to a run-time bound with NumPy 2.4.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


@cache
def cure() -> None:
    """Make bfloat16 multiply at its value and round to nearest, and scalars bound a `range`. Once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    multiply, convert, patch = builder.create_dot, builder.cast_impl, interpreter._patch_lang_tensor

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return convert(self, src, dst_type)
        return interpreter.TensorHandle(rounded_bits(src.data), tl.bfloat16)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    interpreter._patch_lang_tensor = patch_tensor


def rounded_bits(value: np.ndarray) -> np.ndarray:
    """Float32 as the bits of the nearest bfloat16, ties to even: uint16 of the same shape."""
    bits = np.ascontiguousarray(value).view(np.uint32).astype(np.uint64)
    nearest = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return np.where(np.isnan(value), (bits >> np.uint64(16)) | np.uint64(0x40), nearest).astype(np.uint16)
