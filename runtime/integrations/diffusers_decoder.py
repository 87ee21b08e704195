"""The decoder of a text-to-image pipeline of the library diffusers, computed by an engine.

from moesr.runtime.integrations.diffusers import Decoder

pipeline.vae = Decoder("engine")

`Decoder` has the part of `AutoencoderKL` that pipelines use to decode. Tensors are PyTorch's, in which the
caller passes latents; this package itself does not import PyTorch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.autoencoder import Autoencoder
from moesr.runtime.errors import InputError


class Config(dict[str, Any]):
    """Entries of a configuration, as items and as attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the configuration of a Decoder has no entry {name!r}") from None


class Decoder:
    """A replacement for the `AutoencoderKL` of a pipeline, which only decodes.

    Images larger than a tile of the engine are always decoded in tiles, and those of a batch one by one, so
    the methods that turn tiling and slicing on and off change nothing. The engine chooses the arithmetic:
    `dtype` is that of the tensors alone, float32 until `to` says otherwise.
    """

    def __init__(self, engine: Path | str, **options: Any) -> None:
        """Open an engine of an autoencoder; the options are those of `moesr.runtime.Upscaler`."""
        self.autoencoder = Autoencoder(engine, **options)
        manifest = self.autoencoder.manifest
        decoder = manifest.model.get("decoder", {})
        levels = manifest.latent_factor.bit_length()
        width, multipliers = decoder.get("channels", 128), decoder.get("channel_mult", [1] * levels)
        self.config = Config(
            in_channels=3,
            out_channels=3,
            latent_channels=manifest.latent_channels,
            block_out_channels=tuple(width * multiplier for multiplier in multipliers),
            scaling_factor=manifest.latent_scale,
            shift_factor=None,
            latents_mean=None,
            latents_std=None,
            force_upcast=False,
            sample_size=manifest.tile,
            use_quant_conv=True,
            use_post_quant_conv=True,
        )
        self.use_tiling = self.use_slicing = True
        self._dtype: Any = None
        self._device: Any = None

    def decode(self, z: Any, return_dict: bool = True, generator: Any = None) -> Any:
        """Decode latents [B, C, h, w] that have been divided by the scaling factor to [B, 3, f h, f w].

        Images have the type and the device of `z` and values of about -1 to 1. The result is a
        `DecoderOutput` of diffusers or, without `return_dict`, a tuple. `generator` is not used. Raises
        InputError for another shape and for values that are not finite, MemoryLimitError and EngineError.
        """
        if getattr(z, "ndim", None) != 4:
            raise InputError(f"got latents of shape {list(getattr(z, 'shape', ()))}, expected [B, C, h, w]")
        latents = z.detach().float().cpu().numpy()
        images = np.stack([self.autoencoder.decode(latent, scaled=False) for latent in latents])
        sample = z.new_tensor(images)
        if not return_dict:
            return (sample,)
        return importlib.import_module("diffusers.models.autoencoders.vae").DecoderOutput(sample=sample)

    @property
    def dtype(self) -> Any:
        """The type of PyTorch that pipelines give latents."""
        return self._dtype or _torch().float32

    @property
    def device(self) -> Any:
        """The device of PyTorch where pipelines put latents; images are returned to it."""
        return self._device or _torch().device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Decoder:
        """Take a device and a type of tensors, in any form that a module of PyTorch takes; returns this."""
        torch = _torch()
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype):
                self._dtype = value
            elif isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                self._device = torch.device(value)
        return self

    def eval(self) -> Decoder:
        """Return this; an engine is never trained."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Decoder:
        """Return this; an engine has no gradients."""
        return self

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Change nothing: images larger than a tile are always decoded in tiles."""

    def disable_tiling(self) -> None:
        """Change nothing, as `enable_tiling`."""

    def enable_slicing(self) -> None:
        """Change nothing: the images of a batch are always decoded one by one."""

    def disable_slicing(self) -> None:
        """Change nothing, as `enable_slicing`."""

    def close(self) -> None:
        """Release the engine."""
        self.autoencoder.close()


def _torch() -> Any:
    """Return PyTorch, which a program that uses diffusers has imported."""
    return sys.modules["torch"]
