"""The training loop that all stages share: optimiser, EMA, accumulation, resume.

Every draw of a step comes from the step's number and the recipe's seed, not from the history, so a resumed run
continues as the uninterrupted one would.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from moesr.runtime.errors import InputError
from moesr.training.recipe import StageConfig

STATE_NAME = "last.pt"
LOG_NAME = "losses.jsonl"


Samples = Dataset[tuple[Tensor, ...]]  # any index from 0 on


class Task(Protocol):
    """What a stage adds to the loop."""

    network: nn.Module  # trained and averaged; frozen parts have requires_grad False

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of one batch, as the stage's data set makes it, and figures to show."""
        ...

    def after_step(self, step: int) -> None:
        """Change weights after the optimiser's step (expert weight sharing, codebook)."""
        ...


@dataclass(frozen=True)
class Run:
    """Where and how one stage runs."""

    directory: Path
    seed: int
    device: torch.device
    workers: int = 0
    quiet: bool = False


def learning_rate(stage: StageConfig, step: int) -> float:
    """Learning rate of `step`: linear warm-up, then constant or half a cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps)) if stage.decay == "cosine" else 1.0
    return stage.learning_rate * warm * cosine


def fit(task: Task, stage: StageConfig, data: Samples, run: Run, label: str) -> dict[str, Tensor]:
    """Train `task.network` for `stage.steps` steps and return its averaged (EMA) state dict, on the CPU.

    Continues from `run.directory/last.pt` where there is one. Interrupting saves first.
    """
    run.directory.mkdir(parents=True, exist_ok=True)
    network = task.network.to(run.device)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=stage.learning_rate)
    ema = {k: v.detach().clone() for k, v in network.state_dict().items()}
    state_path = run.directory / STATE_NAME
    first = _restore(state_path, network, ema, optimiser, run.device) if state_path.exists() else 0

    batches = _batches(data, stage, first, run.workers)
    bar = tqdm(total=stage.steps, initial=first, desc=label, unit="step", disable=run.quiet)
    step = first
    try:
        with bar, (run.directory / LOG_NAME).open("a", buffering=1) as log:
            for step in range(first, stage.steps):
                torch.manual_seed((run.seed << 32) + step)  # every draw of this step
                figures = _step(task, stage, trained, optimiser, batches, step, run.device)
                task.after_step(step)
                _average(ema, network, min(stage.ema_decay, (1 + step) / (10 + step)))
                log.write(json.dumps({"step": step, **figures}) + "\n")
                bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()}, refresh=False)
                bar.update()
                if (step + 1) % stage.save_every == 0:
                    _save(state_path, network, ema, optimiser, step + 1)
            step = stage.steps
    except KeyboardInterrupt:
        # the interrupted step may be half applied: only whole steps are kept
        tqdm.write(f"{label}: interrupted; run the same command again to continue from the last saved step")
        raise
    if first < stage.steps:
        _save(state_path, network, ema, optimiser, step)
    return {k: v.cpu() for k, v in ema.items()}


def _step(
    task: Task,
    stage: StageConfig,
    trained: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    batches: Iterator[Sequence[Tensor]],
    step: int,
    device: torch.device,
) -> dict[str, float]:
    """One optimiser step over `stage.accumulate` batches; returns the mean figures."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(stage, step)
    totals: dict[str, float] = {}
    for _ in range(stage.accumulate):
        batch = [part.to(device) for part in next(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
            loss, figures = task.loss(batch, step)
        (loss / stage.accumulate).backward()
        for key, value in figures.items():
            totals[key] = totals.get(key, 0.0) + value / stage.accumulate
    if stage.clip_norm:
        nn.utils.clip_grad_norm_(trained, stage.clip_norm)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return totals


def _batches(data: Samples, stage: StageConfig, first_step: int, workers: int) -> Iterator[Sequence[Tensor]]:
    """Batches from the first one of `first_step` on, without end in sight."""
    start = first_step * stage.accumulate * stage.batch
    indices = range(start, stage.steps * stage.accumulate * stage.batch)
    loader = DataLoader(data, batch_size=stage.batch, sampler=indices, num_workers=workers)
    return iter(loader)


@torch.no_grad()
def _average(ema: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    for key, value in network.state_dict().items():
        if value.dtype.is_floating_point:
            ema[key].lerp_(value, 1.0 - decay)
        else:
            ema[key].copy_(value)


def _save(
    path: Path, network: nn.Module, ema: dict[str, Tensor], optimiser: torch.optim.Optimizer, step: int
) -> None:
    """Write the state beside its place, then rename: an interrupted write damages nothing."""
    scratch = path.with_suffix(".tmp")
    state = {"step": step, "network": network.state_dict(), "ema": ema, "optimiser": optimiser.state_dict()}
    torch.save(state, scratch)
    os.replace(scratch, path)


def _restore(
    path: Path,
    network: nn.Module,
    ema: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    device: torch.device,
) -> int:
    """Load a saved state in place and return the number of finished steps."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        for key, value in state["ema"].items():
            ema[key].copy_(value)
        return int(state["step"])
    except (RuntimeError, KeyError, ValueError, EOFError, OSError) as error:
        raise InputError(
            f"{path}: not a state of this recipe ({error}); use the recipe that wrote it or another -o"
        ) from error
