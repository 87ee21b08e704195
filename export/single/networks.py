"""The networks of a checkpoint, for one graph that holds them all and for its proof.

A `Family` writes its networks into a graph and also runs them in PyTorch. One expert is in memory at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.export.graphs.decoder import decode
from moesr.export.graphs.expert import Conditioning, fixed_offsets, unet
from moesr.export.graphs.stablesr import LatentEncoder, encode, structure_features
from moesr.export.parity import double_norms
from moesr.export.prompts import Prompts
from moesr.export.single.image_nodes import TOP, enlarge, scalar
from moesr.export.stablesr_engine import encoded
from moesr.runtime.errors import UsageError
from moesr.runtime.images.resize import Convention, imresize
from moesr.runtime.sampling import noise
from moesr.training.checkpoint import Checkpoint, StableSRCheckpoint
from moesr.training.config import AutoencoderConfig, ModelConfig
from moesr.training.networks import DenoisingUNet


class Family(ABC):
    """The networks of one checkpoint. Images are [1, 3, H, W] in [-1, 1], latents [1, C, h, w]."""

    convention: Convention
    """How the LR image is enlarged."""

    starts_from_latent = False
    """Whether sampling starts from the noised condition and not from noise alone."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.autoencoder = checkpoint.decoder()

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self.checkpoint.config

    @property
    def first_stage(self) -> AutoencoderConfig:
        """The autoencoder's configuration."""
        return self.config.decoder

    def enlarged(self, g: GraphBuilder, levels: Value) -> Value:
        """Write the LR image at output size, from levels of 0 to 255."""
        return to_unit(g, enlarge(g, levels, self.config.scale, self.convention))

    @abstractmethod
    def condition(self, g: GraphBuilder, levels: Value, lr: Value, seed: int) -> Value:
        """Write the condition of the experts from the LR image's levels and from `lr`, its enlarged form."""

    @abstractmethod
    def predict(self, g: GraphBuilder, z: Value, cond: Value, expert: int, t: float) -> Value:
        """Write the prediction of an expert at a timestep."""

    def decoded(self, g: GraphBuilder, z: Value, lr: Value, fidelity: float) -> Value:
        """Write the decoder."""
        weight = g.compute(g.constant(np.full((1, 1, 1, 1), fidelity, np.float32)))
        return g.float32(decode(g, z, lr, weight, self.autoencoder, self.latent_scale))

    @property
    def latent_scale(self) -> float:
        """The factor of the latents inside the graph."""
        return 1.0

    @abstractmethod
    def run_condition(self, image: np.ndarray, lr: Tensor, seed: int) -> Tensor:
        """Return the condition for an LR image, uint8 [h, w, 3], and for `lr`, its enlarged form."""

    @abstractmethod
    def run_expert(self, z: Tensor, cond: Tensor, expert: int, t: float) -> Tensor:
        """Return the prediction of an expert at a timestep."""

    def run_decoder(self, z: Tensor, lr: Tensor, fidelity: float) -> Tensor:
        """Return the decoded image."""
        given = (lr, torch.full((1, 1, 1, 1), fidelity)) if self.autoencoder.decoder.fusions else (lr,)
        given = given if self.first_stage.takes_lr else ()
        with double_norms(self.autoencoder):
            return self.autoencoder.decode(z / self.latent_scale, *given)


class MoESR(Family):
    """MoE-SR and plain latent diffusion: the condition is the LR image on the latent grid."""

    convention = "matlab"

    def __init__(self, checkpoint: Checkpoint) -> None:
        """UsageError if the LR image would have to be reduced to the latent grid, or by a broken factor."""
        super().__init__(checkpoint)
        scale, factor = self.config.scale, self.first_stage.factor
        if scale % factor:
            raise UsageError(
                f"{self.config.name}: --single needs a scale that is a multiple of the decoder's factor; got "
                f"x{scale} and {factor}; export an engine directory"
            )
        self._loaded: tuple[int, DenoisingUNet] | None = None

    def _expert(self, k: int) -> DenoisingUNet:
        if self._loaded is None or self._loaded[0] != k:
            self._loaded = None  # releases the other expert before this one is read
            self._loaded = k, self.checkpoint.expert(k)
        return self._loaded[1]

    def condition(self, g: GraphBuilder, levels: Value, lr: Value, seed: int) -> Value:
        """Write the LR image on the latent grid."""
        return to_unit(g, enlarge(g, levels, self.config.scale // self.first_stage.factor, self.convention))

    def predict(self, g: GraphBuilder, z: Value, cond: Value, expert: int, t: float) -> Value:
        """Write an expert."""
        network = self._expert(expert)
        given = Conditioning(fixed_offsets(network, t))
        return unet(g, g.compute(g.concat([z, cond], 1)), network, given)

    def run_condition(self, image: np.ndarray, lr: Tensor, seed: int) -> Tensor:
        """Return the LR image on the latent grid."""
        height, width = (s * self.config.scale // self.first_stage.factor for s in image.shape[:2])
        return unit_tensor(imresize(image, height, width))

    def run_expert(self, z: Tensor, cond: Tensor, expert: int, t: float) -> Tensor:
        """Run an expert."""
        network = self._expert(expert)
        with double_norms(network):
            return network(z, cond, torch.tensor([t]))


class StableSR(Family):
    """StableSR: the condition is the latent of the enlarged LR image, and the UNet also reads a text."""

    convention = "torch"

    def __init__(self, checkpoint: StableSRCheckpoint, prompts: Prompts) -> None:
        super().__init__(checkpoint)
        self._config = checkpoint.config
        self.starts_from_latent = self._config.init == "latent"
        self._text = encoded(checkpoint, prompts)
        self._guidance = prompts.guidance
        self._unet, self._structure = checkpoint.unet(), checkpoint.structure()
        self._encoder = LatentEncoder(self.autoencoder, self.latent_scale).eval()

    @property
    def latent_scale(self) -> float:
        """The factor of the latents inside the graph."""
        return self._config.latent_scale

    @property
    def _gains(self) -> dict[int, float]:
        """The weights of the predictions by prompt."""
        return {0: 1.0} if len(self._text) == 1 else {0: self._guidance, 1: 1.0 - self._guidance}

    def condition(self, g: GraphBuilder, levels: Value, lr: Value, seed: int) -> Value:
        """Write the encoder."""
        sides = (lr.size(axis) // self.first_stage.factor for axis in (2, 3))
        shape = (self.first_stage.embed_dim, *sides)
        drawn = g.constant(noise.gaussian(seed, noise.ENCODING_NOISE, shape)[None])
        with g.scope("encoder"):
            return encode(g, lr, drawn, self._encoder)

    def predict(self, g: GraphBuilder, z: Value, cond: Value, expert: int, t: float) -> Value:
        """Write the UNet with the structure encoder, once for each prompt with a weight."""
        with g.scope("structure"):
            offsets = fixed_offsets(self._structure, t)
            structure = structure_features(g, g.compute(cond), offsets, self._structure)
        offsets, total = fixed_offsets(self._unet, t), None
        for prompt, gain in self._gains.items():
            given = Conditioning(offsets, structure, self._text[prompt : prompt + 1])
            out = g.float32(unet(g, g.compute(z), self._unet, given))
            out = out if gain == 1.0 else g.op("Mul", out, scalar(g, gain))
            total = out if total is None else g.op("Add", total, out)
        assert total is not None
        return total

    def run_condition(self, image: np.ndarray, lr: Tensor, seed: int) -> Tensor:
        """Run the encoder."""
        shape = (self.first_stage.embed_dim, *(s // self.first_stage.factor for s in lr.shape[2:]))
        drawn = torch.from_numpy(noise.gaussian(seed, noise.ENCODING_NOISE, shape))[None]
        with double_norms(self._encoder.autoencoder):
            return self._encoder(lr, drawn)

    def run_expert(self, z: Tensor, cond: Tensor, expert: int, t: float) -> Tensor:
        """Run the UNet with the structure encoder, once for each prompt with a weight."""
        at = torch.tensor([t])
        with double_norms(self._unet), double_norms(self._structure):
            structure, total = self._structure(cond, at), torch.zeros_like(z)
            for prompt, gain in self._gains.items():
                total += gain * self._unet(z, at, structure, self._text[prompt : prompt + 1])
        return total


def family_of(checkpoint: Checkpoint, prompts: Prompts | None) -> Family:
    """Return the networks of a checkpoint; `prompts` are given for models with a text encoder."""
    if isinstance(checkpoint, StableSRCheckpoint):
        assert prompts
        return StableSR(checkpoint, prompts)
    return MoESR(checkpoint)


def to_unit(g: GraphBuilder, levels: Value) -> Value:
    """Map levels of 0 to 255 to [-1, 1]."""
    return g.op("Sub", g.op("Mul", levels, scalar(g, 2.0 / TOP)), scalar(g, 1.0))


def unit_tensor(image: np.ndarray) -> Tensor:
    """Map uint8 or uint16 [H, W, 3] to [1, 3, H, W] in [-1, 1]."""
    values = image.astype(np.float32) * np.float32(2.0 / np.iinfo(image.dtype).max) - np.float32(1.0)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)[None]))
