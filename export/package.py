"""Checkpoint to engine directory: write every graph, prove it, hash it, publish the whole by a rename."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import metadata, resources
from pathlib import Path

import torch

from moesr.export import parity
from moesr.export.decoder import decoder_graph
from moesr.export.expert import expert_graph
from moesr.export.graph import OPSET
from moesr.export.graph import Graph as BuiltGraph
from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.manifest import MANIFEST_NAME, Expert, Graph, Manifest, Parity, sha256_of
from moesr.runtime.upscaler import demo_name
from moesr.training.checkpoint import Checkpoint
from moesr.training.config import ModelConfig
from moesr.training.networks import Autoencoder, DenoisingUNet

DEFAULT_TILE_PX = 512
VERSIONED = ("moesr", "torch", "onnx", "onnxruntime", "numpy")

OnStage = Callable[[str], None]


def checkpoint_directory(checkpoint: Path | None = None) -> Path:
    """Directory of a checkpoint given as a path or by the name of a bundled one; None is the x4 demo."""
    name = demo_name(checkpoint)
    if name is None:
        return Path(str(checkpoint))
    directory = Path(str(resources.files("moesr.training"))) / "demo_checkpoints" / name
    if not (directory / "config.json").is_file():
        raise UsageError(
            f"this installation has no demo checkpoint (expected at {directory}); "
            "name a checkpoint directory: moesr-export CHECKPOINT"
        )
    return directory


def tile_multiple(config: ModelConfig) -> int:
    """Output pixels that a tile's side must be a multiple of."""
    latent = config.decoder.factor * (config.unet.factor if config.unet else 1)
    # the refinement network halves the image twice, and its real DFT needs an even width
    return latent if config.decoder.refinement == "none" else math.lcm(latent, 8)


def check_tile(config: ModelConfig, tile_px: int) -> None:
    """Raise UsageError, naming the valid neighbours, where the model cannot have tiles of this side."""
    step = tile_multiple(config)
    if tile_px < step or tile_px % step:
        below = max(step, tile_px // step * step)
        near = f"{below} or {below + step}" if tile_px > step else f"{step}"
        raise UsageError(
            f"--tile {tile_px}: expected a positive multiple of {step} px for {config.name}; try {near}"
        )


def stage_count(config: ModelConfig) -> int:
    """How many times `export_engine` reports a stage."""
    return 2 * (len(config.expert_ranges) + 1) + 1


@torch.inference_mode()
def export_engine(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    precision: str = "fp32",
    tile_px: int = DEFAULT_TILE_PX,
    force: bool = False,
    on_stage: OnStage = lambda stage: None,
) -> Manifest:
    """Write the engine directory of a checkpoint and return its manifest.

    The same checkpoint gives the same graphs. `precision` is "fp32" or "fp16". `on_stage` hears what begins.
    An existing directory is refused unless `force`, which replaces an engine and nothing else. Raises
    UsageError for a tile or a model that cannot be, ParityError where a graph misses its network, OutputError
    where nothing can be written; each leaves the place as it was.
    """
    config = checkpoint.config
    if config.unet is None:
        raise UsageError(
            f"{checkpoint.directory}: holds a decoder on its own; an engine needs sampling experts too"
        )
    check_tile(config, tile_px)
    check_replaceable(directory, force)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            manifest = _write_engine(checkpoint, new, precision, tile_px, on_stage)
            on_stage("publish")
            publish(new, directory, Path(scratch) / "old")
    except OSError as error:
        raise OutputError(f"{directory}: cannot write the engine: {error}") from error
    return manifest


def _write_engine(
    checkpoint: Checkpoint, directory: Path, precision: str, tile_px: int, on_stage: OnStage
) -> Manifest:
    """Write all files of an engine into an empty directory."""
    config, half = checkpoint.config, precision == "fp16"
    latent_px = tile_px // config.decoder.factor
    writer = _Writer(directory, precision, on_stage)
    experts: list[Expert] = []
    for k, t_range in enumerate(config.expert_ranges):
        unet = checkpoint.expert(k)
        inputs = parity.expert_inputs(unet, latent_px, t_range)
        written = writer.write(f"expert_{k}", unet, partial(expert_graph, unet, latent_px, half), inputs)
        experts.append(Expert(written.file, written.sha256, *t_range))
    autoencoder = checkpoint.decoder()
    inputs = parity.decoder_inputs(autoencoder, latent_px)
    decoder = writer.write(
        "decoder", autoencoder, partial(decoder_graph, autoencoder, latent_px, half), inputs
    )
    manifest = Manifest(
        name=config.name,
        model=config.to_dict(),
        scale=config.scale,
        tile=tile_px,
        latent_channels=config.decoder.embed_dim,
        latent_factor=config.decoder.factor,
        precision=precision,
        experts=tuple(experts),
        decoder=decoder,
        schedule=config.schedule,
        sampler=config.sampler,
        steps=config.steps,
        params=writer.params,
        macs=writer.macs,
        versions={name: metadata.version(name) for name in VERSIONED} | {"opset": str(OPSET)},
        checkpoint_sha256=checkpoint.sha256(),
        parity=writer.proofs,
    )
    manifest.write(directory)
    return manifest


class _Writer:
    """Writes graphs one by one and keeps what the manifest says of them."""

    def __init__(self, directory: Path, precision: str, on_stage: OnStage) -> None:
        self._directory, self._precision, self._on_stage = directory, precision, on_stage
        self.params: dict[str, int] = {}
        self.macs: dict[str, int] = {}
        self.proofs: dict[str, Parity] = {}

    def write(
        self,
        name: str,
        network: DenoisingUNet | Autoencoder,
        build: Callable[[], BuiltGraph],
        inputs: parity.Inputs,
    ) -> Graph:
        """Write the graph of a network, then prove it."""
        self._on_stage(f"write {name}")
        built, path = build(), self._directory / f"{name}.onnx"
        path.write_bytes(built.model.SerializeToString(deterministic=True))
        kind = name.partition("_")[0]  # all experts are alike
        self.params[kind], self.macs[kind] = sum(p.numel() for p in network.parameters()), built.macs
        self._on_stage(f"prove {name}")
        self.proofs[name] = parity.prove(path, network, inputs, self._precision)
        return Graph(path.name, sha256_of(path))


def check_replaceable(directory: Path, force: bool) -> None:
    """Raise OutputError where `directory` may not be replaced: without `force`, or if it is no engine."""
    if not directory.exists() and not directory.is_symlink():
        return
    if not force:
        raise OutputError(
            f"{directory}: exists; choose another directory with -o, or replace it with --force"
        )
    if directory.is_symlink() or not directory.is_dir():
        raise OutputError(f"{directory}: is not a directory; choose another one with -o")
    if any(directory.iterdir()) and not (directory / MANIFEST_NAME).is_file():
        raise OutputError(
            f"{directory}: holds files but no {MANIFEST_NAME}, so it is no engine; choose another one with -o"
        )


def publish(new: Path, directory: Path, old: Path) -> None:
    """Rename `new` to `directory`; what was there moves to `old`, and back should the second rename fail."""
    if not directory.exists():
        new.rename(directory)
        return
    directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
