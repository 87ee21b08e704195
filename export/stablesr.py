"""StableSR's graphs: the encoder, and the denoising UNet with its structure encoder and its prompt inside.

The decoder is that of every model (`decoder.py`). Latents at the boundary are scaled, as the UNet sees them.
"""

from __future__ import annotations

from torch import Tensor, nn

from moesr.export.decoder import level, middle
from moesr.export.expert import Given, res_block, stage, time_offsets, unet
from moesr.export.graph import BATCH, BuiltGraph, GraphBuilder, Value
from moesr.export.layers import conv, conv_module, group_norm
from moesr.export.lowering import CPU, Lowering
from moesr.runtime.samplers import Prediction
from moesr.training.networks import Autoencoder, StableSRUNet, StructureEncoder
from moesr.training.networks.autoencoder import LOG_VARIANCE
from moesr.training.networks.unet import Downsample, ResBlock


class StableSRExpert(nn.Module):
    """The denoising UNet with its structure encoder, for one prompt: what the graph of an expert computes."""

    def __init__(
        self, unet: StableSRUNet, structure: StructureEncoder, text: Tensor, prediction: Prediction
    ) -> None:
        """`text` [1, tokens, text_channels] is the encoded prompt."""
        super().__init__()
        self.unet, self.structure, self.text, self.prediction = unet, structure, text, prediction

    def forward(self, z_t: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """Latents `z_t` and LR latents `cond` [B, C, h, w], `t` [B] -> the prediction [B, C, h, w]."""
        return self.unet(z_t, t, self.structure(cond, t), self.text)


class LatentEncoder(nn.Module):
    """The encoder that makes the LR latent: what its graph computes."""

    def __init__(self, autoencoder: Autoencoder, latent_scale: float) -> None:
        super().__init__()
        self.autoencoder, self.latent_scale = autoencoder, latent_scale

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """Image [B, 3, f*h, f*w] in [-1, 1], noise [B, C, h, w] -> scaled latent [B, C, h, w]."""
        return self.latent_scale * self.autoencoder.sample(image, noise)


class LatentDecoder(nn.Module):
    """The decoder of scaled latents: what its graph computes."""

    def __init__(self, autoencoder: Autoencoder, latent_scale: float) -> None:
        super().__init__()
        self.autoencoder, self.latent_scale = autoencoder, latent_scale

    def forward(self, z: Tensor, lr: Tensor, fidelity: Tensor) -> Tensor:
        """Scaled latent [B, C, h, w], LR image [B, 3, f*h, f*w], its weight [B, 1, 1, 1] -> image."""
        return self.autoencoder.decode(z / self.latent_scale, lr, fidelity)


def stablesr_expert_graph(network: StableSRExpert, latent_px: int, lowering: Lowering = CPU) -> BuiltGraph:
    """Inputs `z_t`, `cond` [B, C, h, w] and `t` [B], output called what it predicts; h = w = `latent_px`."""
    g, config = GraphBuilder("expert", lowering), network.unet.config
    z_t = g.input("z_t", (BATCH, config.in_channels, latent_px, latent_px))
    cond = g.input("cond", (BATCH, network.structure.config.in_channels, latent_px, latent_px))
    t = g.input("t", (BATCH,))
    with g.scope("structure"):
        structure = _structure(g, g.compute(cond), t, network.structure)
    with g.scope("time_embed"):
        offsets = time_offsets(g, network.unet, t)
    given = Given(offsets, structure, network.text)
    g.output(network.prediction, unet(g, g.compute(z_t), network.unet, given))
    return g.finish()


def _structure(g: GraphBuilder, x: Value, t: Value, network: StructureEncoder) -> dict[int, Value]:
    """Features of the LR latent for the timesteps `t`, by width."""
    with g.scope("time_embed"):
        given = Given(time_offsets(g, network, t))
    h, levels = x, []
    for i, block in enumerate(network.input_blocks):
        if isinstance(next(block.children()), Downsample):
            levels.append(h)
        with g.scope(f"input_blocks.{i}"):
            h = stage(g, h, block, given)
    with g.scope("middle_block"):
        levels.append(stage(g, h, network.middle_block, given))
    features = {}
    for i, (tran, found) in enumerate(zip(network.fea_tran, levels, strict=True)):
        assert isinstance(tran, ResBlock)
        with g.scope(f"fea_tran.{i}"):
            features[found.size(-1)] = res_block(g, found, tran, given)
    return features


def encoder_graph(network: LatentEncoder, latent_px: int, lowering: Lowering = CPU) -> BuiltGraph:
    """Inputs `image` [B, 3, f*h, f*w] and `noise` [B, C, h, w], output `latent` [B, C, h, w], scaled."""
    g, autoencoder = GraphBuilder("encoder", lowering), network.autoencoder
    config, encoder = autoencoder.config, autoencoder.encoder
    image_px, channels = latent_px * config.factor, config.embed_dim
    image = g.input("image", (BATCH, 3, image_px, image_px))
    noise = g.input("noise", (BATCH, channels, latent_px, latent_px))
    h = conv_module(g, g.compute(image), encoder.conv_in)
    for i, blocks in enumerate(encoder.down):
        with g.scope(f"down.{i}"):
            h = level(g, h, blocks)
            if i < len(encoder.down) - 1:
                h = conv_module(g, h, blocks.get_submodule("downsample.conv"), pads=(0, 0, 1, 1))
    with g.scope("mid"):
        h = middle(g, h, encoder.mid)
    with g.scope("out"):
        h = conv_module(g, group_norm(g, h, encoder.norm_out, activate=True), encoder.conv_out)
        g.output("latent", _sampled(g, g.float32(h), noise, network))
    return g.finish()


def _sampled(g: GraphBuilder, moments: Value, noise: Value, network: LatentEncoder) -> Value:
    """`scale * (mean + exp(log_variance / 2) * noise)`, in float32; the scale is folded into the mean."""
    quant, channels = network.autoencoder.quant_conv, noise.size(1)
    weight, bias = quant.weight.clone(), quant.bias.clone()  # type: ignore[union-attr]
    weight[:channels] *= network.latent_scale
    bias[:channels] *= network.latent_scale
    mean, log_variance = g.split(conv(g, moments, weight, bias), 1, [channels] * 2)
    bounds = (g.constant(Tensor([bound]).squeeze()) for bound in LOG_VARIANCE)
    deviation = g.op("Exp", g.op("Mul", g.op("Clip", log_variance, *bounds), Tensor([0.5])))
    return g.op("Add", mean, g.op("Mul", g.op("Mul", deviation, Tensor([network.latent_scale])), noise))
