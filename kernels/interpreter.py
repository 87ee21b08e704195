"""Cures for Triton's interpreter.

Up to 3.9 at least it multiplies the bits of bfloat16 as integers; 3.6 cannot loop up to a run-time bound
with NumPy 2.4.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np


@cache
def cure() -> None:
    """Make `tl.dot` take bfloat16 at its value, and scalars serve as bounds of `range`. Once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, patch = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << np.uint32(16)
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor
