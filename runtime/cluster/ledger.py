"""An actor that records which inputs are in work, how often each was begun, and how many are listed.

It holds only the inputs in flight. If an input was begun before and its row has not reached the driver, its
worker was lost, perhaps after its result was written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Counts:
    """The progress of a listing."""

    listed: int = 0
    complete: bool = False  # True when the listing has ended

    def and_later(self, other: Counts) -> Counts:
        """Return the greater progress of two reports, as a restarted ledger has counted nothing yet."""
        return Counts(max(self.listed, other.listed), self.complete or other.complete)


class Ledger:
    """The state of a run; `start` makes an actor of it.

    Ray repeats a call whose answer was lost, so every call can be repeated: an attempt or a start has a token
    and counts once per token.
    """

    def __init__(self) -> None:
        self._attempts: dict[str, set[str]] = {}
        self._counts = Counts()
        self._starts: dict[str, set[str]] = {}

    def begin(self, name: str, token: str) -> int:
        """Count an attempt at an input and return its number, from 1."""
        attempts = self._attempts.setdefault(name, set())
        attempts.add(token)
        return len(attempts)

    def end(self, name: str) -> None:
        """Forget an input whose report row has reached the driver."""
        self._attempts.pop(name, None)

    def listed(self, count: int, complete: bool = False) -> None:
        """Record that this number of inputs is listed.

        A listing that is repeated after a loss counts once.
        """
        self._counts = self._counts.and_later(Counts(count, complete))

    def counts(self) -> Counts:
        """Return the progress of the listing."""
        return self._counts

    def starting(self, node: str, token: str) -> int:
        """Count a worker that begins to open the engine; return how many did so on this node in vain."""
        starts = self._starts.setdefault(node, set())
        starts.add(token)
        return len(starts)

    def opened(self, node: str) -> None:
        """Note that a worker of this node has opened the engine."""
        self._starts.pop(node, None)


def start() -> Any:
    """Start a ledger as an actor on the node of this process, which the run cannot outlive anyway.

    If the actor's process dies, Ray starts it again there and repeats the calls in flight. The new process
    knows no earlier attempts, so an input that ends its workers is begun more often than usual.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # With soft=True, Ray places the actor on another node now and then, even if this one has room.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Ledger).options(**options).remote()
