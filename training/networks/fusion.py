"""The residual block of the autoencoder and the layer that fuses LR features into the decoder.

The fusion layer is the controllable feature wrapping of StableSR (Wang et al. 2023, Eq. 1), built from
residual blocks and residual-in-residual dense blocks (Wang et al. 2018, ESRGAN).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.networks import operators

RESIDUAL_SCALE = 0.2  # factor of the residual in dense blocks and in RRDBs
SLOPE = 0.2


def group_norm(channels: int, groups: int) -> nn.Module:
    """Return a GroupNorm with the epsilon of the published autoencoder, or the identity if `groups` is 0."""
    return nn.GroupNorm(groups, channels, eps=1e-6) if groups else nn.Identity()


class ResnetBlock(nn.Module):
    """Residual block without a timestep: [B, in, H, W] -> [B, out, H, W]."""

    shortcut_name = "nin_shortcut"

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.add_module(self.shortcut_name, nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]."""
        h = self.conv1(operators.group_norm(x, self.norm1, silu=True))
        h = self.conv2(operators.group_norm(h, self.norm2, silu=True))
        shortcut = getattr(self, self.shortcut_name, None)
        return h + (x if shortcut is None else shortcut(x))


class FusionResBlock(ResnetBlock):
    """A `ResnetBlock` with the parameter names of the published fusion layer."""

    shortcut_name = "conv_out"


class DenseBlock(nn.Module):
    """Five convolutions; the input of each is the block's input and the outputs of all before it."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(1, 6):
            out = growth if i < 5 else channels
            self.add_module(f"conv{i}", nn.Conv2d(channels + (i - 1) * growth, out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        features = [x]
        for i in range(1, 5):
            conv = self.get_submodule(f"conv{i}")
            features.append(F.leaky_relu(conv(torch.cat(features, dim=1)), SLOPE))
        return x + RESIDUAL_SCALE * self.get_submodule("conv5")(torch.cat(features, dim=1))


class RRDB(nn.Module):
    """Residual in residual dense block."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        return x + RESIDUAL_SCALE * self.rdb3(self.rdb2(self.rdb1(x)))


class FusionLayer(nn.Module):
    """`h + fidelity * fuse(cat(lr_features, h))`."""

    def __init__(self, channels: int, groups: int, blocks: int, growth: int) -> None:
        super().__init__()
        self.encode_enc_1 = FusionResBlock(2 * channels, channels, groups)
        self.encode_enc_2 = nn.Sequential(*(RRDB(channels, growth) for _ in range(blocks)))
        self.encode_enc_3 = FusionResBlock(channels, channels, groups)

    def forward(self, lr_features: Tensor, h: Tensor, fidelity: Tensor | float) -> Tensor:
        """Fuse `lr_features` [B, C, H, W] into decoder features `h` of the same shape."""
        fused = self.encode_enc_1(torch.cat((lr_features, h), dim=1))
        return h + fidelity * self.encode_enc_3(self.encode_enc_2(fused))
