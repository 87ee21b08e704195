"""Metrics of the service, in the format of Prometheus."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moesr.runtime.upscaler import Upscaler

BUCKETS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)  # bounds in seconds


class Metrics(Collector):
    """Counters that the service increments, and values that are read when metrics are requested."""

    def __init__(
        self,
        engines: Mapping[str, Upscaler],
        in_queue: Callable[[], int],
        stages: Callable[[], list[str]],
    ) -> None:
        """Start all counters at 0.

        `in_queue` counts the images that wait or run; `stages` has the stage of each job in work.
        """
        self._engines, self._in_queue, self._stages = engines, in_queue, stages
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        self.requests = counter("moesr_requests", "Answered requests", "method", "route", "status")
        self.rejected = counter("moesr_rejected", "Images refused because the queue was full")
        self.cancelled = counter("moesr_cancelled", "Images cancelled before they were done")
        self.failed = counter("moesr_failed", "Jobs that ended with a problem")
        self.seconds = Histogram(
            "moesr_image_seconds",
            "Seconds from the decoding of an image to its result",
            ["engine"],
            buckets=BUCKETS,
            registry=self.registry,
        )

    def collect(self) -> Iterator[Metric]:
        """Return the current values."""
        yield GaugeMetricFamily("moesr_queue", "Images that wait or run", self._in_queue())
        yield GaugeMetricFamily("moesr_resident_bytes", "Memory of the process", resident_bytes())
        ticks = CounterMetricFamily("moesr_ticks", "Runs of a graph", labels=["engine"])
        tiles = CounterMetricFamily("moesr_slots", "Slots filled in all ticks", labels=["engine"])
        for name, upscaler in self._engines.items():
            done = upscaler.statistics
            ticks.add_metric([name], done.ticks)
            tiles.add_metric([name], done.tiles)
        yield ticks
        yield tiles
        left = GaugeMetricFamily("moesr_jobs_by_stage", "Jobs in work by their stage", labels=["stage"])
        stages = self._stages()
        for stage in sorted(set(stages)):
            left.add_metric([stage], stages.count(stage))
        yield left

    def text(self) -> bytes:
        """Return all metrics as a page."""
        return generate_latest(self.registry)


def resident_bytes() -> float:
    """Return the memory of this process that lies in RAM; 0 if the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return float(pages * os.sysconf("SC_PAGE_SIZE"))
