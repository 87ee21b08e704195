"""Layers with two implementations: plain PyTorch, and on CUDA the operators of `moesr.kernels.torch_ops`.

Networks call these functions; only this module depends on a tensor's device. Kernels are for inference: while
gradients are recorded the layers are plain PyTorch, except for the frequency filter, whose operator has a
backward pass. Triton is imported when the first kernel runs.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.kernels import torch_ops
from moesr.kernels.aff_filter import reference
from moesr.kernels.inverted_residual.reference import fold

TRITON = find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Return True if kernels can run on the device of `x`."""
    return x.is_cuda and TRITON


def infers(x: Tensor) -> bool:
    """Return True if kernels can run on the device of `x` and no gradient is recorded."""
    return has_kernels(x) and not torch.is_grad_enabled()


def group_norm(x: Tensor, norm: nn.Module, silu: bool = False) -> Tensor:
    """Apply `norm`, a GroupNorm or the identity, to [B, C, H, W], and SiLU after it if `silu` is set."""
    if isinstance(norm, nn.GroupNorm) and infers(x):
        return torch_ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, silu, norm.eps)
    return F.silu(norm(x)) if silu else norm(x)


class NormSiLU(nn.Sequential):
    """GroupNorm and SiLU, which may run as one operator, followed by other layers."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Run the layers on [B, C, H, W]."""
        norm, _, *layers = self
        x = group_norm(x, norm, silu=True)
        for layer in layers:
            x = layer(x)
        return x


def aff_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Apply `aff_filter.reference.aff_filter` to [B, C, H, W] and return the dtype of x.

    In inference the kernels accept half precision, since the features are normalized. Otherwise the filter
    runs in float32, because sums over an image may overflow half precision.
    """
    if infers(x):
        return torch_ops.aff_filter(x, w1, b1, w2, b2)
    form = torch_ops.aff_filter if has_kernels(x) else reference.aff_filter
    with torch.autocast(x.device.type, enabled=False):
        return form(x.float(), w1, b1, w2, b2).to(x.dtype)


def inverted_residual(x: Tensor, block: nn.Sequential, residual: bool) -> Tensor:
    """Run the convolutions of `block`, each with a BatchNorm, and add x if `residual` is set."""
    if infers(x) and not block.training:
        folded = (fold(layer.block.conv.weight, layer.block.norm) for layer in block)  # type: ignore[union-attr]
        (expand, b1), (depthwise, b2), (reduce, b3) = folded
        weights = expand.flatten(1), b1, depthwise.squeeze(1), b2, reduce.flatten(1), b3
        return torch_ops.inverted_residual(x, *weights)
    return x + block(x) if residual else block(x)


def spatial_attention(h: Tensor, q: nn.Conv2d, k: nn.Conv2d, v: nn.Conv2d, out: nn.Conv2d) -> Tensor:
    """Single-head self-attention over the positions of [B, C, H, W], by four 1x1 convolutions."""
    if not infers(h):
        heads = (layer(h).flatten(2).transpose(1, 2)[:, None] for layer in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads)[:, 0]  # [B, H*W, C]
        return out(mixed.transpose(1, 2).reshape(h.shape))
    # The softmax weights sum to one, so the output convolution can be merged into that of the values.
    matrix = out.weight.flatten(1)
    assert v.bias is not None
    weight, bias = matrix @ v.weight.flatten(1), F.linear(v.bias, matrix, out.bias)
    values = F.conv2d(h, weight[..., None, None], bias)
    heads = [x.flatten(2) for x in (q(h), k(h), values)]  # [B, C, H*W]
    last = heads[0].is_contiguous()  # false for channels-last images
    mixed = torch_ops.attention(*(x if last else x.mT for x in heads), h.shape[1] ** -0.5, last)
    return (mixed if last else mixed.mT).unflatten(2, h.shape[2:])


def packed_attention(qkv: Tensor) -> Tensor:
    """Self-attention of [B, heads, 3 (q, k, v), width, tokens] -> [B, heads * width, tokens]."""
    if infers(qkv):
        mixed = torch_ops.attention_packed(qkv.flatten(0, 1), qkv.shape[3] ** -0.5)
        return mixed.reshape(len(qkv), -1, qkv.shape[-1])
    q, k, v = qkv.transpose(-1, -2).unbind(2)  # [B, heads, tokens, width] each
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
    return mixed.reshape(len(qkv), -1, qkv.shape[-1])


def nearest_code(z: Tensor, codes: Tensor) -> Tensor:
    """Return the index of the nearest of `codes` [N, D] to each latent of [B, D, h, w]: [B*h*w]."""
    if infers(z):
        return torch_ops.vq_nearest(z, codes, codes)[1].flatten().long()
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(codes.dtype)
    # argmin |z - e|^2 without |z|^2, in float32: half precision cannot tell close codes apart.
    with torch.autocast(z.device.type, enabled=False):
        return torch.argmin((codes * codes).sum(dim=1) - 2 * flat @ codes.t(), dim=1)
