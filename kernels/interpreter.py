"""Triton's interpreter, with products of bfloat16 made right."""

from __future__ import annotations

import os
from functools import cache
from typing import Any


def interpreted() -> bool:
    """Whether Triton's functions run in its interpreter: TRITON_INTERPRET=1 when they were imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def repair() -> None:
    """Let `tl.dot` of the interpreter widen bfloat16, whose bits it multiplies as integers (Triton 3.6 to 3.9)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widen(self: Any, operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        wide = self.cast_impl(operand, tl.float32)
        return TensorHandle(wide.data, tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widen(self, a), widen(self, b), *rest)

    InterpreterBuilder.create_dot = create_dot
