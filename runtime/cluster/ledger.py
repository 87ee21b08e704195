"""An actor that records which inputs are in work, how often each was begun, and how many are listed.

It holds only the inputs in flight. If an input was begun before and its row has not reached the driver, its
worker was lost, perhaps after its result was written.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """The progress of a listing."""

    listed: int
    complete: bool  # True when the listing has ended


class Ledger:
    """Run as an actor without processors beside the driver, so that it lives as long as the run."""

    def __init__(self) -> None:
        self._attempts: dict[str, int] = {}
        self._listed, self._complete = 0, False
        self._starts: dict[str, int] = {}

    def begin(self, name: str) -> int:
        """Count an attempt at an input and return its number, from 1."""
        self._attempts[name] = self._attempts.get(name, 0) + 1
        return self._attempts[name]

    def end(self, name: str) -> None:
        """Forget an input whose report row has reached the driver."""
        self._attempts.pop(name, None)

    def listed(self, count: int, complete: bool = False) -> None:
        """Record that this number of inputs is listed.

        A listing that is repeated after a loss counts once.
        """
        self._listed = max(self._listed, count)
        self._complete |= complete

    def counts(self) -> Counts:
        """Return the number of inputs that are listed."""
        return Counts(self._listed, self._complete)

    def starting(self, node: str) -> int:
        """Count a worker that begins to open the engine; return how many did so on this node in vain."""
        self._starts[node] = self._starts.get(node, 0) + 1
        return self._starts[node]

    def opened(self, node: str) -> None:
        """Note that a worker of this node has opened the engine."""
        self._starts.pop(node, None)
