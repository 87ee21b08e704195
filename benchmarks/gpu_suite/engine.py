"""The engine directories of benchmarks/gpu.py: a stand-in with empty graphs, and exported engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_suite.setup import Setup
from moesr.runtime.devices import cuda_driver
from moesr.runtime.engine.graph_io import boundary_of
from moesr.runtime.engine.graph_spec import Arrangement, Boundary, Expert, Graph
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.sampling.schedule import Schedule
from moesr.runtime.system.files import sha256_of

STAND_IN = b"\x08\x0a"  # an ONNX file with a version and no graph


def write_stand_in(setup: Setup) -> Manifest:
    """Write an engine directory with empty graphs; the PyTorch backend runs networks in their place."""
    setup.engine.mkdir(parents=True, exist_ok=True)
    files = {role: setup.engine / f"{role}.onnx" for role in (*_experts(), "decoder")}
    for path in files.values():
        if not path.is_file():
            path.write_bytes(STAND_IN)
    graphs = {r: _graph(setup, r, path, boundary_of(r, setup.tile, 3, 4)) for r, path in files.items()}
    return listed_in_manifest(setup, setup.engine, graphs)


def _experts() -> list[str]:
    from gpu_suite.networks import EXPERTS

    return [f"expert_{k}" for k in range(len(EXPERTS))]


def _graph(
    setup: Setup, role: str, path: Path, boundary: Boundary, variants: dict[str, Arrangement] | None = None
) -> Graph:
    from gpu_suite.networks import macs_of

    work = macs_of(setup)["decoder" if role == "decoder" else "expert_0"]
    return Graph(
        file=path.name,
        sha256=sha256_of(path),
        precision="fp16",
        inputs=boundary.inputs,
        outputs=boundary.outputs,
        params=0,
        macs=work,
        variants=variants or {},
    )


def listed_in_manifest(setup: Setup, directory: Path, graphs: dict[str, Graph]) -> Manifest:
    """Write the manifest of these graphs to an engine's directory."""
    from gpu_suite.networks import EXPERTS

    manifest = Manifest(
        name="gpu",
        model={},
        scale=4,
        tile=setup.tile,
        latent_channels=3,
        latent_factor=4,
        graphs=graphs,
        experts=tuple(Expert(f"expert_{k}", *t) for k, t in enumerate(EXPERTS)),
        schedule=Schedule(),
        sampler="ddpm",
        steps=setup.steps[0],
        versions={},
        checkpoint_sha256="0" * 64,
    )
    write_manifest(manifest, directory)
    return manifest


def write_engine(setup: Setup, directory: Path, *, parts: bool) -> Manifest:
    """Write an engine in half precision unless it exists; all experts share one file.

    With `parts` set, the decoder is partitioned and its kernels are compiled.
    """
    from gpu_suite.networks import networks
    from moesr.export.graphs.decoder import decoder_graph
    from moesr.export.graphs.expert import expert_graph
    from moesr.export.lowering import lowering

    if (directory / "manifest.json").is_file():
        return read_manifest(directory, verify=False)
    directory.mkdir(parents=True, exist_ok=True)
    side, choices = setup.tile // 4, lowering("gpu", "fp16")
    expert, decoder = networks(setup)
    files = {"expert": directory / "expert.onnx", "decoder": directory / "decoder.onnx"}
    built = {"expert": expert_graph(expert, side, choices), "decoder": decoder_graph(decoder, side, choices)}
    for name, graph in built.items():
        files[name].write_bytes(graph.to_bytes())
    variants = write_parts_of(decoder, side, directory) if parts else {}
    boundaries = {name: graph.boundary for name, graph in built.items()}
    graphs = {role: _graph(setup, role, files["expert"], boundaries["expert"]) for role in _experts()}
    graphs["decoder"] = _graph(setup, "decoder", files["decoder"], boundaries["decoder"], variants)
    kernels_for(setup, directory, listed_in_manifest(setup, directory, graphs), compiled=bool(variants))
    return listed_in_manifest(setup, directory, graphs)


def write_parts_of(decoder: Any, side: int, directory: Path) -> dict[str, Arrangement]:
    """Write the decoder partitioned at our kernels; returns an empty dict if it uses none."""
    from moesr.export.graphs.decoder import decoder_graph
    from moesr.export.lowering import lowering
    from moesr.export.partition import partition
    from moesr.export.partition.writer import write_parts

    built = decoder_graph(decoder, side, replace(lowering("gpu", "fp16"), kernels=True))
    if not built.calls:
        return {}
    main, *data = write_parts(directory, "decoder", built, partition.cut(built))
    return {"parts": Arrangement(main.file, main.sha256, "fp16", data=tuple(data))}


def kernels_for(setup: Setup, directory: Path, manifest: Manifest, *, compiled: bool) -> None:
    """Add the kernels of an engine's decoder in parts; those of the loop are installed with the package."""
    from moesr.export.tensorrt import build_kernels as build_all

    if compiled:
        capability = cuda_driver.device_capability(cuda_driver.open_device(0))
        build_all(directory, manifest, [capability])
