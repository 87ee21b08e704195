"""What a model's sampler expects of image sizes and tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moesr.runtime.images.resize import Convention

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True)
class Framing:
    """What a model's sampler is used to; the defaults are MoE-SR's.

    `small`: an image below a tile is padded by reflection, or enlarged until its short side is a tile and the
    result reduced again. `resize`: how the LR image is enlarged; "torch" goes with 16 bits a channel.
    `overlap`: latent pixels that neighbouring tiles share at every step. `tiling`: as many tiles as it takes,
    evenly spaced, or StableSR's: a stride apart, the last one moved back to the edge, with windows whose
    centre is half a pixel low.
    """

    small: Literal["pad", "enlarge"] = "pad"
    resize: Convention = "matlab"
    overlap: int | None = None  # None: a quarter of a tile
    tiling: Literal["even", "stablesr"] = "even"
