"""The checkpoint directory, which training and import write and the export reads.

Its files are `config.json` (the model's configuration and a schema number), one `expert_{k}.safetensors` per
sampling expert (a denoising UNet with merged space experts; expert 0 serves the lowest noise) and
`decoder.safetensors` (the autoencoder). A checkpoint of StableSR also holds `structure.safetensors` and
`text.safetensors` (the structure and the text encoder), one of Stable Diffusion only the text encoder. A
directory is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.system.files import check_replaceable, new_directory, reason
from moesr.runtime.system.json_dataclass import build, read_json
from moesr.training.config import ModelConfig, StableDiffusionConfig, StableSRConfig, VaeConfig
from moesr.training.networks import (
    Autoencoder,
    DecoderOnly,
    DenoisingUNet,
    StableSRUNet,
    StructureEncoder,
    TextEncoder,
)
from moesr.training.weights import (
    CURE,
    CheckpointError,
    StateDict,
    check_finite,
    check_shapes,
    expected_shapes,
    merge_space_experts,
    meta_network,
    networks,
    state_shapes,
)

SCHEMA = 1
CONFIG_NAME, CONFIG_BYTES = "config.json", 1 << 20
OURS = r"config\.json|(expert_\d+|decoder|structure|text)\.safetensors"  # names of a checkpoint's files
FAMILIES: dict[str | None, type[ModelConfig]] = {
    None: ModelConfig,
    "stablesr": StableSRConfig,
    "stable-diffusion": StableDiffusionConfig,
    "autoencoder": VaeConfig,
}

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory. `config.unet.space_experts` is 1 (merged) or 0 (no Space MoE)."""

    directory: Path
    config: ModelConfig

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the checkpoint: the configuration, the experts in order, the decoder."""
        return tuple(self.directory / name for name in file_names(self.config))

    def expert(self, k: int) -> DenoisingUNet:
        """Return sampling expert `k` in evaluation mode, float32, on the CPU."""
        count = expert_count(self.config)
        if not 0 <= k < count:
            raise CheckpointError(f"{self.directory}: no expert {k}; the checkpoint holds {count} experts")
        return self._load(DenoisingUNet, "expert", expert_name(k))

    def decoder(self) -> Autoencoder:
        """Return the autoencoder in evaluation mode, float32, on the CPU."""
        return self._load(Autoencoder, "decoder")

    def _load(self, kind: type[Kind], part: str, file: str | None = None) -> Kind:
        """Load the network called `part`; CheckpointError if it is not of the class `kind`."""
        got, sizes = networks(self.config)[part]
        if got is not kind:
            raise CheckpointError(
                f"{self.directory}: its {part} is a {got.__name__}, expected a {kind.__name__}; this is a "
                f"checkpoint of another family of models ({type(self.config).__name__})"
            )
        return _load_network(kind, sizes, self.directory / (file or f"{part}.safetensors"))

    def sha256(self) -> str:
        """Return a hexadecimal hash of the names and contents of the checkpoint's files only."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                total.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n".encode())
        return total.hexdigest()


class StableDiffusionCheckpoint(Checkpoint):
    """An opened checkpoint directory of Stable Diffusion. Every call reads its network from disk again."""

    def unet(self) -> StableSRUNet:
        """Return the denoising UNet in evaluation mode, float32, on the CPU."""
        return self._load(StableSRUNet, "expert", expert_name(0))

    def text(self) -> TextEncoder:
        """Return the text encoder in evaluation mode, float32, on the CPU."""
        return self._load(TextEncoder, "text")


class StableSRCheckpoint(StableDiffusionCheckpoint):
    """An opened checkpoint directory of StableSR. Every call reads its network from disk again."""

    config: StableSRConfig

    def structure(self) -> StructureEncoder:
        """Return the structure encoder in evaluation mode, float32, on the CPU."""
        return self._load(StructureEncoder, "structure")


class VaeCheckpoint(Checkpoint):
    """An opened checkpoint directory of the autoencoder of a text-to-image model."""

    config: VaeConfig

    def decoder(self) -> Autoencoder:
        """Return the autoencoder in evaluation mode; without `config.encoder` it can only decode."""
        return self._load(Autoencoder if self.config.encoder else DecoderOnly, "decoder")


KINDS: dict[type[ModelConfig], type[Checkpoint]] = {
    ModelConfig: Checkpoint,
    StableSRConfig: StableSRCheckpoint,
    StableDiffusionConfig: StableDiffusionCheckpoint,
    VaeConfig: VaeCheckpoint,
}


def expert_name(k: int) -> str:
    """Return the file name of sampling expert `k`."""
    return f"expert_{k}.safetensors"


def expert_count(config: ModelConfig) -> int:
    """Return the number of sampling experts of a model; 0 if the model is only a decoder."""
    return 0 if config.unet is None else len(config.expert_ranges)


def file_names(config: ModelConfig) -> list[str]:
    """Return the file names of a checkpoint of this configuration, in a fixed order."""
    others = [f"{part}.safetensors" for part in networks(config) if part != "expert"]
    return [CONFIG_NAME, *(expert_name(k) for k in range(expert_count(config))), *others]


def load_checkpoint(directory: Path) -> Checkpoint:
    """Open a checkpoint directory and check every file's keys and shapes; tensors are read on demand.

    Raises CheckpointError naming the file at fault, its first missing and unknown keys, and the cure.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory}: not a directory; expected a checkpoint directory with {CONFIG_NAME}"
        )
    config = _read_config(directory / CONFIG_NAME)
    checkpoint = KINDS[type(config)](directory, config)
    expected = expected_shapes(config, str(directory / CONFIG_NAME))
    for path in checkpoint.files[1:]:
        check_shapes(str(path), _stored_shapes(path), expected[path.stem.split("_")[0]])
    return checkpoint


def save_checkpoint(
    directory: Path,
    config: ModelConfig,
    experts: Iterable[StateDict],
    decoder: StateDict,
    *,
    others: Iterable[tuple[str, StateDict]] = (),
    force: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Write a checkpoint directory and return it opened.

    `experts` yields one state dict per expert, lowest noise first. They are consumed one at a time, so a
    generator keeps only one in memory. `others` yields further networks by name ("structure" and "text" of
    StableSR) in the same way. Space experts are merged before they are written. `dtype` (float32 or float16)
    is the type of the stored floating-point tensors; they load as float32. An existing directory is refused
    unless `force` is set, which replaces a checkpoint and nothing else. Raises OutputError if the directory
    cannot be written and CheckpointError if the weights do not fit the configuration; after either error the
    directory is unchanged.
    """
    directory = Path(directory)
    if config.unet is not None:
        unet = dataclasses.replace(config.unet, space_experts=min(config.unet.space_experts, 1))
        config = dataclasses.replace(config, unet=unet)
    try:
        with new_directory(directory, force=force, marker=CONFIG_NAME, only=OURS) as new:
            _write_files(new, config, experts, chain(others, [("decoder", decoder)]), dtype)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{directory}: cannot write the checkpoint: {reason(error)}") from error
    return load_checkpoint(directory)


def _write_files(
    new: Path,
    config: ModelConfig,
    experts: Iterable[StateDict],
    others: Iterable[tuple[str, StateDict]],
    dtype: torch.dtype,
) -> None:
    """Write a checkpoint's files to the empty directory `new`."""
    expected = expected_shapes(config, "the configuration")
    count, written = expert_count(config), 0
    for written, state in enumerate(experts, 1):
        if written > count:
            raise CheckpointError(
                f"got more than {count} experts, expected one per range {config.expert_ranges}"
            )
        name = expert_name(written - 1)
        _write_state(new / name, merge_space_experts(state), expected["expert"], dtype)
    if written < count:
        raise CheckpointError(
            f"got {written} experts, expected {count}: one per range {config.expert_ranges}"
        )
    names = {part for part in expected if part != "expert"}
    for part, state in others:
        if part not in names:
            raise CheckpointError(f"got weights of {part!r}, expected those of {', '.join(sorted(names))}")
        names.remove(part)
        _write_state(new / f"{part}.safetensors", state, expected[part], dtype)
    if names:
        raise CheckpointError(f"got no weights of {', '.join(sorted(names))}, which {config.name} needs")
    values = {"schema": SCHEMA, **config.to_dict()}
    (new / CONFIG_NAME).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _read_config(path: Path) -> ModelConfig:
    """Read and check `config.json`."""
    try:
        values = read_json(path, CONFIG_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {path.parent} is not a checkpoint directory") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); {CURE}") from error
    schema = values.pop("schema", None) if isinstance(values, dict) else None
    if type(schema) is not int or schema != SCHEMA:
        raise CheckpointError(f"{path}: schema is {schema!r}, this version reads {SCHEMA}; {CURE}")
    kind = FAMILIES.get(values.get("family"))
    if kind is None:
        known = ", ".join(filter(None, FAMILIES))
        raise CheckpointError(
            f"{path}: family is {values['family']!r}, this version reads {known} and models without that "
            "entry; upgrade moesr"
        )
    try:
        config = build(kind, values, strict=True)
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}; {CURE}") from error
    if config.unet is not None and config.unet.space_experts not in (0, 1):
        raise CheckpointError(
            f"{path}: unet.space_experts is {config.unet.space_experts}, expected 1 (merged) or 0; {CURE}"
        )
    return config


def _stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the keys and shapes of a safetensors file; reads its header only."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {CURE}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {CURE}") from error


def _load_network(kind: type[Kind], sizes: Any, path: Path) -> Kind:
    """Build a network of these sizes and fill it, strictly, from a safetensors file."""
    network = meta_network(kind, sizes)
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); {CURE}") from error
    check_shapes(str(path), state_shapes(state), state_shapes(network.state_dict()))
    check_finite(str(path), state, CURE)
    for key, tensor in state.items():  # one at a time, so that each float16 tensor is freed once converted
        state[key] = tensor.float() if tensor.is_floating_point() else tensor
    network.load_state_dict(state, strict=True, assign=True)
    return network.eval()


def _write_state(
    path: Path, state: StateDict, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Check a state dict and write it with its floating-point tensors in `dtype`."""
    check_shapes(
        f"weights for {path.name}",
        state_shapes(state),
        expected,
        "the configuration describes another network",
    )
    stored: dict[str, Tensor] = {}
    for key, tensor in state.items():
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        # Cloned because safetensors refuses tensors that share memory or are views of larger tensors.
        stored[key] = kept.clone(memory_format=torch.contiguous_format)
    check_finite(f"weights for {path.name} as {dtype}", stored, "store them in float32 or train again")
    save_file(stored, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes files that only their owner can read


def check_writable_as_checkpoint(directory: Path, force: bool) -> None:
    """Raise OutputError if `directory` exists and may not be replaced by a checkpoint."""
    check_replaceable(directory, force=force, marker=CONFIG_NAME, only=OURS)
