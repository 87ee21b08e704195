"""Actors that run graphs on tiles of one image, and the queue between them and the worker thread.

Ray starts the actors and restarts those that die. A tile that was sent to an actor that died is sent to
another one at once, because Ray would keep it until the actor is restarted.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moesr.runtime.backends import autotune
from moesr.runtime.backends.selection import candidates
from moesr.runtime.cluster.engines import engine_on_this_node
from moesr.runtime.devices.host import HostDevice
from moesr.runtime.devices.interface import Session
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError

Tiles = Mapping[str, np.ndarray]
"""The inputs of a run by name, each [tiles, ...], or [1, ...] if one value serves the run."""

IN_FLIGHT = 2
"""The number of runs that an actor is sent before the first returns, so that it need not wait for data."""

LOSSES = 8
"""Tiles are sent at most this many times more, each time after the loss of the actor that had them."""

PATIENCE_S = 600.0
"""Seconds to wait for a first actor, or for a new one if all have died."""


class TileRunner:
    """An actor with an engine, whose graphs are opened when they are first needed and then stay open."""

    def __init__(self, engine: str, options: Mapping[str, Any]) -> None:
        """Open the engine; `options` are the options of an Upscaler that `candidates` accepts."""
        self._directory = engine_on_this_node(engine)
        self._manifest = read_manifest(self._directory)
        self._backend, _ = autotune.choose(candidates(**options), self._directory, self._manifest)
        self._device = HostDevice()
        self._open: dict[str, tuple[Session, dict[str, np.ndarray]]] = {}

    def tiles_per_run(self) -> int:
        """Return the backend's number of tiles per run."""
        return self._backend.max_batch

    def run(self, role: str, tiles: Tiles, count: int) -> list[np.ndarray]:
        """Run a graph on `count` tiles and return its outputs, each [count, ...]."""
        session, buffers = self._session(role)
        for name, values in tiles.items():
            buffers[name][: len(values)] = values
        session.enqueue(count)
        return [buffers[spec.name][:count].copy() for spec in session.boundary.outputs]

    def _session(self, role: str) -> tuple[Session, dict[str, np.ndarray]]:
        if role not in self._open:
            session = self._backend.open(self._directory, self._manifest.graphs[role])
            specs = (*session.boundary.inputs, *session.boundary.outputs)
            buffers = {spec.name: self._device.buffer(spec, self._backend.max_batch) for spec in specs}
            session.bind(buffers, self._backend.max_batch)
            self._open[role] = session, buffers
        return self._open[role]


class TilePool:
    """Runs graphs on actors. One thread at a time calls `run`; any thread may call `close`.

    `ran` counts the tiles of each actor, `runs` and `sent_bytes` the runs of all actors and the bytes sent
    and returned.
    """

    def __init__(
        self, engine: str, options: Mapping[str, Any], workers: int, resources: Mapping[str, Any]
    ) -> None:
        """Start `workers` actors, each with these `resources` of Ray, and wait until one of them is ready.

        `options` are those of `candidates`. EngineError if the engine cannot be opened there.
        """
        import ray

        runner: Any = ray.remote(TileRunner)
        made = runner.options(max_restarts=-1, max_task_retries=0, **resources)
        self._actors: list[Any] = [made.remote(engine, dict(options)) for _ in range(workers)]
        self._returning: dict[Any, int] = {a.tiles_per_run.remote(): n for n, a in enumerate(self._actors)}
        self._ready: list[int] = []  # actors by number that have responded and are not known to be lost
        self._closed = False
        self.per_run = 0
        self.ran: Counter[int] = Counter()
        self.runs = self.sent_bytes = 0
        self._await_first()

    @property
    def capacity(self) -> int:
        """The number of tiles in a tick that keeps all actors busy."""
        return len(self._actors) * IN_FLIGHT * self.per_run

    def run(self, role: str, parts: Sequence[tuple[Tiles, int]]) -> list[list[np.ndarray]]:
        """Run a graph on each part, which is tiles and their number, and return the outputs of each.

        EngineError is raised if no actor is left for PATIENCE_S seconds, if the actors of the same tiles are
        lost again and again, or if the pool is closed.
        """
        waiting, flying = deque(range(len(parts))), dict[Any, tuple[int, int]]()
        results: list[list[np.ndarray]] = [[] for _ in parts]
        losses, idle_since = Counter[int](), time.monotonic()
        while waiting or flying:
            while waiting and (free := self._free(flying)) is not None:
                part = waiting.popleft()
                flying[self._actors[free].run.remote(role, *parts[part])] = free, part
            for done in self._first_of([*flying, *self._returning], idle_since):
                if done in self._returning:
                    idle_since = time.monotonic() if self._welcome(done) else idle_since
                    continue
                actor, part = flying.pop(done)
                outputs = _outputs(done)
                if outputs is not None:
                    results[part], idle_since = outputs, time.monotonic()
                    self._count(actor, parts[part], outputs)
                    continue
                losses[part] += 1
                if losses[part] > LOSSES:
                    raise EngineError(
                        f"{losses[part]} workers were lost during the same tiles; see the logs of "
                        "the cluster, or give workers more memory (--memory-per-worker)"
                    )
                waiting.appendleft(part)
                self._lose(actor)
        return results

    def _free(self, flying: Mapping[Any, tuple[int, int]]) -> int | None:
        """Return the ready actor with the fewest runs in flight, or None if all have IN_FLIGHT."""
        load = Counter(actor for actor, _ in flying.values())
        free = [actor for actor in self._ready if load[actor] < IN_FLIGHT]
        return min(free, key=lambda actor: load[actor], default=None)

    def _count(self, actor: int, part: tuple[Tiles, int], outputs: list[np.ndarray]) -> None:
        self.ran[actor] += part[1]
        self.runs += 1
        self.sent_bytes += sum(a.nbytes for a in part[0].values()) + sum(a.nbytes for a in outputs)

    def _first_of(self, refs: list[Any], idle_since: float) -> list[Any]:
        """Return the references that are ready, or none after a time limit."""
        import ray

        if self._closed:
            raise EngineError("the image was stopped")
        if time.monotonic() - idle_since > PATIENCE_S:
            raise EngineError(f"no worker of the cluster has answered for {PATIENCE_S:.0f} seconds")
        return ray.wait(refs, num_returns=1, timeout=0.5)[0]

    def _lose(self, actor: int) -> None:
        """Send nothing to an actor until it responds again."""
        self._ready = [ready for ready in self._ready if ready != actor]
        if actor not in self._returning.values():
            self._returning[self._actors[actor].tiles_per_run.remote()] = actor

    def _welcome(self, answer: Any) -> bool:
        """Note that an actor is ready if it has responded; return False if it was lost instead."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        actor = self._returning.pop(answer)
        try:
            found: Any = ray.get(answer)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            if "creation task" in str(error):  # the engine cannot be opened there; Ray does not try again
                raise EngineError(f"a worker: {str(error).strip().splitlines()[-1]}") from error
            self._lose(actor)
            return False
        self.per_run = min(self.per_run, found) if self.per_run else found
        self._ready.append(actor)
        return True

    def _await_first(self) -> None:
        began = time.monotonic()
        while not self._ready:
            for answer in self._first_of(list(self._returning), began):
                self._welcome(answer)

    def abort(self) -> None:
        """Make the current run, and all later ones, end with EngineError."""
        self._closed = True

    def close(self) -> None:
        """End the actors."""
        import ray
        from ray.exceptions import RayError

        self._closed = True
        for actor in self._actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)
        self._actors = []


def _outputs(done: Any) -> list[np.ndarray] | None:
    """Return the outputs of a finished run, or None if they are lost with the actor or its node."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        outputs: Any = ray.get(done)
    except RayTaskError as error:
        raise error.cause from error
    except RayError:
        return None
    return outputs
