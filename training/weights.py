"""State dicts: the shapes that a configuration expects, strict checks, and the merge of space experts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moesr.runtime.errors import MoesrError
from moesr.training.config import ModelConfig, StableDiffusionConfig, StableSRConfig, VaeConfig
from moesr.training.networks import (
    Autoencoder,
    DecoderOnly,
    DenoisingUNet,
    StableSRUNet,
    StructureEncoder,
    TextEncoder,
)

CURE = "train or import the checkpoint again, or copy the whole directory again"
NAMED = 4  # keys named in one message

StateDict = Mapping[str, Tensor]
Network = TypeVar("Network", bound=nn.Module)


class CheckpointError(MoesrError):
    """A checkpoint directory or weight file is missing, damaged or not what its configuration says."""


def merge_space_experts(state: StateDict) -> dict[str, Tensor]:
    """Replace the FFNs of every Space MoE layer by their mean, `moe_blocks.0` (paper section 3.2).

    The mean is accumulated in float64 and returned in the dtype of the experts. The number of experts is
    arbitrary; a state dict that is merged already, or that has no experts, is returned unchanged. Raises
    CheckpointError if an expert lacks a tensor.
    """
    merged: dict[str, Tensor] = {}
    groups: dict[str, dict[int, Tensor]] = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"(.*moe_blocks)\.(\d+)\.(.+)", key):
            name = f"{match[1]}.0.{match[3]}"
            groups.setdefault(name, {})[int(match[2])] = tensor
            merged.setdefault(name, tensor)
        else:
            merged[key] = tensor
    count = max((len(same) for same in groups.values()), default=0)
    for name, same in groups.items():
        shapes = {tuple(t.shape) for t in same.values()}
        if sorted(same) != list(range(count)) or len(shapes) > 1:
            raise CheckpointError(
                f"{name}: space experts {sorted(same)} with shapes {sorted(shapes)}, expected 0..{count - 1} "
                "of one shape as in the other layers; the file is incomplete"
            )
        if count > 1:
            total = torch.zeros_like(same[0], dtype=torch.float64)
            for tensor in same.values():
                total += tensor
            merged[name] = (total / count).to(same[0].dtype)
    return merged


def networks(config: ModelConfig) -> dict[str, tuple[type[nn.Module], Any]]:
    """Return the class and the sizes of each network of a model, by name.

    The names are "expert" (absent if the model is only a decoder), "decoder", and for StableSR "structure"
    and "text", the two encoders.
    """
    parts: dict[str, tuple[type[nn.Module], Any]] = {}
    if isinstance(config, (StableSRConfig, StableDiffusionConfig)):
        parts["expert"] = StableSRUNet, config.unet
        if isinstance(config, StableSRConfig):
            parts["structure"] = StructureEncoder, config.structure
        parts["text"] = TextEncoder, config.text
    elif config.unet is not None:
        parts["expert"] = DenoisingUNet, config.unet
    whole = not isinstance(config, VaeConfig) or config.encoder
    return parts | {"decoder": (Autoencoder if whole else DecoderOnly, config.decoder)}


def expected_shapes(config: ModelConfig, where: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return keys and shapes of each network's state dict for a configuration, named as in `networks`."""
    try:
        built = {name: meta_network(kind, sizes) for name, (kind, sizes) in networks(config).items()}
    except (ValueError, RuntimeError, ArithmeticError, IndexError) as error:
        raise CheckpointError(
            f"{where}: these sizes make no network ({error}); correct the configuration, or the options "
            "--norm-groups and --head-channels of moesr-import"
        ) from error
    return {name: state_shapes(network.state_dict()) for name, network in built.items()}


def meta_network(kind: Callable[[Any], Network], sizes: Any) -> Network:
    """Build a network on the meta device: its weights have names and shapes but no memory."""
    with torch.device("meta"):
        return kind(sizes)


def state_shapes(state: StateDict) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a state dict."""
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def check_shapes(
    where: str, got: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], cure: str = CURE
) -> None:
    """Raise CheckpointError naming the first keys that are missing, unknown or of another shape."""
    wrong = [k for k in expected if k in got and got[k] != expected[k]]
    kinds = {
        "missing": [k for k in expected if k not in got],
        "unknown": [k for k in got if k not in expected],
        "misshapen": [f"{k} {got[k]} (expected {expected[k]})" for k in wrong],
    }
    problems = []
    for kind, keys in kinds.items():
        if keys:
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            problems.append(f"{kind} {', '.join(keys[:NAMED])}{more}")
    if problems:
        raise CheckpointError(f"{where}: {'; '.join(problems)}; {cure}")


def with_counters(state: StateDict, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Add counters of BatchNorm layers that a file lacks; they count training steps and change no result."""
    counters = (key for key in expected if key.endswith(".num_batches_tracked") and key not in state)
    return {**state, **{key: torch.zeros((), dtype=torch.int64) for key in counters}}


def check_finite(where: str, state: StateDict, cure: str) -> None:
    """Raise CheckpointError naming the first tensor that holds an infinity or a NaN."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not _is_finite(tensor):
            raise CheckpointError(f"{where}: {key} is not finite; {cure}")


def _is_finite(tensor: Tensor) -> bool:
    """Return True if all elements are finite: their minimum and maximum are NaN if any element is NaN."""
    return all(math.isfinite(bound) for bound in map(float, torch.aminmax(tensor)))


def brief(error: Exception) -> str:
    """Return the first sentence of an error's message, without PyTorch's advice to unpickle unsafely."""
    text = str(error).strip() or type(error).__name__
    return re.split(r"\. |\.?\n", text, maxsplit=1)[0]
