"""StableSR as a plain loop in PyTorch, with the runtime's noise and its tiles for encoding and decoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from stablesr import Denoiser, Tiled
from torch.nn import functional as F

from moesr.runtime.images.color import fix_color
from moesr.runtime.sampling import noise, samplers
from moesr.runtime.sampling.schedule import step_table
from moesr.runtime.sampling.tiles import feather_weights, grid
from moesr.training.checkpoint import StableSRCheckpoint

TILE, LATENT, FACTOR = 128, 16, 8  # output pixels, latent pixels, output pixels per latent pixel
SEED = 11


@dataclass
class Plain:
    """The algorithm of the paper over the networks of a checkpoint; only the noise comes from the runtime."""

    checkpoint: StableSRCheckpoint

    def __post_init__(self) -> None:
        c = self.checkpoint
        self.config, self.autoencoder = c.config, c.decoder()
        self.unet, self.structure, self.text = c.unet(), c.structure(), c.text()

    def __call__(
        self,
        lr: np.ndarray,
        steps: int,
        color_fix: str,
        eta: float = 1.0,
        guidance: float = 1.0,
        fidelity: float = 0.5,
    ) -> np.ndarray:
        """Upscale uint8 [H, W, 3] and return float32 [3, 4H, 4W] in about [-1, 1]."""
        image, (height, width) = self.enlarged(lr)
        canvas = image.shape[2] // FACTOR, image.shape[3] // FACTOR
        latent = self.encoded(image, canvas)
        signal = self.config.schedule.alpha_bar[-1]
        start = noise.gaussian(SEED, noise.INITIAL_NOISE, (4, *canvas))
        z = np.float32(np.sqrt(signal)) * latent + np.float32(np.sqrt(1 - signal)) * start
        z = self.sampled(z[None], latent[None], steps, eta, guidance)[0]
        sr = self.decoded(z, image, canvas, fidelity)[:, :height, :width]
        if color_fix != "none":
            style = image[0, :, :height, :width].numpy()
            sr = np.stack([fix_color(*planes, color_fix) for planes in zip(sr, style, strict=True)])
        size = lr.shape[0] * 4, lr.shape[1] * 4
        return sr if size == (height, width) else _reduced(sr, size)

    def enlarged(self, lr: np.ndarray) -> tuple[torch.Tensor, tuple[int, int]]:
        """Return [1, 3, H, W] in [-1, 1], padded to whole latent pixels, and its size before the padding."""
        x = torch.from_numpy(lr.astype(np.float32)).permute(2, 0, 1)[None] / 255
        height, width = (4 * side for side in lr.shape[:2])
        if (short := min(height, width)) < TILE:
            height, width = height * TILE // short, width * TILE // short
        x = F.interpolate(x, size=(height, width), mode="bicubic", align_corners=False)
        bottom, right = -height % FACTOR, -width % FACTOR
        return 2 * F.pad(x.clamp(0, 1), (0, right, 0, bottom), mode="reflect") - 1, (height, width)

    def encoded(self, image: torch.Tensor, canvas: tuple[int, int]) -> np.ndarray:
        draw = torch.from_numpy(noise.gaussian(SEED, noise.ENCODING_NOISE, (4, *canvas)))[None]

        def encode(y: int, x: int) -> np.ndarray:
            tile = image[..., y * FACTOR :, x * FACTOR :][..., :TILE, :TILE]
            return self.autoencoder.sample(tile, draw[..., y : y + LATENT, x : x + LATENT]).numpy()[0]

        return np.float32(self.config.latent_scale) * _blended(encode, canvas, 1)

    def sampled(
        self, z: np.ndarray, latent: np.ndarray, steps: int, eta: float, guidance: float
    ) -> np.ndarray:
        prompts = self.config.text
        usual = prompts.prompt if guidance == 1 else prompts.guided_prompt
        text, negative = (self.text.encode(ids).numpy() for ids in (usual, prompts.negative_prompt))
        model = Denoiser(self.unet, self.structure, text, negative if guidance != 1 else None, guidance)
        model = Tiled(model, tile=LATENT, overlap=LATENT // 2)
        table = step_table(self.config.schedule, steps, eta, [(0, 1000)])
        scratch = np.empty_like(z)
        for step in range(steps):
            out = model(z, latent, int(table.t[step]))
            c = samplers.coefficients(table, step, self.config.prediction)
            samplers.advance(z, out, noise.gaussian(SEED, step, z.shape[1:])[None], c, scratch)
        return z

    def decoded(
        self, z: np.ndarray, image: torch.Tensor, canvas: tuple[int, int], fidelity: float
    ) -> np.ndarray:
        whole = torch.from_numpy(z / np.float32(self.config.latent_scale))[None]

        def decode(y: int, x: int) -> np.ndarray:
            lr = image[..., y * FACTOR :, x * FACTOR :][..., :TILE, :TILE]
            return self.autoencoder.decode(whole[..., y : y + LATENT, x : x + LATENT], lr, fidelity).numpy()[
                0
            ]

        return _blended(decode, canvas, FACTOR)


def _blended(make: Callable[[int, int], np.ndarray], canvas: tuple[int, int], factor: int) -> np.ndarray:
    """Blend tiles that overlap by an eighth, with feathered weights."""
    weights = feather_weights(LATENT * factor, LATENT // 8 * factor)
    total, out = 0.0, 0.0
    for y, x in grid(*canvas, LATENT, LATENT // 8):
        pads = [(y, canvas[0] - LATENT - y), (x, canvas[1] - LATENT - x)]
        pads = [(a * factor, b * factor) for a, b in pads]
        total = total + np.pad(weights, pads)
        out = out + np.pad(weights * make(y, x), [(0, 0), *pads])
    return (out / total).astype(np.float32)


def _reduced(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    x = torch.from_numpy(np.ascontiguousarray(image))[None]
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)[0].numpy()
