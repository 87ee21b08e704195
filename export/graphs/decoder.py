"""The decoder's graph: quantiser, fused levels of the LR encoder, decoder, fusion, refinement network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesr.export.graphs import kernel_nodes, open_sizes, winograd
from moesr.export.graphs.builder import BuiltGraph, GraphBuilder, Value
from moesr.export.graphs.layers import attention, conv, conv_module, group_norm, normalised, upsample_conv
from moesr.export.graphs.refinement import refine
from moesr.export.lowering import CPU, Lowering, cut
from moesr.runtime.engine.graph_spec import BATCH
from moesr.training.networks import Autoencoder
from moesr.training.networks.autoencoder import AttnBlock, Level, Middle
from moesr.training.networks.fusion import RESIDUAL_SCALE, RRDB, SLOPE, DenseBlock, FusionLayer, ResnetBlock


def decoder_graph(
    network: Autoencoder,
    latent_px: int,
    lowering: Lowering = CPU,
    latent_scale: float = 1.0,
    *,
    refined: bool = True,
) -> BuiltGraph:
    """Write the decoder of an autoencoder.

    Its inputs are `z` [B, D, h, w], `lr` [B, 3, f*h, f*w] and `fidelity` [B], its output is `image` [B, 3,
    f*h, f*w]. Here h = w = `latent_px`, and f is the factor of the autoencoder. The autoencoder's latent is
    `z` divided by `latent_scale` (KL autoencoders only). A decoder without LR fusion has no input `fidelity`,
    and it takes `lr` only if it predicts a residual of the LR image. Without `refined` the refinement network
    is left out.
    """
    g, config = GraphBuilder("decoder", lowering), network.config
    z = g.input("z", (BATCH, config.embed_dim, latent_px, latent_px))
    image_px = latent_px * config.factor
    lr = g.input("lr", (BATCH, 3, image_px, image_px)) if config.takes_lr else None
    fidelity = _fidelity(g) if network.decoder.fusions else None
    g.output("image", decode(g, z, lr, fidelity, network, latent_scale, refined=refined))
    return g.finish()


def decode(
    g: GraphBuilder,
    z: Value,
    lr: Value | None,
    fidelity: Value | None,
    network: Autoencoder,
    latent_scale: float = 1.0,
    *,
    refined: bool = True,
) -> Value:
    """Write the decoder from its inputs, as `decoder_graph` describes them, to the image.

    `fidelity` is [B, 1, 1, 1], in the precision of the graph.
    """
    config, decoder = network.config, network.decoder
    features = _lr_features(g, g.compute(lr), network) if lr and decoder.fusions else {}
    with g.scope("quantize"):
        h = g.compute(_quantise(g, z, network, latent_scale))
    with g.scope("decoder.mid"):
        h = middle(g, conv_module(g, h, decoder.conv_in), decoder.mid)
    for i in reversed(range(len(decoder.up))):
        with g.scope(f"decoder.up.{i}"):
            blocks = decoder.up[i]
            h = level(g, h, blocks)
            if fidelity and i in features:
                h = _fuse(g, h, decoder.fusions[i], features[i], fidelity)
            if i > 0:
                h = upsample_conv(g, h, blocks.get_submodule("upsample.conv"))
    if refined and config.refinement != "none":
        with g.scope("decoder.unet_1"):
            h = refine(g, h, decoder.unet_1)
    with g.scope("decoder.out"):
        h = conv_module(g, group_norm(g, h, decoder.norm_out, activate=True), decoder.conv_out)
        if lr and config.lr_residual:
            h = g.op("Add", g.float32(h), lr)
    return h


def _fidelity(g: GraphBuilder) -> Value:
    """Return the weight of the LR features as [B, 1, 1, 1], an input of decoders with LR fusion."""
    return g.compute(g.op("Unsqueeze", g.input("fidelity", (BATCH,)), torch.tensor([1, 2, 3])))


def _quantise(g: GraphBuilder, z: Value, network: Autoencoder, latent_scale: float) -> Value:
    """Replace each latent by its nearest code, with `post_quant_conv` already applied to the codes.

    This is computed in float32, since half precision would pick other codes, and for a few rows of the latent
    at a time, since the matrix of all distances is large. A KL autoencoder has no codes, only the
    convolution.
    """
    post = network.post_quant_conv
    if not network.config.codebook_size:
        return conv(g, z, post.weight / latent_scale, post.bias)
    codes = network.quantize.embedding.weight.detach()  # [codes, D]
    table = (codes.double() @ post.weight.flatten(1).t().double() + _bias(post).double()).float()
    side, width = z.size(2), z.size(3)
    rows = cut(side, 4 * len(codes) * width, g.lowering.score_bytes)
    # |z - e|^2 without |z|^2, which does not depend on the code
    products, squares = g.constant(-2 * codes.t()), g.constant((codes * codes).sum(dim=1))
    if g.open_sizes:
        return open_sizes.nearest_codes(g, z, products, squares, table)
    found = []
    for start in range(0, side, rows):
        stop = min(start + rows, side)
        strip = g.op("Transpose", g.slice(z, 2, start, stop), perm=(0, 2, 3, 1))
        flat = g.reshape(strip, -1, codes.shape[1])
        distance = g.op("Gemm", flat, products, squares)
        index = g.op("ArgMin", distance, axis=1, keepdims=0)
        found.append(g.reshape(index, -1, stop - start, width))
    return g.op("Transpose", g.op("Gather", table, g.concat(found, 1)), perm=(0, 3, 1, 2))


def _lr_features(g: GraphBuilder, lr: Value, network: Autoencoder) -> dict[int, Value]:
    """Return the features to fuse, by level. The encoder is written only up to the last fused level."""
    encoder, levels, found = network.encoder, network.config.fusion_levels, {}
    with g.scope("encoder"):
        h = conv_module(g, lr, encoder.conv_in)
        for i in range(max(levels) + 1):
            with g.scope(f"down.{i}"):
                h = level(g, h, encoder.down[i])
                if i in levels:
                    found[i] = h
                if i < max(levels):
                    h = conv_module(g, h, encoder.down[i].get_submodule("downsample.conv"), pads=(0, 0, 1, 1))
    return found


def level(g: GraphBuilder, x: Value, blocks: nn.Module) -> Value:
    """Write the residual blocks of one resolution, without the resampling after them."""
    assert isinstance(blocks, Level)
    for block in blocks.block:
        x = resnet_block(g, x, block)
    return x


def resnet_block(g: GraphBuilder, x: Value, block: nn.Module) -> Value:
    """Write a residual block of the autoencoder."""
    assert isinstance(block, ResnetBlock)
    h = conv_module(g, normalised(g, x, block.norm1, activate=True), block.conv1)
    h = conv_module(g, normalised(g, h, block.norm2, activate=True), block.conv2)
    shortcut = getattr(block, block.shortcut_name, None)
    return g.op("Add", h, x if shortcut is None else conv_module(g, x, shortcut))


def middle(g: GraphBuilder, x: Value, blocks: Middle) -> Value:
    """Write the middle of an encoder or decoder: residual block, attention, residual block."""
    x = resnet_block(g, x, blocks.block_1)
    with g.scope("attention"):
        x = _attention(g, x, blocks.attn_1)
    return resnet_block(g, x, blocks.block_2)


def _attention(g: GraphBuilder, x: Value, block: AttnBlock) -> Value:
    """Single-head attention over all positions.

    The scale of the scores is folded into q. The bias of k is left out: it shifts all scores of a row by the
    same amount, which does not change the softmax. `proj_out` is applied to v in advance, which saves one
    convolution; this is exact because each row of weights sums to one.
    """
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    h, scale = group_norm(g, x, block.norm), channels**-0.5
    out = block.proj_out.weight.flatten(1).double()
    w_v = (out @ block.v.weight.flatten(1).double()).float()[..., None, None]
    b_v = (out @ _bias(block.v).double() + _bias(block.proj_out).double()).float()
    q = conv(g, h, block.q.weight * scale, _bias(block.q) * scale)
    k = conv(g, h, block.k.weight, None)
    v = conv(g, h, w_v, b_v)
    if g.open_sizes:
        return g.op("Add", x, open_sizes.attention(g, q, k, v, heads=1))
    q, k, v = (g.reshape(part, 0, channels, height * width) for part in (q, k, v))
    attended = kernel_nodes.attention(g, q, k, v)
    attended = attention(g, q, k, v) if attended is None else attended
    return g.op("Add", x, g.reshape(attended, 0, channels, height, width))


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _fuse(g: GraphBuilder, h: Value, layer: FusionLayer, features: Value, fidelity: Value) -> Value:
    """`h + fidelity * fuse(cat(LR features, h))`."""
    with g.scope("fusion"):
        fused = resnet_block(g, g.concat([features, h], 1), layer.encode_enc_1)
        for block in layer.encode_enc_2:
            assert isinstance(block, RRDB)
            inner = fused
            for dense in (block.rdb1, block.rdb2, block.rdb3):
                inner = _dense_block(g, inner, dense)
            fused = g.op("Add", fused, g.op("Mul", inner, torch.tensor(RESIDUAL_SCALE)))
        return g.op("Add", h, g.op("Mul", resnet_block(g, fused, layer.encode_enc_3), fidelity))


def _dense_block(g: GraphBuilder, x: Value, block: DenseBlock) -> Value:
    """Five convolutions over growing features; the residual scale is folded into the last one."""
    scales = (1.0, 1.0, 1.0, 1.0, RESIDUAL_SCALE)
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    tiled = winograd.chosen(g, (channels, channels, 3, 3), height, width)
    features, h = [], x
    for i, scale in enumerate(scales, 1):
        layer = block.get_submodule(f"conv{i}")
        assert isinstance(layer, nn.Conv2d)
        weight, bias = layer.weight * scale, _bias(layer) * scale
        if h is not x:
            h = g.op("LeakyRelu", h, alpha=SLOPE)
        if tiled:  # every feature is transformed once and read by up to five convolutions
            features.append(winograd.transform_input(g, h, 3, (1, 1, 1, 1)))
            grown = [g.concat(strip, 2) for strip in zip(*features[1:], strict=True)]
            h = winograd.multiply(g, [features[0], grown] if grown else features, weight, bias, width)
        else:
            features.append(h)
            h = conv(g, g.concat(features, 1), weight, bias)
    return g.op("Add", x, h)
