"""The graph of a sampling expert, a denoising UNet with merged space experts, and the parts of any UNet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from moesr.export.graphs import open_sizes
from moesr.export.graphs.builder import BuiltGraph, GraphBuilder, Value
from moesr.export.graphs.layers import (
    attention,
    conv,
    conv_module,
    group_norm,
    normalised,
    silu,
    upsample_conv,
)
from moesr.export.graphs.transformer import text_transformer
from moesr.export.lowering import CPU, Lowering
from moesr.runtime.engine.graph_io import DEEP
from moesr.runtime.engine.graph_spec import BATCH
from moesr.runtime.sampling.samplers import Prediction
from moesr.training.networks import DenoisingUNet, SpaceMoE
from moesr.training.networks.stablesr import SPADE, SPADEResBlock
from moesr.training.networks.transformer import TextTransformer
from moesr.training.networks.unet import AttentionBlock, Downsample, HalfUNet, ResBlock, UNet, Upsample

MAX_PERIOD = 10_000.0  # largest period of the sinusoidal timestep embedding


Offsets = Mapping[nn.Module, Value | Tensor]
"""The offset that the timestep adds to the features of each residual block, [B, C, 1, 1]."""


@dataclass(frozen=True)
class Conditioning:
    """The inputs of a UNet's layers besides the features, like `Conditions` in the network."""

    offsets: Offsets
    structure: Mapping[int, Value] = field(default_factory=dict)  # features of the LR image, by width
    text: Tensor | None = None  # encoded prompts, [prompts, tokens, C]
    prompt: Value | None = None  # index of each tile's prompt, int64 [B]; None: there is one prompt


def expert_graph(
    network: DenoisingUNet,
    latent_px: int,
    lowering: Lowering = CPU,
    *,
    blocks: int = 0,
    prediction: Prediction = "eps",
) -> BuiltGraph:
    """Write an expert with inputs `z_t`, `cond` [B, 3, h, w] and `t` [B] and output `prediction`, as `z_t`.

    h = w = `latent_px`. With `blocks` there is a second output, `deep`: the input features of the last
    `blocks` output blocks.
    """
    g = GraphBuilder("expert", lowering)
    x, t = _expert_inputs(g, network, latent_px)
    with g.scope("time_embed"):
        given = Conditioning(time_offsets(g, network, t))
    deep, skips = _deep(g, x, network, given, blocks)
    g.output(prediction, _rest(g, deep, skips, network, given, blocks))
    if blocks:
        g.output(DEEP, deep)
    return g.finish()


def shallow_graph(
    network: DenoisingUNet,
    latent_px: int,
    lowering: Lowering = CPU,
    *,
    blocks: int,
    prediction: Prediction = "eps",
) -> BuiltGraph:
    """Write a shallow graph: the last `blocks` output blocks, which start from the expert's output `deep`."""
    g = GraphBuilder("shallow", lowering)
    x, t = _expert_inputs(g, network, latent_px)
    deep = g.input(DEEP, (BATCH, *_deep_size(network, latent_px, blocks)))
    with g.scope("time_embed"):
        given = Conditioning(time_offsets(g, network, t, shallow_parts(network, blocks)))
    _, skips = _descend(g, x, network, given, blocks)
    g.output(prediction, _rest(g, g.compute(deep), skips, network, given, blocks))
    return g.finish()


def shallow_parts(network: UNet, blocks: int) -> list[nn.Module]:
    """Return the modules that a shallow graph computes, except for the timestep embedding."""
    return [*network.input_blocks[:blocks], *network.output_blocks[-blocks:], network.out]


def _deep_size(network: DenoisingUNet, latent_px: int, blocks: int) -> tuple[int, int, int]:
    """Channels, height and width of the input features of the last `blocks` output blocks."""
    block = next(m for m in network.output_blocks[-blocks].children() if isinstance(m, ResBlock))
    skip = network.skip_channels[blocks - 1]
    halvings = sum(isinstance(m, Downsample) for b in network.input_blocks[:blocks] for m in b.children())
    side = latent_px >> halvings
    return block.in_channels - skip, side, side


def _expert_inputs(g: GraphBuilder, network: DenoisingUNet, latent_px: int) -> tuple[Value, Value]:
    """Return the UNet's input, in the precision of the graph, and the timesteps."""
    config = network.config
    z_t = g.input("z_t", (BATCH, config.out_channels, latent_px, latent_px))
    cond = g.input("cond", (BATCH, config.in_channels - config.out_channels, latent_px, latent_px))
    t = g.input("t", (BATCH,))
    return g.compute(g.concat([z_t, cond], 1)), t


def unet(g: GraphBuilder, x: Value, network: UNet, given: Conditioning) -> Value:
    """Write a whole UNet: [B, in_channels, h, w], in the precision of the graph, to the prediction."""
    deep, skips = _deep(g, x, network, given, 0)
    return _rest(g, deep, skips, network, given, 0)


def _deep(
    g: GraphBuilder, x: Value, network: UNet, given: Conditioning, blocks: int
) -> tuple[Value, list[Value]]:
    """Return the input features of the last `blocks` output blocks, and the skip features that they read."""
    h, skips = _descend(g, x, network, given, len(network.input_blocks))
    with g.scope("middle_block"):
        h = stage(g, h, network.middle_block, given)
    return _ascend(g, h, skips, network, given, range(len(network.output_blocks) - blocks)), skips


def _descend(
    g: GraphBuilder, h: Value, network: UNet, given: Conditioning, count: int
) -> tuple[Value, list[Value]]:
    """Return the features after the first `count` input blocks, and those after each of them."""
    skips = []
    for i, block in enumerate(network.input_blocks[:count]):
        with g.scope(f"input_blocks.{i}"):
            h = stage(g, h, block, given)
        skips.append(h)
    return h, skips


def _ascend(
    g: GraphBuilder, h: Value, skips: list[Value], network: UNet, given: Conditioning, numbers: range
) -> Value:
    """Return the features after the output blocks `numbers`; each block removes the last entry of `skips`."""
    for i in numbers:
        with g.scope(f"output_blocks.{i}"):
            h = stage(g, g.concat([h, skips.pop()], 1), network.output_blocks[i], given)
    return h


def _rest(
    g: GraphBuilder, deep: Value, skips: list[Value], network: UNet, given: Conditioning, blocks: int
) -> Value:
    """Write the last `blocks` output blocks and the output layer; returns the prediction."""
    count = len(network.output_blocks)
    h = _ascend(g, deep, skips, network, given, range(count - blocks, count))
    with g.scope("out"):
        norm, _, out = network.out
        return conv_module(g, group_norm(g, h, norm, activate=True), out)


def time_offsets(
    g: GraphBuilder, network: HalfUNet, t: Value, parts: Sequence[nn.Module] = ()
) -> dict[nn.Module, Value]:
    """Embed the timesteps and return the offset of each residual block, of the whole network or of `parts`.

    The angles are float32, because t reaches 999.
    """
    half = network.config.width // 2
    frequencies = torch.exp(-math.log(MAX_PERIOD) / half * torch.arange(half, dtype=torch.float32))
    angles = g.op("Mul", g.op("Unsqueeze", t, torch.tensor([1])), frequencies)
    emb = g.compute(g.concat([g.op("Cos", angles), g.op("Sin", angles)], 1))
    first, _, second = network.time_embed
    emb = silu(g, _linear(g, silu(g, _linear(g, emb, first)), second))
    modules = [module for part in parts or [network] for module in part.modules()]
    blocks = [module for module in modules if isinstance(module, ResBlock)]
    layers, convolutions = [block.emb_layers[1] for block in blocks], [block.in_layers[2] for block in blocks]
    weight = torch.cat([_weight(layer) for layer in layers])
    # the offset includes the bias of the convolution that it is added to
    bias = torch.cat([_bias(a) + _bias(b) for a, b in zip(layers, convolutions, strict=True)])
    rows = g.op("Unsqueeze", g.op("Gemm", emb, weight, bias, transB=1), torch.tensor([2, 3]))
    pieces = g.split(rows, 1, [len(_bias(layer)) for layer in layers])
    return dict(zip(blocks, pieces, strict=True))


def fixed_offsets(network: HalfUNet, t: float) -> dict[nn.Module, Tensor]:
    """Return the offsets of a timestep that is known during the export, as constants."""
    emb, found = network.embed(torch.tensor([t])), {}
    for block in network.modules():
        if isinstance(block, ResBlock):
            offset = block.emb_layers(emb)[0] + _bias(block.in_layers[2])
            found[block] = offset[None, :, None, None]
    return found


def _linear(g: GraphBuilder, x: Value, layer: nn.Module) -> Value:
    return g.op("Gemm", x, _weight(layer), _bias(layer), transB=1)


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight


def _bias(layer: nn.Module) -> Tensor:
    assert isinstance(layer.bias, Tensor)
    return layer.bias


def stage(g: GraphBuilder, x: Value, block: nn.Module, given: Conditioning) -> Value:
    """Write one entry of the UNet's block lists."""
    for layer in block.children():
        if isinstance(layer, ResBlock):
            x = res_block(g, x, layer, given)
        elif isinstance(layer, TextTransformer):
            assert given.text is not None, "this network needs an encoded text"
            x = text_transformer(g, x, layer, given.text, given.prompt)
        elif isinstance(layer, AttentionBlock):
            x = _attention_block(g, x, layer)
        elif isinstance(layer, SpaceMoE):
            x = _feed_forward(g, x, layer)
        elif isinstance(layer, Upsample):
            x = upsample_conv(g, x, layer.conv)
        else:  # the first convolution, or the strided one of a Downsample
            x = conv_module(g, x, getattr(layer, "op", layer))
    return x


def res_block(g: GraphBuilder, x: Value, block: ResBlock, given: Conditioning) -> Value:
    """Write a residual block; StableSR's are modulated by the structure features of the same width."""
    norm_in, _, conv_in = block.in_layers
    norm_out, _, _, conv_out = block.out_layers
    h = conv(g, normalised(g, x, norm_in, activate=True), _weight(conv_in), None)
    h = g.op("Add", h, given.offsets[block])  # includes the bias of conv_in
    h = conv_module(g, normalised(g, h, norm_out, activate=True), conv_out)
    if isinstance(block, SPADEResBlock):
        h = _spade(g, h, block.spade, given.structure[h.size(-1)])
    skip = block.skip_connection
    return g.op("Add", h, x if isinstance(skip, nn.Identity) else conv_module(g, x, skip))


def _spade(g: GraphBuilder, h: Value, layer: SPADE, structure: Value) -> Value:
    """`GroupNorm(h) * (1 + gamma) + beta`, with both maps from one convolution."""
    maps = g.op("Relu", conv_module(g, structure, layer.mlp_shared[0]))
    gamma, beta = layer.mlp_gamma, layer.mlp_beta
    weight, bias = torch.cat([gamma.weight, beta.weight]), torch.cat([1 + _bias(gamma), _bias(beta)])
    scale, shift = g.split(conv(g, maps, weight, bias), 1, [h.size(1)] * 2)
    return g.op("Add", g.op("Mul", group_norm(g, h, layer.param_free_norm), scale), shift)


def _attention_block(g: GraphBuilder, x: Value, block: AttentionBlock) -> Value:
    """Multi-head attention over the tokens; the scores' 1/sqrt(width) is folded into the query weights."""
    channels, side = x.size(1), x.size(2)
    head, tokens = channels // block.heads, side * x.size(3)
    parts = [block.qkv.weight, block.qkv.bias[:, None]]  # type: ignore[index]
    weight, bias = (_queries_first(part.reshape(channels * 3, -1), block.heads) for part in parts)
    qkv = conv(g, group_norm(g, x, block.norm), weight[..., None, None], bias[:, 0])
    if g.open_sizes:
        q, k, v = g.split(qkv, 1, [channels] * 3)
        h = open_sizes.attention(g, q, k, v, block.heads)
        return g.op("Add", x, conv_module(g, h, block.proj_out))
    q, k, v = g.split(g.reshape(qkv, 0, 3 * block.heads, head, tokens), 1, [block.heads] * 3)
    h = g.reshape(attention(g, q, k, v), 0, channels, side, tokens // side)
    return g.op("Add", x, conv_module(g, h, block.proj_out))


def _queries_first(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows [heads, (q, k, v), width] of a projection to [(q, k, v), heads, width] and scale q."""
    rows = rows.reshape(heads, 3, -1, rows.shape[-1]).transpose(0, 1).clone()
    rows[0] *= rows.shape[2] ** -0.5
    return rows.flatten(0, 2)


def _feed_forward(g: GraphBuilder, x: Value, block: SpaceMoE) -> Value:
    """Write the merged space experts: `x + FFN(LayerNorm(x))` over tokens."""
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    if g.open_sizes:
        tokens = g.op("Transpose", x, perm=(0, 2, 3, 1))
    else:
        tokens = g.op("Transpose", g.reshape(x, 0, channels, height * width), perm=(0, 2, 1))
    norm = block.moe_norm
    h = g.op("LayerNormalization", g.float32(tokens), norm.weight, norm.bias, epsilon=norm.eps)
    w_in, b_in, w_out, b_out = block.mean_weights()
    h = g.op("Add", g.op("MatMul", g.cast(h, x.dtype), w_in.t()), b_in)
    h = g.op("Add", g.op("MatMul", g.op("Gelu", h), w_out.t()), b_out)
    if g.open_sizes:
        return g.op("Transpose", g.op("Add", tokens, h), perm=(0, 3, 1, 2))
    h = g.op("Transpose", g.op("Add", tokens, h), perm=(0, 2, 1))
    return g.reshape(h, 0, channels, height, width)
