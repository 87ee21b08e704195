"""A run on a cluster as discrete events: one listing, one driver, workers that compute and sometimes die.

The driver handles rows one after the other, each for `driver_s` seconds. A worker asks for a row when it has
finished one and has up to `ahead` rows in its queue, so it waits only if the driver or the listing is late.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Measured costs of a run."""

    keys_per_s: float  # of the listing
    driver_s: float  # work of the driver per row
    restart_s: float  # from a worker's death until the next one works
    ahead: int = 4  # rows in the queue of a worker
    lifetime_s: float = 86_400.0  # mean time between two deaths of a worker: an assumption


def images_per_s(workers: int, image_s: float, costs: Costs, rounds: int = 40, seed: int = 0) -> float:
    """Images per second of a run in which each worker makes about `rounds` images of `image_s` seconds.

    The time of an image varies evenly from half to one and a half times the mean.
    """
    rng = random.Random(seed)
    images = workers * rounds
    queues = [deque[float]() for _ in range(workers)]  # when each row arrives
    driver_free, given = 0.0, 0

    def ask(worker: int, now: float) -> None:
        nonlocal driver_free, given
        if given == images:
            return
        listed = given / costs.keys_per_s
        driver_free = max(driver_free, now, listed) + costs.driver_s
        queues[worker].append(driver_free)
        given += 1

    for _ in range(costs.ahead):
        for worker in range(workers):
            ask(worker, 0.0)
    events = [(queue.popleft(), worker) for worker, queue in enumerate(queues) if queue]  # begin of an image
    deaths = [rng.expovariate(1 / costs.lifetime_s) for _ in range(workers)]
    heapq.heapify(events)
    last = 0.0
    while events:
        begin, worker = heapq.heappop(events)
        end = begin + image_s * rng.uniform(0.5, 1.5)
        if deaths[worker] < end:  # the image is begun again after the restart
            begin = max(begin, deaths[worker]) + costs.restart_s
            deaths[worker] = begin + rng.expovariate(1 / costs.lifetime_s)
            heapq.heappush(events, (begin, worker))
            continue
        last = max(last, end)
        ask(worker, end)
        if queues[worker]:
            heapq.heappush(events, (max(end, queues[worker].popleft()), worker))
    return images / last
