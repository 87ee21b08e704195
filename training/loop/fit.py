"""The training loop that all stages share: batches, validation, interruption, resume.

All random numbers of a step depend only on the step's number and the recipe's seed, not on the steps before,
so a resumed run continues exactly as the uninterrupted run would.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from moesr.runtime.errors import InputError
from moesr.runtime.system import console
from moesr.training.loop import distributed
from moesr.training.loop.interrupts import ignore_interrupts, stop_requests
from moesr.training.loop.metrics_log import MetricsLog
from moesr.training.loop.trainer import Objective, Trainer, read_state, write_state
from moesr.training.loop.validation import validate
from moesr.training.recipe import StageConfig

log = logging.getLogger("moesr")

STATE_NAME = "last.pt"
BEST_NAME = "best.pt"

Samples = Dataset[tuple[Tensor, ...]]  # any index from 0 on


@dataclass(frozen=True)
class Run:
    """Settings of one stage's run: its directory, seed, device and output."""

    directory: Path
    seed: int
    device: torch.device
    workers: int = 0
    quiet: bool = False
    tensorboard: bool = False


@dataclass(frozen=True)
class Fitted:
    """EMA state dicts on the CPU: after the last step, and at the lowest validation loss."""

    last: dict[str, Tensor]
    best: dict[str, Tensor] | None


class MicroBatches(Sampler[list[int]]):
    """Yields the sample numbers of this process's batches; all processes together cover every number once."""

    def __init__(self, stage: StageConfig, first_step: int) -> None:
        self.stage, self.first_step = stage, first_step

    def __iter__(self) -> Iterator[list[int]]:
        batch, accumulate = self.stage.batch, self.stage.accumulate
        for micro in range(self.first_step * accumulate, self.stage.steps * accumulate):
            start = (micro * distributed.size() + distributed.rank()) * batch
            yield list(range(start, start + batch))


def batches(data: Samples, stage: StageConfig, first_step: int, run: Run) -> Iterator[Sequence[Tensor]]:
    """Yield this process's batches from `first_step` to the last step."""
    loader = DataLoader(
        data,
        batch_sampler=MicroBatches(stage, first_step),
        num_workers=run.workers,
        pin_memory=run.device.type == "cuda",
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # so that the loader does not use torch's global one
    )
    try:
        yield from loader
    except InputError as error:  # the message of an error from a loader process contains its traceback
        raise InputError(str(error).strip().splitlines()[-1].split("InputError: ")[-1]) from error


def fit(
    objective: Objective,
    stage: StageConfig,
    data: Samples,
    run: Run,
    label: str,
    held_out: Samples | None = None,
) -> Fitted:
    """Train `objective.network` for `stage.steps` steps, validating on `held_out` every `val_every` steps.

    Continues from `run.directory/last.pt` if it exists. On Ctrl-C or SIGTERM the current step is finished,
    the state is saved, and `Stopped`, a KeyboardInterrupt, is raised.
    """
    trainer = Trainer(objective, stage, run.device, run.seed)
    last, best = run.directory / STATE_NAME, run.directory / BEST_NAME
    if distributed.rank() == 0:
        run.directory.mkdir(parents=True, exist_ok=True)
    if last.exists():
        trainer.load(last)
    distributed.wait()
    if trainer.step < stage.steps:
        with MetricsLog(run.directory, trainer.step, tensorboard=run.tensorboard) as metrics:
            _train(trainer, data, run, label, held_out, metrics)
    return Fitted(trainer.ema_on_cpu(), _best(best) if held_out is not None else None)


def _train(
    trainer: Trainer, data: Samples, run: Run, label: str, held_out: Samples | None, metrics: MetricsLog
) -> None:
    stage, last = trainer.stage, run.directory / STATE_NAME
    source = batches(data, stage, trainer.step, run)
    hidden = run.quiet or distributed.rank() > 0
    bar = console.bar(hidden, total=stage.steps, initial=trainer.step, desc=label, unit="step")
    with bar, stop_requests() as stopping:
        while trainer.step < stage.steps:
            figures = trainer.advance(source)
            metrics.write(trainer.step - 1, figures)
            bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()}, refresh=False)
            bar.update()
            done = trainer.step == stage.steps
            if held_out is not None and (done or trainer.step % stage.val_every == 0):
                _validate(trainer, held_out, run, metrics)
            stop = distributed.any_process(stopping.is_set(), run.device)
            if done or stop or trainer.step % stage.save_every == 0:
                trainer.save(last)
            if stop and not done:
                log.warning("%s: stopped after step %d; the same command continues it", label, trainer.step)
                stopping.stop()


def _validate(trainer: Trainer, held_out: Samples, run: Run, metrics: MetricsLog) -> None:
    """Validate the averaged weights and save them if they are the best so far."""
    figures, picture = validate(trainer, held_out)
    metrics.write(trainer.step - 1, {f"val_{k}": v for k, v in figures.items()}, picture)
    if figures["loss"] < trainer.best_loss:
        trainer.best_loss = figures["loss"]
        state = {"step": trainer.step, "loss": trainer.best_loss, "ema": trainer.ema}
        write_state(run.directory / BEST_NAME, state)


def finished(directory: Path, steps: int, *, best: bool) -> Fitted | None:
    """Open the weights of the run in `directory`; None unless it has made all its steps.

    Tensors are read from the file when they are used. The best weights are included if `best` is set.
    """
    path = directory / STATE_NAME
    if not path.exists():
        return None
    state = read_state(path, "step", "ema", mmap=True)  # the optimizer's gigabytes are not read
    if int(state["step"]) < steps:
        return None
    return Fitted(state["ema"], _best(directory / BEST_NAME) if best else None)


def _best(path: Path) -> dict[str, Tensor] | None:
    return read_state(path, "ema", mmap=True)["ema"] if path.exists() else None
