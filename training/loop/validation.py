"""Validation of the averaged weights on a fixed set of held-out samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from moesr.training.loop import distributed
from moesr.training.loop.trainer import Trainer

PICTURES = 4  # samples in the picture


@torch.no_grad()
def validate(trainer: Trainer, data: Dataset[tuple[Tensor, ...]]) -> tuple[dict[str, float], Tensor]:
    """Return mean figures over samples 0 .. val_samples-1, and a picture of the first samples.

    The samples are divided among the processes. The batch size is 1, so the figures do not depend on the
    recipe's batch size. The picture is uint8 [3, H, W] with one row per sample.
    """
    totals: dict[str, Tensor] = {}
    rows: list[Tensor] = []
    count = trainer.stage.val_samples
    with trainer.averaged():
        # Process 0 takes the first samples, which are in the picture.
        share = -(-count // distributed.size())
        mine = range(distributed.rank() * share, min(count, (distributed.rank() + 1) * share))
        for index in mine or [0]:  # a process without samples still needs the figures' names
            batch = [part.to(trainer.device) for part in default_collate([data[index]])]
            figures, images = trainer.objective.evaluate(batch)
            for key, value in figures.items():
                weight = float(index in mine)
                totals[key] = totals.get(key, torch.zeros((), device=trainer.device)) + weight * value.float()
            rows += [images[0]] if len(rows) < PICTURES else []
    sums = distributed.mean_figures(totals)
    picture = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return {k: v * distributed.size() / count for k, v in sums.items()}, picture


def psnr(sr: Tensor, hr: Tensor) -> Tensor:
    """Return the PSNR in dB of images in [-1, 1], from the mean squared error over the whole batch."""
    error = (sr.clamp(-1, 1) - hr).square().mean() / 4
    return -10.0 * torch.log10(error.clamp_min(1e-10))
