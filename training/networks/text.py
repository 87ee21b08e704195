"""The text tower of OpenCLIP's ViT-H/14 as in Stable Diffusion 2: all tokens of the penultimate layer.

Module and parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from moesr.training.config import TextConfig


class CausalAttention(nn.Module):
    """Multi-head self-attention in which a token attends to itself and the tokens before it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # [B, heads, L, C / heads] each
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Feed-forward layer, four times as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(channels, 4 * channels)
        self.c_proj = nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class TextBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.attn = CausalAttention(channels, heads)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The transformer blocks; the last one is in the published weights but is not run."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(config.width, config.heads) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        for block in self.resblocks[:-1]:
            x = block(x)
        return x


class Tower(nn.Module):
    """Embeddings, blocks and final norm, and CLIP's projection, which is stored but not used."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width = config.width
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(config.tokens, width))
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.transformer = Transformer(config)
        self.token_embedding = nn.Embedding(config.vocabulary, width)
        self.ln_final = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, tokens] -> [B, tokens, width]."""
        x = self.token_embedding(ids) + self.positional_embedding
        return self.ln_final(self.transformer(x))


class TextEncoder(nn.Module):
    """Encodes prompts, given as token ids, for the attention of the UNet's transformers."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Tower(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids int64 [B, tokens], with start and end token and padding -> [B, tokens, width]."""
        return self.model(ids)

    def encode(self, prompt: Sequence[int]) -> Tensor:
        """Encode one prompt, token ids from start to end token, padded here with 0 -> [1, tokens, width]."""
        ids = torch.zeros(1, self.config.tokens, dtype=torch.int64)
        ids[0, : len(prompt)] = torch.tensor(prompt)
        return self(ids)
