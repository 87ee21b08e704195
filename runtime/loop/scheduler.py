"""Decides which tiles run next, so that jobs share the machine fairly and graphs are not swapped in vain.

Jobs belong to flows, and flows share the machine by estimated seconds in deficit round robin (Shreedhar and
Varghese, 1995): in its turn a flow receives a quantum of credit and leads until its tiles have used up the
credit. The quantum is about the time that the smallest image in flight takes alone. So equal images finish
one after the other, as they would without turns, and an image that arrives behind a large one waits for no
longer than its own time. Within a flow the oldest job leads, so that the images of a folder finish in order.

The leading job's tiles come first in a tick. Tiles of other jobs that need the same graph fill the rest of
it. Jobs that began a little later would fall behind the leader at the first border between experts and never
share a tick with it again. Therefore, if a tick has free slots, jobs that are a few rounds behind and need
another graph run first.

If not all graphs fit into memory, a turn does not swap them at once: the jobs that need the loaded graphs
continue until the graphs were used for PATIENCE times as long as the next one takes to load. Then jobs that
are no larger than the leader still run first, so that several small images load each graph once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.work import Flow, Work

CATCH_UP = 2
"""A job that is at most this many rounds behind the leader may run before it."""

PATIENCE = 4.0
"""Loading graphs out of turn takes at most a share 1 / (PATIENCE + 1) of the time."""

ALIKE = 2.0
"""A job of up to this many times the leader's work fills a tick without limit.

A larger job fills at most as many slots as the leader has, so that the ticks of a small image stay short.
"""

LEEWAY = 1.25
"""The quantum is this multiple of the estimate for the smallest image, as the estimate may be too low."""

_LEAST_S = 1e-9  # the least cost of a tile, so that turns end


@dataclass(frozen=True)
class TileBatch:
    """Tiles of one job in a tick, as positions in the tiles of its current pass."""

    job: Work
    tiles: range

    @property
    def count(self) -> int:
        """The number of tiles."""
        return len(self.tiles)


class Scheduler:
    """Picks the tiles of each tick. Only one thread uses it."""

    def __init__(self, costs: Costs, reload_s: Callable[[str], float], max_batch: int) -> None:
        """Start empty.

        `reload_s` returns the seconds to load a graph now, and a tick has `max_batch` slots.
        """
        self._costs, self._reload_s, self.max_batch = costs, reload_s, max_batch
        self._ring: deque[Flow] = deque()  # it is the turn of the first flow
        self._led = 0.0  # estimated seconds of this turn that the flow has used
        self._since_load = 0.0  # estimated seconds of ticks since a graph was swapped in

    def next_batches(self, jobs: Sequence[Work]) -> list[TileBatch]:
        """Take the tiles of the next tick, at most `max_batch` in all; none if no job has tiles to run.

        `jobs` are all jobs in flight, the oldest first; each has begun.
        """
        ready = [job for job in jobs if job.current.remaining]
        if not ready:
            return []
        per_tile = {role: max(seconds, _LEAST_S) for role, seconds in self._costs.per_tile().items()}
        whole = {job: _seconds(job.planned, per_tile) for job in jobs}
        may_lead = self._spare_reloads(ready)
        leader = self._leader(jobs, may_lead, whole)
        if self._reload_s(leader.current.role):
            leader = next((job for job in self._loaded(ready) if not _is_large(job, leader, whole)), leader)
        counts = self._fill(ready, leader, whole)
        if sum(counts.values()) < self.max_batch:
            alike = [job for job in may_lead if not _is_large(job, leader, whole)]
            if late := _late(alike, leader):
                leader = late
                counts = self._fill(ready, leader, whole)
        if self._reload_s(leader.current.role):
            self._since_load = 0.0
        for job, count in counts.items():
            used = count * per_tile[job.current.role]
            job.flow.credit -= used
            self._led += used if job.flow is self._ring[0] else 0.0
            self._since_load += used
        return [TileBatch(job, job.current.take(count)) for job, count in counts.items()]

    def _spare_reloads(self, ready: list[Work]) -> list[Work]:
        """Return the jobs that may lead: those of loaded graphs, unless these were used for long enough."""
        loaded = self._loaded(ready)
        longest = max(self._reload_s(job.current.role) for job in ready)
        return ready if self._since_load >= PATIENCE * longest or not loaded else loaded

    def _loaded(self, ready: list[Work]) -> list[Work]:
        """Return the jobs whose graph is in memory, or can be loaded without dropping another graph."""
        return [job for job in ready if not self._reload_s(job.current.role)]

    def _leader(self, jobs: Sequence[Work], may_lead: list[Work], whole: Mapping[Work, float]) -> Work:
        """Return the oldest job of the flow whose turn it is, among those that may lead."""
        oldest: dict[Flow, Work] = {}
        for job in jobs:
            oldest.setdefault(job.flow, job)
        if self._ring and self._ring[0] not in oldest:
            self._led = 0.0
        self._ring = deque(flow for flow in self._ring if flow in oldest)
        quantum = LEEWAY * min(whole[job] for job in oldest.values())
        for flow in oldest:
            most = quantum * flow.weight
            if flow not in self._ring:
                self._ring.append(flow)
                flow.credit = most
            # No flow saves or owes more than a turn, and a turn ends early if quanta have become shorter.
            used = self._led if flow is self._ring[0] else 0.0
            flow.credit = max(min(flow.credit, most - used), -most)
        leads = {job.flow: job for job in reversed(may_lead)}
        while not ((flow := self._ring[0]) in leads and flow.credit > 0.0):
            if flow.credit <= 0.0:  # its turn is over, and this is its credit for the next turn
                flow.credit += quantum * flow.weight
            self._ring.rotate(-1)
            self._led = 0.0
        return leads[flow]

    def _fill(self, ready: list[Work], leader: Work, whole: Mapping[Work, float]) -> dict[Work, int]:
        """Return tiles by job for a tick of the leader's group: first its own, then the oldest jobs'."""
        room = self.max_batch
        counts = {leader: min(room, leader.current.remaining)}
        room -= counts[leader]
        for job in ready:
            if not room or job is leader or job.current.group != leader.current.group:
                continue
            most = min(room, counts[leader]) if _is_large(job, leader, whole) else room
            counts[job] = min(most, job.current.remaining)
            room -= counts[job]
        return counts


def _is_large(job: Work, leader: Work, whole: Mapping[Work, float]) -> bool:
    """Return True if a job would delay the leader if it took part in its ticks without limit."""
    return job.flow is not leader.flow and whole[job] > ALIKE * whole[leader]


def _late(jobs: list[Work], leader: Work) -> Work | None:
    """Return the oldest job that is a few rounds behind the leader and needs another graph."""
    behind = (job for job in jobs if 0 < leader.rounds - job.rounds <= CATCH_UP)
    return next((job for job in behind if job.current.group != leader.current.group), None)


def _seconds(tiles: Mapping[str, int], per_tile: Mapping[str, float]) -> float:
    return sum(count * per_tile[role] for role, count in tiles.items())
