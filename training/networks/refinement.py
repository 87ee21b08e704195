"""The refinement network: a small UNet of AFF blocks after the decoder's last level (paper section 3.3).

AFF is the adaptive frequency filter of Huang et al. (2023): the mask that filters a spectrum is computed from
this spectrum. Its reference implementation is in `moesr.kernels`, next to the kernels that are tested against
it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.networks import operators

SLOPE = 0.1  # negative slope of every LeakyReLU outside the filter


class AFFFilter(nn.Module):
    """Adaptive frequency filter: two complex block-diagonal layers compute a mask for the spectrum."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        size = channels // blocks
        scale = 0.02
        self.w1 = nn.Parameter(scale * torch.randn(2, blocks, size, size))  # (real, imaginary)
        self.b1 = nn.Parameter(scale * torch.randn(2, blocks, size))
        self.w2 = nn.Parameter(scale * torch.randn(2, blocks, size, size))
        self.b2 = nn.Parameter(scale * torch.randn(2, blocks, size))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W], the filtered features plus the input; W must be even."""
        return operators.aff_filter(x, self.w1, self.b1, self.w2, self.b2)


class ConvNorm(nn.Module):
    """Convolution and BatchNorm, with a LeakyReLU unless `act` is false."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, groups: int = 1, act: bool = True
    ) -> None:
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, groups=groups, bias=False)
        layers = {"conv": conv, "norm": nn.BatchNorm2d(out_channels)}
        self.block = nn.Sequential()
        for name, layer in layers.items():
            self.block.add_module(name, layer)
        if act:
            self.block.add_module("act", nn.LeakyReLU(SLOPE))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]."""
        return self.block(x)


class InvertedResidual(nn.Module):
    """Expand by four, depthwise 3x3, reduce; residual if the numbers of channels are equal."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = in_channels == out_channels
        inner = 4 * in_channels
        self.block = nn.Sequential()
        self.block.add_module("exp_1x1", ConvNorm(in_channels, inner, 1))
        self.block.add_module("conv_3x3", ConvNorm(inner, inner, 3, groups=inner))
        self.block.add_module("red_1x1", ConvNorm(inner, out_channels, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]."""
        return operators.inverted_residual(x, self.block, self.residual)


class AFFBlock(nn.Module):
    """An inverted residual followed by the frequency filter; both mix tokens."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, filter_blocks: int | None) -> None:
        super().__init__()
        groups = groups or 1  # the filter needs a normalized input even if `groups` is 0
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.mlp = InvertedResidual(in_channels, out_channels)
        self.up_dim = nn.Conv2d(in_channels, out_channels, 1)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.filter = nn.Identity() if filter_blocks is None else AFFFilter(out_channels, filter_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]."""
        h = self.mlp(operators.group_norm(x, self.norm1)) + self.up_dim(x)
        filtered = self.filter(operators.group_norm(h, self.norm2))
        return filtered + h  # in this order, so that the sum has the filter's memory layout


class RefinementUNet(nn.Module):
    """UNet of nine blocks at 1, 1/2 and 1/4 of the sides; `filter_blocks` None leaves the filter out."""

    def __init__(self, channels: int, groups: int, filter_blocks: int | None) -> None:
        super().__init__()
        c1, c2 = channels, 2 * channels

        def block(cin: int, cout: int) -> AFFBlock:
            return AFFBlock(cin, cout, groups, filter_blocks)

        def up(cin: int, cout: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(cin, 4 * cout, 1), nn.PixelShuffle(2))

        self.conv1, self.conv2, self.conv3 = block(c1, c1), block(c1, c2), block(c2, c2)
        self.context_refine = nn.Sequential(*(block(c2, c2) for _ in range(4)))
        self.up3, self.up_conv3 = up(c2, c2), block(2 * c2, c2)
        self.up2, self.up_conv2 = up(c2, c1), block(2 * c1, c1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]; H and W must be multiples of 4."""
        full = self.conv1(x)
        half = self.conv2(F.max_pool2d(full, 2))
        quarter = self.context_refine(self.conv3(F.max_pool2d(half, 2)))
        half = self.up_conv3(torch.cat((half, self.up3(quarter)), dim=1))
        return self.up_conv2(torch.cat((full, self.up2(half)), dim=1))
