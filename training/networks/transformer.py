"""The transformer of Stable Diffusion 2: self-attention, cross-attention to a text, gated feed-forward layer.

Module and parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.networks import operators
from moesr.training.networks.unet import ConditionedLayer, Conditions


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to tokens of another source."""

    def __init__(self, channels: int, source_channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_channels, channels, bias=False)
        self.to_v = nn.Linear(source_channels, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """Tokens `x` [B, L, C] attend to `source` [B, M, source_channels]; returns [B, L, C]."""
        projected = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in projected)
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """`value * GELU(gate)`; `value` and `gate` are linear functions of the input (Shazeer, 2020)."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, inner]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward layer, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = 4 * channels
        # The published layout has a dropout of rate 0 in the middle.
        self.net = nn.Sequential(GEGLU(channels, inner), nn.Identity(), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Pre-norm block: self-attention, attention to the text, feed-forward."""

    def __init__(self, channels: int, text_channels: int, head_channels: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(channels, channels, head_channels)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, text_channels, head_channels)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """Tokens [B, L, C] -> the same shape."""
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class TextTransformer(ConditionedLayer):
    """A transformer block over the H*W tokens of a feature map, residual."""

    def __init__(self, channels: int, text_channels: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, text_channels, head_channels)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, given: Conditions) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; `given` must have a text."""
        assert given.text is not None, "this network needs an encoded text"
        text = given.text.expand(len(x), -1, -1)
        h = self.proj_in(operators.group_norm(x, self.norm).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, text)
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)
