"""Delays the last elementwise operations of a tensor until a strip of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moesr.export.graphs.builder import GraphBuilder, Shape, Value


@dataclass(frozen=True)
class LazyValue:
    """A tensor whose last elementwise operations are not written yet.

    Written for one strip of rows right before it is read, they work in a CPU's cache, and the finished tensor
    never exists as a whole.
    """

    g: GraphBuilder
    value: Value  # [B, C, H, W]
    finish: Callable[[Value], Value]

    @property
    def shape(self) -> Shape:
        """The shape of the whole tensor."""
        return self.value.shape

    def size(self, axis: int) -> int:
        """Return the length of a fixed axis."""
        return self.value.size(axis)

    def rows(self, start: int, stop: int) -> Value:
        """Finish and return rows [start, stop)."""
        return self.finish(self.g.slice(self.value, 2, start, stop))

    def whole(self) -> Value:
        """Finish and return the whole tensor."""
        return self.finish(self.value)


def pending(g: GraphBuilder, x: Value | LazyValue) -> LazyValue:
    """Wrap a finished value, so that it can be used like a lazy one."""
    return x if isinstance(x, LazyValue) else LazyValue(g, x, lambda part: part)
