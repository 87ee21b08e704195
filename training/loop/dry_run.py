"""Measure the parameters, memory and speed of a run over three training steps, without writing files."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch

from moesr.training.loop import distributed
from moesr.training.loop.fit import Run, Samples, batches
from moesr.training.loop.trainer import Objective, Trainer
from moesr.training.recipe import StageConfig

STEPS = 3  # the first one warms up and is not timed


@dataclass(frozen=True)
class Measured:
    """Counts and measurements of one stage."""

    parameters: int
    trained: int
    samples_a_step: int
    memory_bytes: int  # peak: resident size of the process on a CPU, allocated memory on a GPU
    steps_a_second: float
    steps: int

    def __str__(self) -> str:
        hours = self.steps / self.steps_a_second / 3600
        return (
            f"{self.parameters / 1e6:.2f} M parameters, {self.trained / 1e6:.2f} M trained\n"
            f"{self.samples_a_step} samples per step, {self.steps_a_second:.3g} steps per second\n"
            f"{self.memory_bytes / 2**20:.0f} MiB of memory at the peak\n"
            f"{self.steps} steps take about {hours:.1f} hours"
        )


def measure(objective: Objective, stage: StageConfig, data: Samples, run: Run) -> Measured:
    """Run three steps of the stage and measure them."""
    trainer, cuda = Trainer(objective, stage, run.device, run.seed), run.device.type == "cuda"
    source, started = batches(data, stage, 0, run), 0.0
    for step in range(STEPS):
        trainer.advance(source)
        if cuda:
            torch.cuda.synchronize(run.device)
        started = time.perf_counter() if step == 0 else started
    seconds = (time.perf_counter() - started) / (STEPS - 1)
    return Measured(
        parameters=sum(p.numel() for p in objective.network.parameters()),
        trained=sum(p.numel() for group in trainer.groups for p in group),
        samples_a_step=stage.batch * stage.accumulate * distributed.size(),
        memory_bytes=torch.cuda.max_memory_allocated(run.device) if cuda else peak_memory_bytes(),
        steps_a_second=1.0 / seconds,
        steps=stage.steps,
    )


def peak_memory_bytes() -> int:
    """Return the largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
