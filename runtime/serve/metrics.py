"""Metrics of the service, in the format of Prometheus."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from moesr.runtime.serve.arrivals import Arrivals
from moesr.runtime.serve.limits import Limits
from moesr.runtime.upscaler import Upscaler

BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)  # bounds in seconds


class Watched(Protocol):
    """The attributes of the service that the metrics read."""

    engines: dict[str, Upscaler]
    limits: Limits
    arrivals: Arrivals
    in_queue: int

    def stages(self) -> list[str]:
        """Return the stage of every job in work."""
        ...


class Metrics(Collector):
    """Counters that the service increments, and values that are read when metrics are requested."""

    def __init__(self, service: Watched) -> None:
        self._service = service
        self.registry = CollectorRegistry()
        self.registry.register(self)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, registry=self.registry)

        def seconds(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(name, text, labels, buckets=BUCKETS, registry=self.registry)

        self.requests = counter("moesr_requests", "Answered requests", "method", "route", "status")
        self.rejected = counter("moesr_rejected", "Images refused with 503: no room, or closing")
        self.cancelled = counter("moesr_cancelled", "Images cancelled before they were done")
        self.failed = counter("moesr_failed", "Jobs that ended with a problem")
        self.seconds = seconds(
            "moesr_image_seconds", "Seconds from the acceptance of an image to its result", "engine"
        )
        self._stages = seconds("moesr_stage_seconds", "Seconds of an image in a stage", "engine", "stage")

    def stage(self, engine: str, stage: str, seconds: float) -> None:
        """Record the time that an image has spent in a stage."""
        self._stages.labels(engine, stage).observe(seconds)

    def collect(self) -> Iterator[Metric]:
        """Return the current values."""
        service, limit = self._service, "Largest number of images that may wait or run"
        uploads = "Bytes of the requests that are arriving"
        yield GaugeMetricFamily("moesr_queue", "Images that wait or run", service.in_queue)
        yield GaugeMetricFamily("moesr_queue_limit", limit, service.limits.queue)
        yield GaugeMetricFamily("moesr_uploads_bytes", uploads, service.arrivals.bytes)
        yield GaugeMetricFamily("moesr_resident_bytes", "Memory of the process", resident_bytes())
        yield from self._engines()
        by_stage = GaugeMetricFamily("moesr_jobs_by_stage", "Jobs in work by their stage", labels=["stage"])
        stages = service.stages()
        for stage in sorted(set(stages)):
            by_stage.add_metric([stage], stages.count(stage))
        yield by_stage

    def _engines(self) -> Iterator[Metric]:
        """Yield the figures of each engine's loop."""
        counts = [
            CounterMetricFamily("moesr_ticks", "Runs of a graph", labels=["engine"]),
            CounterMetricFamily("moesr_slots", "Slots filled in all ticks", labels=["engine"]),
            GaugeMetricFamily("moesr_slots_limit", "Slots in a tick", labels=["engine"]),
            GaugeMetricFamily("moesr_waiting", "Images that wait for memory", labels=["engine"]),
            GaugeMetricFamily("moesr_active", "Images that have memory", labels=["engine"]),
            GaugeMetricFamily("moesr_seconds_left", "Estimated seconds of all work", labels=["engine"]),
        ]
        for name, upscaler in self._service.engines.items():
            now = upscaler.statistics
            values = now.ticks, now.tiles, now.max_batch, now.waiting, now.active, now.seconds_left
            for metric, value in zip(counts, values, strict=True):
                metric.add_metric([name], value)
        yield from counts

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
