"""The division of an image into tiles for the sampler of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moesr.runtime.engine.field_types import MAX_SIDE
from moesr.runtime.images.resize import Convention
from moesr.runtime.system.json_dataclass import Range


@dataclass(frozen=True, kw_only=True)
class Framing:
    """The division into tiles of a model's published sampler; the defaults are those of MoE-SR.

    `small` says how an image smaller than a tile is handled: it is padded by reflection, or it is enlarged
    until its short side is a tile and the result is reduced again. `resize` names the kernel that enlarges
    the LR image; "torch" goes with 16 bits per channel. `overlap` is the number of latent pixels that
    neighboring tiles share at every step. `tiling` "even" spaces the tiles evenly; "stablesr" places them one
    stride apart, moves the last one back to the edge and centers the windows half a pixel low.
    """

    small: Literal["pad", "enlarge"] = "pad"
    resize: Convention = "matlab"
    overlap: Annotated[int, Range(0, MAX_SIDE)] | None = None  # None: a quarter of a tile
    tiling: Literal["even", "stablesr"] = "even"
