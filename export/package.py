"""Checkpoint to engine directory: write every graph, hash it, prove it, publish the whole by a rename."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from moesr.export import parity, stablesr_engine
from moesr.export.external_weights import write_graph
from moesr.export.graphs.builder import BuiltGraph, onnx_versions
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.expert import expert_graph, shallow_graph
from moesr.export.lowering import INT8_ERROR, Lowering, Precision, Residuals, Target, lowering
from moesr.export.partition import partition
from moesr.export.partition.writer import write_parts
from moesr.export.prompts import PromptOptions, Prompts, choose
from moesr.export.quantisation.calibration import Recording, record
from moesr.export.quantisation.int8 import Make, int8_graph
from moesr.export.reuse import DeepFeatures, ShallowExpert, check_blocks, recorded, shallow_inputs, shared
from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.graph_spec import Arrangement, Expert, Graph
from moesr.runtime.engine.locate import demo_name
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, write_manifest
from moesr.runtime.errors import OutputError, UsageError
from moesr.runtime.system import files
from moesr.training.checkpoint import Checkpoint, StableSRCheckpoint
from moesr.training.config import ModelConfig, StableSRConfig

DEFAULT_TILE_PX = 512
NO_WISH = PromptOptions()
VERSIONED = ("moesr", "torch", "onnx", "onnxruntime", "numpy")

Targets = Literal[Target, "both"]
OnStage = Callable[[str], None]
Build = Callable[[Lowering], BuiltGraph]


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


def check_tile(config: ModelConfig, tile_px: int) -> None:
    """Raise UsageError, naming the valid neighbours, where the model cannot have tiles of this side."""
    step = config.tile_multiple
    if tile_px < step or tile_px % step:
        below = max(step, tile_px // step * step)
        near = f"{below} or {below + step}" if tile_px > step else f"{step}"
        raise UsageError(
            f"--tile {tile_px}: expected a positive multiple of {step} px for {config.name}; try {near}"
        )


def lowerings(
    target: Targets = "cpu",
    precision: Precision = "fp32",
    store: Precision = "fp32",
    kernels: bool = False,
    residuals: Residuals = "reckoned",
) -> dict[str, Lowering]:
    """How the graphs are arranged by target; the first is the engine's own, any other a variant.

    With "both", `precision` is that of the GPU's graphs, and the CPU's are float32. `kernels`: the decoder in
    parts, too, with our kernels between them, for a GPU; `residuals`: see `Lowering`. UsageError where a
    precision is not the target's.
    """
    if precision == "int8" and target != "cpu":
        raise UsageError("--int8 is for CPUs; export it with --target cpu, and take --fp16 for a GPU")
    found: dict[str, Lowering] = {}
    if target != "both":
        found[target] = lowering(target, precision, store)
    else:
        found |= {"cpu": lowering("cpu", "fp32", store), "gpu": lowering("gpu", precision, store)}
    if kernels and target != "cpu":
        found["parts"] = replace(lowering("gpu", precision, store), kernels=True, residuals=residuals)
    return found


def stage_count(
    config: ModelConfig,
    target: Targets = "cpu",
    kernels: bool = False,
    precision: Precision = "fp32",
    *,
    reuse: bool = False,
) -> int:
    """How many times `export_engine` reports a stage, at most."""
    graphs = len(config.expert_ranges) * (1 + reuse) + 1 + isinstance(config, StableSRConfig)
    return graphs * (1 + 2 * len(lowerings(target))) + 1 + 2 * kernels + 2 * graphs * (precision == "int8")


@torch.inference_mode()
def export_engine(
    checkpoint: Checkpoint,
    directory: Path,
    *,
    target: Targets = "cpu",
    precision: Precision = "fp32",
    store: Precision = "fp32",
    tile_px: int | None = None,
    wish: PromptOptions = NO_WISH,
    kernels: bool = False,
    photographs: Sequence[np.ndarray] = (),
    int8_error: float = INT8_ERROR,
    residuals: Residuals = "reckoned",
    reuse: int | None = None,
    force: bool = False,
    on_stage: OnStage = lambda stage: None,
) -> Manifest:
    """Write the engine directory of a checkpoint and return its manifest.

    The same checkpoint gives the same graphs. For `target`, `precision`, `store`, `kernels` and `residuals`
    see `lowerings`. `tile_px` None is what the model is used to; `wish` is for models with prompts.
    `photographs`, uint8 RGB [H, W, 3] and two at least, are what int8 is calibrated and proved on, and
    `int8_error` is the relative L2 error of every graph's result by which layers stay float32. `reuse`
    adds shallow graphs of so many output blocks. `on_stage` hears what begins.
    An existing directory is refused unless `force`, which replaces an engine and nothing else. Raises
    UsageError for a tile, prompt, precision or model that cannot be, ParityError where a graph misses its
    network, OutputError where nothing can be written; each leaves the place as it was.
    """
    config = checkpoint.config
    if config.unet is None:
        raise UsageError(
            f"{checkpoint.directory}: holds a decoder on its own; an engine needs sampling experts too"
        )
    if tile_px is None:
        tile_px = config.tile if isinstance(config, StableSRConfig) else DEFAULT_TILE_PX
    check_tile(config, tile_px)
    if reuse is not None:
        check_blocks(config, reuse)
    prompts = _prompts(checkpoint, wish)
    choices = {
        name: replace(own, int8_error=int8_error)
        for name, own in lowerings(target, precision, store, kernels, residuals).items()
    }
    recording = _record(checkpoint, photographs, tile_px, on_stage) if precision == "int8" else None
    blocks = reuse or 0
    try:
        with files.new_directory(directory, force=force, marker=MANIFEST_NAME) as new:
            writer = _Writer(new, choices, on_stage)
            if isinstance(checkpoint, StableSRCheckpoint):
                assert prompts
                graphs = stablesr_engine.write_graphs(checkpoint, tile_px, prompts, writer.write)
                more = stablesr_engine.entries(checkpoint.config, tile_px, prompts)
            else:
                graphs, more = _write_graphs(checkpoint, tile_px, writer, recording, blocks), {}
            manifest = _manifest(checkpoint, tile_px, graphs, choices.values(), more)
            write_manifest(manifest, new)
            on_stage("publish")
    except OSError as error:
        raise OutputError(f"{directory}: cannot write the engine: {files.reason(error)}") from error
    return manifest


def _prompts(checkpoint: Checkpoint, wish: PromptOptions) -> Prompts | None:
    """The prompts of a model that has a text encoder; UsageError where one that has none is told some."""
    if isinstance(checkpoint.config, StableSRConfig):
        return choose(checkpoint.config.text, wish)
    if not wish.empty:
        raise UsageError(
            f"{checkpoint.directory}: {checkpoint.config.name} knows no prompts; leave out --prompt, "
            "--negative-prompt and --guidance"
        )
    return None


def _record(
    checkpoint: Checkpoint, photographs: Sequence[np.ndarray], tile_px: int, on_stage: OnStage
) -> Recording:
    """What int8 is calibrated on; UsageError without photographs, or for a model that is not sampled so."""
    if isinstance(checkpoint.config, StableSRConfig):
        raise UsageError(f"{checkpoint.directory}: holds StableSR, which has no int8 yet; export it in bf16")
    if len(photographs) < 2:
        raise UsageError(
            f"int8 is calibrated on photographs, and proved on one more: got {len(photographs)}, expected 2 "
            "or more; name a folder of them with --calibrate"
        )
    return record(checkpoint, photographs, tile_px, on_role=lambda role: on_stage(f"calibrate {role}"))


class _Writer:
    """Writes graphs into a directory, arranged for every target."""

    def __init__(self, directory: Path, lowerings: dict[str, Lowering], on_stage: OnStage) -> None:
        self.directory = self._directory = directory
        self._lowerings, self._on_stage = lowerings, on_stage

    def write(
        self,
        role: str,
        network: nn.Module,
        build: Build,
        inputs: parity.Inputs,
        *others: nn.Module,
    ) -> Graph:
        """Write the graph that `build` makes of a network, and prove it on `inputs`.

        `others` are networks of the same inputs, for the graph's outputs after the first.
        """
        self._on_stage(f"run the network of {role}")
        want = parity.network_output(network, inputs)
        further = [parity.network_output(other, inputs) for other in others]
        (_, own), *variations = self._lowerings.items()
        if own.precision == "int8":
            self._on_stage(f"try the layers of {role}")
        built, variants = build(own), {}
        main = self._save(role, built, own)
        main = self._proved(main, inputs, (want, *further), own)
        for target, choices in variations:
            if choices.kernels:
                if role == DECODER and (cut := self._in_parts(role, build(choices), inputs, want, choices)):
                    variants[target] = cut
                continue
            variant = self._save(f"{role}.{target}", build(choices), choices)
            if variant.sha256 == main.sha256:  # as with small tiles, which nothing cuts
                for file in variant.files:
                    (self._directory / file.file).unlink()
                continue
            variants[target] = self._proved(variant, inputs, (want, *further), choices)
        return Graph(
            file=main.file,
            sha256=main.sha256,
            precision=main.precision,
            data=main.data,
            stored=main.stored,
            parity=main.parity,
            calibration=main.calibration,
            inputs=built.boundary.inputs,
            outputs=built.boundary.outputs,
            params=sum(p.numel() for p in network.parameters()),
            macs=built.macs,
            variants=variants,
        )

    def _save(self, name: str, built: BuiltGraph, choices: Lowering) -> Arrangement:
        self._on_stage(f"write {name}")
        file, data = write_graph(self._directory, name, built)
        stored = choices.store if choices.store != choices.precision else None
        return Arrangement(
            file.file, file.sha256, choices.precision, data=data, stored=stored, calibration=built.calibration
        )

    def _in_parts(
        self, role: str, built: BuiltGraph, inputs: parity.Inputs, want: np.ndarray, choices: Lowering
    ) -> Arrangement | None:
        """Write a graph cut at what our kernels compute, and prove it; None where nothing of it is theirs."""
        if not built.calls:
            return None
        self._on_stage(f"write {role} in parts")
        parts = partition.cut(built)
        (main, *data) = write_parts(self._directory, role, built, parts)
        self._on_stage(f"prove {role} in parts")
        got = partition.run(parts, inputs, built.boundary.outputs[0].name)
        proof = parity.judge(self._directory / main.file, got, want, choices)
        return Arrangement(main.file, main.sha256, choices.precision, data=tuple(data), parity=proof)

    def _proved(
        self,
        arrangement: Arrangement,
        inputs: parity.Inputs,
        wants: Sequence[np.ndarray],
        choices: Lowering,
    ) -> Arrangement:
        self._on_stage(f"prove {arrangement.file.removesuffix('.onnx')}")
        want, *further = wants
        proof = parity.prove(self._directory / arrangement.file, inputs, want, choices, further=further)
        return replace(arrangement, parity=proof)


def _write_graphs(
    checkpoint: Checkpoint, tile_px: int, writer: _Writer, recording: Recording | None, blocks: int = 0
) -> dict[str, Graph]:
    """Write all graphs of a checkpoint; returns them by role. `blocks`: see `expert_graph`."""
    config, latent_px = checkpoint.config, tile_px // checkpoint.config.decoder.factor
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
        write(f"expert_{k}", unet, partial(expert_graph, unet, blocks=blocks), inputs, *others)
        if blocks:
            role, network = f"shallow_{k}", ShallowExpert(unet, blocks)
            if recording:
                recording.inputs[role] = recorded(unet, recording.inputs[f"expert_{k}"], blocks)
            make = partial(shallow_graph, unet, blocks=blocks)
            write(role, network, make, shallow_inputs(unet, inputs, blocks))
            graphs |= shared(writer.directory, graphs, f"expert_{k}", role, network.params)
    autoencoder = checkpoint.decoder()
    inputs = parity.decoder_inputs(autoencoder, latent_px)
    write(DECODER, autoencoder, partial(decoder_graph, autoencoder), inputs)
    return graphs


def _manifest(
    checkpoint: Checkpoint,
    tile_px: int,
    graphs: dict[str, Graph],
    choices: Iterable[Lowering],
    more: dict[str, Any],
) -> Manifest:
    config, opset = checkpoint.config, max(onnx_versions(one)[0] for one in choices)
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
        versions={name: metadata.version(name) for name in VERSIONED} | {"opset": str(opset)},
        checkpoint_sha256=checkpoint.sha256(),
        **more,
    )
