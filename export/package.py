"""From a checkpoint to an engine directory: every graph is written, hashed and proved, then published.

The directory is published by a rename, so that it is whole or absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moesr.export import parity, stablesr_engine, vae_engine
from moesr.export.graph_writer import Build, GraphWriter, OnStage
from moesr.export.graphs.builder import onnx_versions
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.expert import expert_graph, shallow_graph
from moesr.export.lowering import Lowering
from moesr.export.options import ExportOptions
from moesr.export.polygraphy_data import write_script
from moesr.export.preview import preview_map
from moesr.export.prompts import PromptOptions, Prompts, choose
from moesr.export.quantisation.calibration import Recording, record
from moesr.export.quantisation.int8 import Make, int8_graph
from moesr.export.reuse import DeepFeatures, ShallowExpert, check_blocks, recorded, shallow_inputs, shared
from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.graph_spec import Expert, Graph
from moesr.runtime.engine.locate import demo_name
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, write_manifest
from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.system import files
from moesr.training.checkpoint import Checkpoint, StableSRCheckpoint, VaeCheckpoint
from moesr.training.config import ModelConfig, StableSRConfig, VaeConfig

DEFAULT_TILE_PX = 512
DEFAULTS = ExportOptions()
VERSIONED = ("moesr", "torch", "onnx", "onnxruntime", "numpy")


def checkpoint_directory(checkpoint: Path | None = None) -> Path:
    """Return the directory of a checkpoint that is given by path or by a demo's name; None is demo-x4."""
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


def check_tile(config: ModelConfig, tile_px: int) -> None:
    """Raise UsageError, naming the nearest valid sizes, if the model cannot have tiles of this side."""
    step = config.tile_multiple
    if tile_px < step or tile_px % step:
        below = max(step, tile_px // step * step)
        near = f"{below} or {below + step}" if tile_px > step else f"{step}"
        raise UsageError(
            f"--tile {tile_px}: expected a positive multiple of {step} px for {config.name}; try {near}"
        )


def stage_count(config: ModelConfig, options: ExportOptions = DEFAULTS) -> int:
    """Return how many stages `export_engine` reports at most."""
    graphs = len(config.expert_ranges) * (1 + (options.reuse is not None)) + 1
    graphs += isinstance(config, StableSRConfig)
    graphs = len(vae_engine.roles(config)) if isinstance(config, VaeConfig) else graphs
    plain = sum(not choices.kernels for choices in options.lowerings().values())
    calibrating = 2 * graphs * (options.precision == "int8")
    return graphs * (1 + 2 * plain) + 1 + 2 * options.kernels + calibrating + options.preview


@torch.inference_mode()
def export_engine(
    checkpoint: Checkpoint,
    directory: Path,
    options: ExportOptions = DEFAULTS,
    *,
    photographs: Sequence[np.ndarray] = (),
    force: bool = False,
    on_stage: OnStage = lambda stage: None,
) -> Manifest:
    """Write the engine directory of a checkpoint and return its manifest.

    The same checkpoint and options give the same graphs. int8 is calibrated on `photographs`, uint8 RGB
    [H, W, 3], except for the last one, on which it is proved. `on_stage` is called with the name of each
    stage when it begins. An existing directory is refused unless `force`, which replaces an engine and
    nothing else.

    Raises UsageError if the model does not support an option, ParityError if a graph misses its network's
    result, and OutputError if the directory cannot be written. Each error leaves the directory as it was.
    """
    check_model(checkpoint, options)
    tile_px, choices = tile_side(checkpoint, options), options.lowerings()
    prompts = prompts_of(checkpoint, options.prompts)
    recording = None
    if options.precision == "int8":
        recording = _record(checkpoint, photographs, tile_px, on_stage)
    try:
        with files.new_directory(directory, force=force, marker=MANIFEST_NAME) as new:
            writer = GraphWriter(new, choices, on_stage, keep_inputs=options.polygraphy)
            manifest = _written(checkpoint, tile_px, writer, options, prompts, recording)
            write_manifest(manifest, new)
            if options.preview and manifest.experts:
                on_stage("preview")
                manifest = replace(manifest, preview=preview_map(new, manifest))
                write_manifest(manifest, new)
            if options.polygraphy:
                write_script(new)
            on_stage("publish")
    except OSError as error:
        raise OutputError(f"{directory}: cannot write the engine: {files.reason(error)}") from error
    return manifest


def _written(
    checkpoint: Checkpoint,
    tile_px: int,
    writer: GraphWriter,
    options: ExportOptions,
    prompts: Prompts | None,
    recording: Recording | None,
) -> Manifest:
    """Write all graphs of a checkpoint and return their manifest."""
    choices = options.lowerings().values()
    if isinstance(checkpoint, VaeCheckpoint):
        graphs = vae_engine.write_graphs(checkpoint, tile_px, writer)
        made = _versions(choices), checkpoint.sha256()
        return vae_engine.manifest(checkpoint.config, tile_px, graphs, *made)
    if isinstance(checkpoint, StableSRCheckpoint):
        assert prompts
        graphs = stablesr_engine.write_graphs(checkpoint, tile_px, prompts, writer.write)
        more = stablesr_engine.entries(checkpoint.config, tile_px, prompts)
    else:
        graphs = _write_graphs(checkpoint, tile_px, writer, recording, options.reuse or 0)
        more = {"fidelity": checkpoint.config.fidelity, "prediction": checkpoint.config.prediction}
    return _manifest(checkpoint, tile_px, graphs, choices, more)


def check_model(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Raise UsageError if the model cannot become an engine, or not one with shallow graphs."""
    if checkpoint.config.unet is None and not isinstance(checkpoint, VaeCheckpoint):
        raise UsageError(
            f"{checkpoint.directory}: holds a decoder on its own; an engine needs sampling experts too"
        )
    if options.reuse is not None:
        check_blocks(checkpoint.config, options.reuse)


def tile_side(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """Return the side of a tile in output pixels: as asked, or as the model was trained."""
    config = checkpoint.config
    usual = config.tile if isinstance(config, StableSRConfig) else DEFAULT_TILE_PX
    tile_px = usual if options.tile_px is None else options.tile_px
    check_tile(config, tile_px)
    return tile_px


def prompts_of(checkpoint: Checkpoint, asked: PromptOptions) -> Prompts | None:
    """Return the prompts of a model with a text encoder; UsageError if there are prompts for one without."""
    if isinstance(checkpoint.config, StableSRConfig):
        return choose(checkpoint.config.text, asked)
    if not asked.empty:
        raise UsageError(
            f"{checkpoint.directory}: {checkpoint.config.name} has no text encoder; leave out --prompt, "
            "--negative-prompt and --guidance"
        )
    return None


def _record(
    checkpoint: Checkpoint, photographs: Sequence[np.ndarray], tile_px: int, on_stage: OnStage
) -> Recording:
    """Run the sampler to calibrate int8; UsageError for a family without int8, or without photographs."""
    if isinstance(checkpoint.config, StableSRConfig | VaeConfig):
        raise UsageError(
            f"{checkpoint.directory}: {checkpoint.config.name} has no int8 export; export it with --bf16"
        )
    if len(photographs) < 2:
        raise UsageError(
            f"int8 is calibrated on photographs and proved on one more: got {len(photographs)}, expected 2 "
            "or more; name a folder of them with --calibrate"
        )
    return record(checkpoint, photographs, tile_px, on_role=lambda role: on_stage(f"calibrate {role}"))


def _write_graphs(
    checkpoint: Checkpoint, tile_px: int, writer: GraphWriter, recording: Recording | None, blocks: int = 0
) -> dict[str, Graph]:
    """Write all graphs of a checkpoint and return them by role; `blocks` is that of `expert_graph`."""
    config, latent_px = checkpoint.config, tile_px // checkpoint.config.decoder.factor
    how: dict[str, Any] = {"blocks": blocks, "prediction": config.prediction}
    graphs: dict[str, Graph] = {}

    def write(role: str, network: nn.Module, make: Make, inputs: parity.Inputs, *others: nn.Module) -> None:
        build: Build = partial(make, latent_px)
        if recording:
            build, inputs = partial(int8_graph, make, role, latent_px, recording), recording.proving(role)
        graphs[role] = writer.write(role, network, build, inputs, *others)

    for k, t_range in enumerate(config.expert_ranges):
        unet = checkpoint.expert(k)
        inputs = parity.expert_inputs(unet, latent_px, t_range)
        others = [DeepFeatures(unet, blocks)] if blocks else []
        write(f"expert_{k}", unet, partial(expert_graph, unet, **how), inputs, *others)
        if blocks:
            role, network = f"shallow_{k}", ShallowExpert(unet, blocks)
            if recording:
                recording.inputs[role] = recorded(unet, recording.inputs[f"expert_{k}"], blocks)
            make = partial(shallow_graph, unet, **how)
            write(role, network, make, shallow_inputs(unet, inputs, blocks))
            graphs |= shared(writer.directory, graphs, f"expert_{k}", role, network.params)
    autoencoder = checkpoint.decoder()
    inputs = parity.decoder_inputs(autoencoder, latent_px)
    write(DECODER, autoencoder, partial(decoder_graph, autoencoder), inputs)
    return graphs


def _versions(choices: Iterable[Lowering]) -> dict[str, str]:
    """Return the versions of the packages that make an engine, and the newest opset of its graphs."""
    opset = max(onnx_versions(one)[0] for one in choices)
    return {name: metadata.version(name) for name in VERSIONED} | {"opset": str(opset)}


def _manifest(
    checkpoint: Checkpoint,
    tile_px: int,
    graphs: dict[str, Graph],
    choices: Iterable[Lowering],
    more: dict[str, Any],
) -> Manifest:
    config = checkpoint.config
    return Manifest(
        name=config.name,
        model=config.to_dict(),
        scale=config.scale,
        tile=tile_px,
        latent_channels=config.decoder.embed_dim,
        latent_factor=config.decoder.factor,
        graphs=graphs,
        experts=tuple(
            Expert(f"expert_{k}", *t_range, f"shallow_{k}" if f"shallow_{k}" in graphs else None)
            for k, t_range in enumerate(config.expert_ranges)
        ),
        schedule=config.schedule,
        sampler=config.sampler,
        steps=config.steps,
        versions=_versions(choices),
        checkpoint_sha256=checkpoint.sha256(),
        **more,
    )
