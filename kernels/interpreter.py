"""Corrects bfloat16 and loop bounds in Triton's interpreter."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray


def interpreted() -> bool:
    """Return True if Triton runs its functions in the interpreter (TRITON_INTERPRET=1 at their import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def repair() -> None:
    """Patch the interpreter of Triton 3.6 to 3.9.

    Its `tl.dot` multiplies the bits of bfloat16 as integers, and its casts truncate, while GPUs round.
    Version 3.6 also converts an array of one element to the integer bound of a `range`, which NumPy 2.4
    refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_dot, plain_cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def cast(self: Any, operand: Any, target: Any) -> Any:
        match operand.dtype.scalar, target.scalar:
            case (tl.bfloat16, tl.float32):
                return TensorHandle(_widen(operand.data), tl.float32)
            case (tl.float32, tl.bfloat16):
                return TensorHandle(_narrow(operand.data), tl.bfloat16)
        return plain_cast(self, operand, target)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            cast(self, operand, tl.float32) if operand.dtype.scalar == tl.bfloat16 else operand
            for operand in (a, b)
        )
        return plain_dot(self, a, b, *rest)

    plain_patch = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    # setattr by name, since the new functions do not declare all parameters of the old ones.
    for owner, name, function in (
        (InterpreterBuilder, "create_dot", create_dot),
        (InterpreterBuilder, "cast_impl", cast),
        (interpreter, "_patch_lang_tensor", patch),
    ):
        setattr(owner, name, function)


def _widen(bits: NDArray[Any]) -> NDArray[Any]:
    """Convert uint16 bits of bfloat16 to float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: NDArray[Any]) -> NDArray[Any]:
    """Convert float32 to uint16 bits of bfloat16, rounding to even; NaN stays NaN."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
