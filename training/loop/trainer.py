"""The trainer of one network: optimizer, weight average (EMA), training step, and saved state."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moesr.runtime.errors import InputError, NonFiniteError, OutputError, UsageError
from moesr.runtime.system.files import new_file, reason
from moesr.training.loop import distributed
from moesr.training.recipe import StageConfig
from moesr.training.seeded_random import STEP, seed_of
from moesr.training.weights import brief

log = logging.getLogger("moesr")

# Entries that a resumed run may change without a warning: its length, and entries that affect no step.
FREE_TO_CHANGE = ("steps", "save_every", "val_every", "val_samples", "init_share", "stored", "latent_batch")


class Objective(Protocol):
    """The network that a stage trains, and its loss."""

    @property
    def network(self) -> nn.Module:
        """The network that is trained and averaged; frozen parts have requires_grad False."""
        ...

    @property
    def critic(self) -> nn.Module | None:
        """The discriminator, if any: trained together with the network by the same loss, not averaged."""
        ...

    def loss(self, batch: Sequence[Tensor], step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one batch of the stage's data set, and the figures to log."""
        ...

    def after_step(self, step: int) -> None:
        """Modify weights after the optimizer's step (expert weight sharing, codebook)."""
        ...

    def evaluate(self, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return figures, including "loss" (lower is better), and images [B, 3, H, W'] to show."""
        ...


def learning_rate(stage: StageConfig, step: int) -> float:
    """Return the learning rate of `step`: linear warm-up, then constant or a half cosine to zero."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / stage.steps)) if stage.decay == "cosine" else 1.0
    return stage.learning_rate * warm * cosine


class Trainer:
    """Trains `objective.network` by `stage`; `step` is the number of finished steps."""

    def __init__(self, objective: Objective, stage: StageConfig, device: torch.device, seed: int) -> None:
        self.objective, self.stage, self.device, self.seed = objective, stage, device, seed
        self.network = objective.network.to(device).train()
        self.critic = None if objective.critic is None else objective.critic.to(device).train()
        self.modules = [self.network] if self.critic is None else [self.network, self.critic]
        for module in self.modules:
            distributed.synchronise_batch_norms(module)
        self.groups = [[p for p in m.parameters() if p.requires_grad] for m in self.modules]
        if not self.groups[0]:
            raise UsageError("nothing to train: every weight is frozen; correct the recipe's `trainable`")
        groups = [{"params": group} for group in self.groups]
        self.optimiser = torch.optim.Adam(groups, lr=stage.learning_rate, betas=stage.betas)
        self.ema = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.step, self.best_loss = 0, math.inf

    def advance(self, batches: Iterator[Sequence[Tensor]]) -> dict[str, float]:
        """Make one optimizer step over `stage.accumulate` batches; returns the mean figures.

        Raises NonFiniteError, before the weights change, if the loss or a gradient is not finite.
        """
        stage = self.stage
        torch.manual_seed(seed_of(self.seed, STEP, self.step))  # networks draw the same in all processes
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(stage, self.step)
        totals: dict[str, Tensor] = {}
        for _ in range(stage.accumulate):
            batch = [part.to(self.device, non_blocking=True) for part in next(batches)]
            with torch.autocast(self.device.type, torch.bfloat16, enabled=stage.precision == "bf16"):
                loss, figures = self.objective.loss(batch, self.step)
            (loss / stage.accumulate).backward()
            for key, value in {"loss": loss, **figures}.items():
                totals[key] = totals.get(key, 0.0) + value.detach().float() / stage.accumulate
        means = distributed.mean_figures(totals)
        self._check_finite("loss", means)
        self._check_finite("gradient", self._average_gradients())
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.objective.after_step(self.step)
        self._average(min(stage.ema_decay, (1 + self.step) / (10 + self.step)))
        self.step += 1
        return means

    def _average_gradients(self) -> dict[str, float]:
        """Average gradients over the processes and clip them; returns each network's norm before clipping.

        The norms are computed after averaging, so they are the same in all processes.
        """
        norms = []
        for group in self.groups:
            distributed.average_gradients(group)
            norm = nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
            if self.stage.clip_norm:
                nn.utils.clip_grads_with_norm_(group, self.stage.clip_norm, norm)
            norms.append(norm.to(self.device))  # the norm of no gradients is a CPU tensor
        names = ("network", "discriminator")
        return dict(zip(names, torch.stack(norms).tolist(), strict=False))

    def _check_finite(self, what: str, figures: Mapping[str, float]) -> None:
        if not all(math.isfinite(value) for value in figures.values()):
            raise NonFiniteError(
                f"step {self.step}: the {what} is not finite ({figures}); lower learning_rate or set "
                "clip_norm, and run the same command again to continue from the last saved step"
            )

    @torch.no_grad()
    def _average(self, decay: float) -> None:
        for key, value in self.network.state_dict().items():
            if value.dtype.is_floating_point:
                self.ema[key].lerp_(value, 1.0 - decay)
            else:
                self.ema[key].copy_(value)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within a `with` block, give the network its averaged weights and put it into evaluation mode."""
        trained = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.ema)
        self.network.eval()
        try:
            yield
        finally:
            self.network.load_state_dict(trained)
            self.network.train()

    def ema_on_cpu(self) -> dict[str, Tensor]:
        """Return the averaged weights on the CPU."""
        return {k: v.cpu() for k, v in self.ema.items()}

    def save(self, path: Path) -> None:
        """Write the whole state. Process 0 writes; the others wait."""
        state = {
            "step": self.step,
            "best_loss": self.best_loss,
            "stage": asdict(self.stage),
            "modules": [m.state_dict() for m in self.modules],
            "ema": self.ema,
            "optimiser": self.optimiser.state_dict(),
        }
        write_state(path, state)

    def load(self, path: Path) -> None:
        """Restore a saved state; InputError if it is damaged or belongs to another network."""
        state = read_state(path, device=self.device)
        try:
            for module, weights in zip(self.modules, state["modules"], strict=True):
                module.load_state_dict(weights)
            self.optimiser.load_state_dict(state["optimiser"])
            for key, value in state["ema"].items():
                self.ema[key].copy_(value)
            self.step, self.best_loss = int(state["step"]), float(state["best_loss"])
            self._report_changes(state["stage"])
        except (RuntimeError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{path}: not a state of this recipe ({str(error).splitlines()[0]}); use the recipe that "
                "wrote it or another -o"
            ) from error

    def _report_changes(self, before: Mapping[str, Any]) -> None:
        now = asdict(self.stage)
        changed = sorted(k for k in now if k not in FREE_TO_CHANGE and before.get(k) != now[k])
        if changed:
            what = ", ".join(f"{k} {before.get(k)} -> {now[k]}" for k in changed)
            log.warning("continuing after step %d with another recipe: %s", self.step, what)


def write_state(path: Path, state: object) -> None:
    """Write `state` to `path` atomically. Process 0 writes; the others wait."""
    if distributed.rank() == 0:
        try:
            with new_file(path) as scratch:
                torch.save(state, scratch)
        except (OSError, RuntimeError) as error:  # torch.save raises either if the disk is full
            raise OutputError(f"{path}: cannot be written: {reason(error)}; then run again") from error
    distributed.wait()


def read_state(
    path: Path, *holds: str, device: torch.device | str = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Read a file of `write_state`; InputError if it is damaged or lacks one of the entries `holds`.

    With `mmap` set, tensors are read from the file when they are used.
    """
    cure = "delete it and run the same command again, which begins this part anew, or use another -o"
    try:
        state = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as error:  # unpickling a damaged file can raise anything
        raise InputError(f"{path}: the saved state is damaged ({brief(error)}); {cure}") from error
    if not isinstance(state, dict) or not all(key in state for key in holds):
        raise InputError(f"{path}: holds no training state; {cure}")
    return state
