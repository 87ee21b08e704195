"""StableSR's graphs: the encoder, and the denoising UNet including the structure encoder and the prompts.

The decoder is written by `decoder.py`. Latents at the graphs' inputs and outputs are scaled as for the UNet.
"""

from __future__ import annotations

from onnx import TensorProto
from torch import Tensor, nn

from moesr.export.graphs.builder import BuiltGraph, GraphBuilder, Value
from moesr.export.graphs.decoder import level, middle
from moesr.export.graphs.expert import Conditioning, Offsets, res_block, stage, time_offsets, unet
from moesr.export.graphs.layers import conv, conv_module, group_norm
from moesr.export.lowering import CPU, Lowering
from moesr.runtime.engine.graph_spec import BATCH
from moesr.runtime.sampling.samplers import Prediction
from moesr.training.networks import Autoencoder, StableSRUNet, StructureEncoder
from moesr.training.networks.autoencoder import LOG_VARIANCE
from moesr.training.networks.unet import Downsample, ResBlock


class StableSRExpert(nn.Module):
    """The network that the expert's graph computes: denoising UNet, structure encoder and prompts."""

    def __init__(
        self, unet: StableSRUNet, structure: StructureEncoder, text: Tensor, prediction: Prediction
    ) -> None:
        """`text` [prompts, tokens, text_channels] holds one or two encoded prompts."""
        super().__init__()
        self.unet, self.structure, self.text, self.prediction = unet, structure, text, prediction

    def forward(self, z_t: Tensor, cond: Tensor, t: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Predict [B, C, h, w] from latents `z_t` and LR latents `cond` [B, C, h, w] and `t` [B].

        `prompt` [B] holds the index of each tile's prompt, as floats.
        """
        text = self.text if prompt is None else self.text[prompt.long()]
        return self.unet(z_t, t, self.structure(cond, t), text)


class LatentEncoder(nn.Module):
    """The network that the encoder's graph computes: the LR image to its latent."""

    def __init__(self, autoencoder: Autoencoder, latent_scale: float) -> None:
        super().__init__()
        self.used = nn.ModuleList([autoencoder.encoder, autoencoder.quant_conv])
        self._whole, self.latent_scale = (autoencoder,), latent_scale

    @property
    def autoencoder(self) -> Autoencoder:
        """The whole autoencoder, whose decoder is not registered as a part of this network."""
        return self._whole[0]

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        """Encode an image [B, 3, f*h, f*w] in [-1, 1] with noise [B, C, h, w] to a latent like the noise."""
        return self.latent_scale * self.autoencoder.sample(image, noise)


class LatentDecoder(nn.Module):
    """The network that the decoder's graph computes: scaled latents to images."""

    def __init__(self, autoencoder: Autoencoder, latent_scale: float, *, refined: bool = True) -> None:
        """Without `refined` the refinement network is left out."""
        super().__init__()
        self.autoencoder, self.latent_scale, self._refined = autoencoder, latent_scale, refined

    def forward(self, z: Tensor, *condition: Tensor) -> Tensor:
        """Decode a scaled latent [B, C, h, w] to an image.

        With feature wrapping, the condition is the LR image [B, 3, f*h, f*w] and its weight [B, 1, 1, 1].
        """
        return self.autoencoder.decode(z / self.latent_scale, *condition, refined=self._refined)


def stablesr_expert_graph(network: StableSRExpert, latent_px: int, lowering: Lowering = CPU) -> BuiltGraph:
    """Write the expert with inputs `z_t`, `cond` [B, C, h, w], `t` [B] and, for two prompts, `prompt` [B].

    h = w = `latent_px`. The output is named after what it predicts, "eps" or "v".
    """
    g, config = GraphBuilder("expert", lowering), network.unet.config
    z_t = g.input("z_t", (BATCH, config.in_channels, latent_px, latent_px))
    cond = g.input("cond", (BATCH, network.structure.config.in_channels, latent_px, latent_px))
    t = g.input("t", (BATCH,))
    with g.scope("structure"):
        with g.scope("time_embed"):
            offsets = time_offsets(g, network.structure, t)
        structure = structure_features(g, g.compute(cond), offsets, network.structure)
    with g.scope("time_embed"):
        offsets = time_offsets(g, network.unet, t)
    prompt = None
    if len(network.text) > 1:
        prompt = g.cast(g.input("prompt", (BATCH,)), TensorProto.INT64)
    given = Conditioning(offsets, structure, network.text, prompt)
    g.output(network.prediction, unet(g, g.compute(z_t), network.unet, given))
    return g.finish()


def structure_features(
    g: GraphBuilder, x: Value, offsets: Offsets, network: StructureEncoder
) -> dict[int, Value]:
    """Return the features of the LR latent `x`, by width; `offsets` hold the timesteps."""
    given = Conditioning(offsets)
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
    """Write the encoder: `image` [B, 3, f*h, f*w], `noise` [B, C, h, w] to a scaled `latent` [B, C, h, w]."""
    g, config = GraphBuilder("encoder", lowering), network.autoencoder.config
    image_px, channels = latent_px * config.factor, config.embed_dim
    image = g.input("image", (BATCH, 3, image_px, image_px))
    noise = g.input("noise", (BATCH, channels, latent_px, latent_px))
    g.output("latent", encode(g, image, noise, network))
    return g.finish()


def encode(g: GraphBuilder, image: Value, noise: Value, network: LatentEncoder) -> Value:
    """Write the encoder from its inputs, as `encoder_graph` describes them, to the scaled latent."""
    encoder = network.autoencoder.encoder
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
        return _sampled(g, g.float32(h), noise, network)


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
