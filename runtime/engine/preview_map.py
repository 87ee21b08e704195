"""The linear map from latents to colors, with which an engine's manifest lets a preview be drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moesr.runtime.system.json_dataclass import Range

MAX_WEIGHT = 1e6

Weight = Annotated[float, Range(-MAX_WEIGHT, MAX_WEIGHT)]


@dataclass(frozen=True)
class PreviewMap:
    """RGB in [-1, 1] = `weights` times the clean latent + `bias`, for every latent pixel by itself.

    `weights` has three rows, one per color, and a column per latent channel. With `adds_lr` the latent
    encodes only what the LR image lacks, and the LR image is added.
    """

    weights: tuple[tuple[Weight, ...], tuple[Weight, ...], tuple[Weight, ...]]
    bias: tuple[Weight, Weight, Weight]
    adds_lr: bool = False
