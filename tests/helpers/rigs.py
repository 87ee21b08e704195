"""Workers whose sessions compute plain functions, on the host and on the simulated GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cuda_simulation import SimulatedSession, simulated_device
from recording import FakeSession, RecordingDevice, RecordingSession

from moesr.runtime.devices.host import HostDevice
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.loop.cost_model import Costs
from moesr.runtime.loop.job import Job
from moesr.runtime.loop.residency import Residency
from moesr.runtime.loop.settings import Settings
from moesr.runtime.loop.tile_layout import TileLayout
from moesr.runtime.loop.worker import Worker

RNG = np.random.default_rng(3)


Row = Mapping[str, np.ndarray]


def eps_of(row: Row) -> np.ndarray:
    return 0.9 * row["z_t"] + 0.1 * row["cond"] + np.float32(1e-4) * row["t"]


def image_of(row: Row) -> np.ndarray:
    return row["fidelity"] * row["lr"] + 0.05 * row["z"].repeat(4, axis=1).repeat(4, axis=2)


def latent_of(row: Row) -> np.ndarray:
    return row["image"][:, ::4, ::4] + 0.1 * row["noise"]


FUNCTIONS = {"decoder": image_of, "encoder": latent_of}


class Rig:
    """A worker over fake sessions, which are kept for inspection."""

    def __init__(
        self,
        manifest: Manifest,
        max_batch: int = 1,
        keep_all: bool = True,
        device: Any = None,
        **functions: Any,
    ) -> None:
        self.manifest, self.sessions, self.opened = manifest, {}, []
        self.device = device or HostDevice()

        def open_graph(role: str) -> FakeSession:
            function = functions.get(role) or FUNCTIONS.get(role) or functions.get("expert", eps_of)
            self.opened.append(role)
            graph = manifest.graphs[role]
            recording = isinstance(self.device, RecordingDevice)
            session = (
                RecordingSession(self.device, graph, function) if recording else FakeSession(graph, function)
            )
            self.sessions[role] = session
            return session

        self.residency = Residency(open_graph, keep_all)
        self.costs = Costs(manifest.graphs)
        self.worker = Worker(self.device, self.residency, self.costs, max_batch)

    def job(self, height: int, width: int, lr: np.ndarray | None = None, **options: Any) -> Job:
        values = {"steps": 4, "sampler": "ddpm", "seed": 1, "fidelity": 1.0} | options
        condition = RNG.integers(0, 256, (height, width, 3), np.uint8)
        lr = RNG.integers(0, 256, (height * 4, width * 4, 3), np.uint8) if lr is None else lr
        layout = TileLayout(self.manifest, *(side // self.manifest.scale for side in lr.shape[:2]))
        latent = self.manifest.condition == "latent"
        return Job(layout, lr, None if latent else condition, Settings(**values))

    def run(self, *jobs: Job) -> None:
        for job in jobs:
            self.worker.submit(job)
        for job in jobs:
            self.wait(job)

    def wait(self, job: Job) -> None:
        """Wait for a job and raise its error, if it has one."""
        with self.worker.lock:
            while not job.done:
                assert self.worker.ended.wait(120)
        if job.error:
            raise job.error


def unit(pixels: np.ndarray) -> np.ndarray:
    return pixels.transpose(2, 0, 1) / 127.5 - 1


class CudaRig(Rig):
    """A worker over the simulated GPU."""

    def __init__(
        self,
        manifest: Manifest,
        tmp_path: Path,
        max_batch: int = 1,
        use_graphs: bool = True,
        **functions: Any,
    ) -> None:
        device, self.driver = simulated_device(tmp_path / "kernels", use_graphs=use_graphs)
        super().__init__(manifest, max_batch, device=device, **functions)

        def open_graph(role: str) -> SimulatedSession:
            function = functions.get(role) or FUNCTIONS.get(role) or functions.get("expert", eps_of)
            self.opened.append(role)
            self.sessions[role] = SimulatedSession(self.driver, manifest.graphs[role], function)
            return self.sessions[role]

        self.residency._open = open_graph


def alike(rig: Rig, **options: Any) -> list:
    """Submit jobs of several sizes and bit depths, which share ticks with different neighbors."""
    rng = np.random.default_rng(5)
    jobs = []
    for seed, (height, width) in enumerate([(16, 16), (40, 23), (17, 30)]):
        dtype = (np.uint8, np.uint16)[seed % 2]
        lr = rng.integers(0, np.iinfo(dtype).max, (height * 4, width * 4, 3), dtype)
        job = rig.job(height, width, lr, seed=seed, **options)
        if job._condition is not None:
            job._condition = lr[::4, ::4].copy()
        jobs.append(job)
    return jobs
