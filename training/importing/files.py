"""Published weight files: pickled (or safetensors) state dicts, with or without a `state_dict` level."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moesr.training.importing import inert_pickle
from moesr.training.weights import CheckpointError, StateDict, brief

UNET_PREFIX = "model.diffusion_model."
AUTOENCODER_PREFIX = "first_stage_model."
CURE = "download the file again, or check that it is the right one for this option"
# torch.save writes zip files since PyTorch 1.6; older files are bare pickles and cannot be memory-mapped.
ZIP_MAGIC = b"PK\x03\x04"
SCHEDULE_BUFFER = re.compile(
    r"(log_one_minus_|sqrt_|sqrt_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(_prev)?"
    r"|posterior_(variance|log_variance_clipped|mean_coef1|mean_coef2)|betas|lvlb_weights|logvar|scale_factor"
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a published file; the level `state_dict` is skipped if there is one.

    No code from the pickle is run. Raises CheckpointError, naming the file, if it holds anything else.
    """
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); {CURE}") from error
    if not head:
        raise CheckpointError(f"{path}: the file is empty; {CURE}")
    if head.lstrip().startswith(b"<"):
        raise CheckpointError(f"{path}: holds a web page, not weights; {CURE}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {CURE}") from error
    loaded = _load_pickle(path, mmap=head.startswith(ZIP_MAGIC))
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(
            f"{path}: holds {type(loaded).__name__}, expected a state dict of tensors; {CURE}"
        )
    others = [
        str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        raise CheckpointError(f"{path}: entries {', '.join(others[:4])} are not tensors; {CURE}")
    return {key: tensor.detach() for key, tensor in loaded.items()}


def _load_pickle(path: Path, mmap: bool) -> Any:
    """Unpickle the tensors of a file; all other objects become placeholders and run no code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=mmap, pickle_module=inert_pickle)
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path}: not a whole PyTorch file ({brief(error)}); {CURE}") from error


def float32(state: StateDict) -> dict[str, Tensor]:
    """Convert the floating-point weights to float32."""
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def named(path: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; if it raises CheckpointError, the file's name is added to the message."""
    try:
        return function(*args)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; {CURE}") from error
