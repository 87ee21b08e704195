"""Advice after a stage ran out of memory: options that make it need less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from moesr.runtime.errors import MemoryLimitError
from moesr.training.recipe import Recipe


@contextmanager
def memory_relief(stage: str, recipe: Recipe) -> Iterator[None]:
    """Turn a failed allocation of `stage` into a MemoryLimitError that names the recipe entries to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        changes = lighter(stage, recipe)
        cure = " ".join(f"--set {change}" for change in changes) or "a device with more memory"
        reason = (str(error) or "allocation failed").splitlines()[0]
        raise MemoryLimitError(f"{stage}: out of memory ({reason}); run again with {cure}") from error


def lighter(stage: str, recipe: Recipe) -> list[str]:
    """Return changes of the recipe, as --set takes them, that reduce the memory of `stage`; possibly none.

    The batch size is reduced at an equal number of samples per step; if it is 1 already, bf16 is suggested.
    """
    changes = []
    if stage != "latents":
        config = getattr(recipe, stage)
        if config.batch > 1:
            parts = next(n for n in range(2, config.batch + 1) if config.batch % n == 0)
            changes.append(f"{stage}.batch={config.batch // parts}")
            changes.append(f"{stage}.accumulate={config.accumulate * parts}")
        elif config.precision == "fp32":
            changes.append(f"{stage}.precision=bf16")
    if stage in ("latents", "decoder") and recipe.decoder.latent_batch > 1:
        changes.append(f"decoder.latent_batch={recipe.decoder.latent_batch // 2}")
    return changes


def _is_out_of_memory(error: Exception) -> bool:
    """Return True for out-of-memory errors of NumPy, a GPU or torch's CPU allocator (a RuntimeError)."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)
