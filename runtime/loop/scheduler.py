"""Which tiles run next: the oldest job's, filled up with tiles of others that need the same graph.

The oldest job leads, so that none starves and images come out in the order in which they came in; the others
fill what it leaves of a tick, the older first. Jobs that began a little later would part from it at the first
border between experts and never share a tick again: so where there is room in its tick, those that are a few
rounds behind and need another graph go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moesr.runtime.loop.job import Job

CATCH_UP = 2
"""Rounds that a job may be behind the oldest one and have it wait."""


@dataclass(frozen=True)
class TileBatch:
    """The tiles of one job in a tick: those from its pass's cursor on."""

    job: Job
    count: int

    @property
    def tiles(self) -> range:
        """Their positions in the pass's list."""
        return range(self.job.current.cursor, self.job.current.cursor + self.count)


def next_batches(jobs: Sequence[Job], limit: int) -> list[TileBatch]:
    """Shares of the next tick, at most `limit` tiles in all. `jobs`: the oldest first, all begun."""
    leader = jobs[0]
    shares = _fill(jobs, leader, limit)
    if sum(share.count for share in shares) < limit:
        behind = (job for job in jobs if 0 < leader.rounds - job.rounds <= CATCH_UP)
        late = next((job for job in behind if job.current.group != leader.current.group), None)
        if late:
            return _fill(jobs, late, limit)
    return shares


def _fill(jobs: Sequence[Job], leader: Job, limit: int) -> list[TileBatch]:
    """Outstanding tiles of the leader's group, the oldest job's first."""
    shares, room = [], limit
    for job in jobs:
        if room and job.current.group == leader.current.group:
            count = min(room, len(job.current.tiles) - job.current.cursor)
            shares.append(TileBatch(job, count))
            room -= count
    return shares
