"""Layers that have kernels: plain PyTorch, and on CUDA the operators of `moesr.kernels.torch_ops`.

Networks call these functions, and nothing else asks where a tensor lies. Kernels are for inference: while
gradients are recorded layers are plain, whose backward is PyTorch's own, but for the frequency filter, whose
operator has a backward. Triton is imported by the first kernel that runs.
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
    """Whether kernels run where `x` lies."""
    return x.is_cuda and TRITON


def infers(x: Tensor) -> bool:
    """Whether kernels run where `x` lies, and no gradient is recorded."""
    return has_kernels(x) and not torch.is_grad_enabled()


def group_norm(x: Tensor, norm: nn.Module, silu: bool = False) -> Tensor:
    """GroupNorm (or the identity, as `norm` is) of [B, C, H, W], with SiLU after it."""
    if isinstance(norm, nn.GroupNorm) and infers(x):
        return torch_ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, silu, norm.eps)
    return F.silu(norm(x)) if silu else norm(x)


class NormSiLU(nn.Sequential):
    """GroupNorm and SiLU, which may be one operator, then other layers."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[B, C, H, W] -> what the layers make of it."""
        norm, _, *layers = self
        x = group_norm(x, norm, silu=True)
        for layer in layers:
            x = layer(x)
        return x


def aff_filter(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """`aff_filter.reference.aff_filter` of [B, C, H, W] in the type of x.

    Kernels that infer take half precision as it is, since the features are normalised; otherwise the filter
    runs in float32, as sums over an image may overflow half precision.
    """
    if infers(x):
        return torch_ops.aff_filter(x, w1, b1, w2, b2)
    form = torch_ops.aff_filter if has_kernels(x) else reference.aff_filter
    with torch.autocast(x.device.type, enabled=False):
        return form(x.float(), w1, b1, w2, b2).to(x.dtype)


def inverted_residual(x: Tensor, block: nn.Sequential, residual: bool) -> Tensor:
    """The convolutions of `block`, each with a BatchNorm, plus x where `residual`."""
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
    # Weights of a softmax sum to one, so the convolution after it may come before: one in place of two.
    matrix = out.weight.flatten(1)
    assert v.bias is not None
    weight, bias = matrix @ v.weight.flatten(1), F.linear(v.bias, matrix, out.bias)
    values = F.conv2d(h, weight[..., None, None], bias)
    heads = [x.flatten(2) for x in (q(h), k(h), values)]  # [B, C, H*W]
    last = heads[0].is_contiguous()  # not so where the image lies channels-last
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
    """The index, among `codes` [N, D], of the nearest to each latent of [B, D, h, w]: [B*h*w], rows first."""
    if infers(z):
        return torch_ops.vq_nearest(z, codes, codes)[1].flatten().long()
    flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).to(codes.dtype)
    # argmin |z - e|^2 without the term that does not depend on the code; half precision confuses codes
    with torch.autocast(z.device.type, enabled=False):
        return torch.argmin((codes * codes).sum(dim=1) - 2 * flat @ codes.t(), dim=1)
