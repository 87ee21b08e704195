"""The transformer of Stable Diffusion 2 as a graph; the keys and values of the text are constants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moesr.export.graphs.builder import GraphBuilder, Value
from moesr.export.graphs.layers import attention, group_norm
from moesr.training.networks.transformer import CrossAttention, FeedForward, TextTransformer, TransformerBlock


def text_transformer(
    g: GraphBuilder, x: Value, layer: TextTransformer, text: Tensor, prompt: Value | None = None
) -> Value:
    """Write `x + transformer(x)` over the H*W tokens of [B, C, H, W].

    `text` is [prompts, tokens, C'], and `prompt`, int64 [B], holds the index of each tile's prompt (None:
    there is one prompt).
    """
    channels, height, width = (x.size(axis) for axis in (1, 2, 3))
    tokens = g.reshape(group_norm(g, x, layer.norm), 0, channels, height * width)
    h = linear(g, g.op("Transpose", tokens, perm=(0, 2, 1)), layer.proj_in)
    for block in layer.transformer_blocks:
        assert isinstance(block, TransformerBlock)
        h = g.op("Add", h, _self_attention(g, layer_norm(g, h, block.norm1), block.attn1))
        h = g.op("Add", h, _text_attention(g, layer_norm(g, h, block.norm2), block.attn2, text, prompt))
        h = g.op("Add", h, _feed_forward(g, layer_norm(g, h, block.norm3), block.ff))
    h = g.op("Transpose", linear(g, h, layer.proj_out), perm=(0, 2, 1))
    return g.op("Add", x, g.reshape(h, 0, channels, height, width))


def linear(g: GraphBuilder, x: Value, layer: nn.Module) -> Value:
    """Write a trained `Linear` over the last axis."""
    assert isinstance(layer, nn.Linear)
    h = g.op("MatMul", x, layer.weight.t())
    return h if layer.bias is None else g.op("Add", h, layer.bias)


def layer_norm(g: GraphBuilder, x: Value, norm: nn.LayerNorm) -> Value:
    """Write LayerNorm over the last axis; it computes in float32 and returns the precision of `x`."""
    h = g.op("LayerNormalization", g.float32(x), norm.weight, norm.bias, epsilon=norm.eps)
    return g.cast(h, x.dtype)


def _self_attention(g: GraphBuilder, x: Value, layer: CrossAttention) -> Value:
    """Self-attention with one product for q, k and v; the scale of the scores is folded into the queries."""
    scale = (x.size(-1) // layer.heads) ** -0.5
    weight = torch.cat([layer.to_q.weight * scale, layer.to_k.weight, layer.to_v.weight])
    parts = g.split(g.op("MatMul", x, weight.t()), 2, [x.size(-1)] * 3)
    q, k, v = (_heads(g, part, layer.heads) for part in parts)
    return _joined(g, attention(g, q, k, v), layer)


def _text_attention(
    g: GraphBuilder, x: Value, layer: CrossAttention, text: Tensor, prompt: Value | None
) -> Value:
    """Attention to the text, whose keys and values are constants; each tile selects those of its prompt."""
    channels = x.size(-1)
    head = channels // layer.heads
    q = _heads(g, g.op("MatMul", x, (layer.to_q.weight * head**-0.5).t()), layer.heads)
    projected = layer.to_k(text), layer.to_v(text)  # [prompts, tokens, channels]
    shaped = (p.transpose(1, 2).reshape(len(text), layer.heads, head, -1) for p in projected)
    keys, values = (g.cast(g.constant(p), x.dtype) for p in shaped)
    if prompt is not None:
        keys, values = (g.op("Gather", each, prompt, axis=0) for each in (keys, values))
    return _joined(g, attention(g, q, keys, values), layer)


def _heads(g: GraphBuilder, x: Value, heads: int) -> Value:
    """Split heads: [B, L, C] -> [B, heads, C / heads, L]."""
    tokens, channels = x.size(1), x.size(2)
    return g.op("Transpose", g.reshape(x, 0, tokens, heads, channels // heads), perm=(0, 2, 3, 1))


def _joined(g: GraphBuilder, h: Value, layer: CrossAttention) -> Value:
    """Join heads, [B, heads, C / heads, L] -> [B, L, C], and apply the output layer."""
    rows = g.reshape(h, 0, h.size(1) * h.size(2), h.size(3))
    return linear(g, g.op("Transpose", rows, perm=(0, 2, 1)), layer.to_out[0])


def _feed_forward(g: GraphBuilder, x: Value, layer: FeedForward) -> Value:
    """Gated feed-forward: `value * GELU(gate)`, then back to the width of `x`."""
    gated, _, out = layer.net
    h = linear(g, x, gated.get_submodule("proj"))
    value, gate = g.split(h, 2, [h.size(-1) // 2] * 2)
    return linear(g, g.op("Mul", value, g.op("Gelu", gate)), out)
