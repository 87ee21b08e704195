"""Elementwise operations that wait until a strip of their result is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moesr.export.graphs.builder import GraphBuilder, Shape, Value


@dataclass(frozen=True)
class LazyValue:
    """A tensor of a graph whose last elementwise operations are still to come: on strips, or on all of it.

    Done on a strip that is about to be read they work in a CPU's cache, and the tensor never exists whole.
    """

    g: GraphBuilder
    value: Value  # [B, C, H, W]
    finish: Callable[[Value], Value]

    @property
    def shape(self) -> Shape:
        """Shape of the whole."""
        return self.value.shape

    def size(self, axis: int) -> int:
        """Length of a fixed axis."""
        return self.value.size(axis)

    def rows(self, start: int, stop: int) -> Value:
        """Rows [start, stop)."""
        return self.finish(self.g.slice(self.value, 2, start, stop))

    def whole(self) -> Value:
        """All of it."""
        return self.finish(self.value)


def pending(g: GraphBuilder, x: Value | LazyValue) -> LazyValue:
    """A finished value like one that is not."""
    return x if isinstance(x, LazyValue) else LazyValue(g, x, lambda part: part)
