"""Count the multiply-accumulates (MACs) of networks from their layers as they run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moesr.training.networks import SpaceMoE
from moesr.training.networks.autoencoder import AttnBlock, VectorQuantiser
from moesr.training.networks.refinement import AFFFilter
from moesr.training.networks.text import CausalAttention
from moesr.training.networks.transformer import CrossAttention
from moesr.training.networks.unet import AttentionBlock

PAPER_KINDS = ("conv", "linear")

Counts = Counter[tuple[str, str]]  # (module name, kind) -> MACs
Rule = Callable[[nn.Module, tuple[Tensor, ...], Tensor], dict[str, int]]  # module, inputs, output -> by kind


def count(network: nn.Module, call: Callable[[], object], of: Rule | None = None) -> Counts:
    """Count the MACs of `call`, which runs `network`, by module name and kind of operation.

    `of` returns the MACs of a module itself, without those of its submodules (None: the rules of this file).
    """
    of = of or _macs
    counts: Counts = Counter()

    def hook(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            for kind, macs in of(module, inputs, output).items():
                counts[name, kind] += macs

        return add

    handles = [m.register_forward_hook(hook(name)) for name, m in network.named_modules()]
    with torch.no_grad():
        call()
    for handle in handles:
        handle.remove()
    return counts


def layer_norms(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> dict[str, int]:
    """Count LayerNorms as the tool `thop` does: four operations per element."""
    return {"layer norm": 4 * output.numel()} if isinstance(module, nn.LayerNorm) else {}


def _macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> dict[str, int]:
    """Return the MACs of a module itself, without those of its submodules."""
    x = inputs[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return {"conv": output.numel() * module.weight[0].numel()}
    if isinstance(module, nn.Linear):
        return {"linear": output.numel() * module.in_features}
    if isinstance(module, SpaceMoE):  # one merged FFN over the tokens; its layers are not called as modules
        tokens = x.numel() // x.shape[1]
        return {"linear": tokens * sum(w.numel() for w in module.mean_weights() if w.ndim == 2)}
    if isinstance(module, (AttentionBlock, AttnBlock)):  # q k^T, and its product with v
        return {"attention": 2 * x.numel() * math.prod(x.shape[2:])}
    if isinstance(module, CrossAttention):
        return {"attention": 2 * x.numel() * inputs[1].shape[1]}
    if isinstance(module, CausalAttention):
        tokens = x.numel() // x.shape[-1]
        products = {"linear": tokens * module.in_proj_weight.numel()}
        return products | {"attention": 2 * x.numel() * x.shape[1]}
    if isinstance(module, VectorQuantiser):
        return {"codebook": x.numel() * module.embedding.num_embeddings}
    if isinstance(module, AFFFilter):
        batch, channels, height, width = x.shape
        points, bins = height * width, height * (width // 2 + 1)
        layers = sum(w.numel() for w in (module.w1, module.w2))  # real and imaginary, each used twice
        transforms = 2 * batch * channels  # forward and inverse
        return {
            "filter": 2 * batch * bins * layers,
            "fft": round(transforms * 5 * points * math.log2(points) / 2),
        }
    return {}


def total(counts: Counts, kinds: Sequence[str] | None = None, under: str = "") -> int:
    """Sum the MACs of the given kinds (None: all) over modules whose name starts with `under`."""
    return sum(
        n for (name, kind), n in counts.items() if name.startswith(under) and (not kinds or kind in kinds)
    )
