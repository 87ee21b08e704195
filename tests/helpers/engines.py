"""A tiny synthetic engine, whose graphs are point-wise formulas, with a correct manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moesr.runtime.engine.graph_io import boundary_of
from moesr.runtime.engine.graph_spec import BATCH, Expert, Graph, Parity, TensorSpec
from moesr.runtime.engine.manifest import Manifest
from moesr.runtime.engine.manifest_file import write_manifest
from moesr.runtime.sampling.schedule import Schedule
from moesr.runtime.system.files import sha256_of

FACTOR = 4
FLOAT = TensorProto.FLOAT


def build_engine(
    directory: Path,
    *,
    tile: int = 64,
    scale: int = 4,
    experts: int = 4,
    precision: str = "fp32",
    steps: int = 4,
    nan_expert: int | None = None,
    encoder: bool = False,
    prompts: tuple[str, ...] = (),
    reuse: bool = False,
    **entries: Any,
) -> Path:
    """Write the engine and return `directory`.

    Expert `nan_expert` produces NaN. With `encoder` the condition is a latent that a graph computes. If there
    are two `prompts`, they are an input of the experts. With `reuse` every expert passes features `deep` to a
    shallow graph. `entries` replace entries of the manifest.
    """
    directory.mkdir(parents=True, exist_ok=True)
    schedule, side = Schedule(), tile // FACTOR
    edges = [schedule.timesteps * k // experts for k in range(experts + 1)]
    models = {
        f"expert_{k}": expert_graph(
            side, shift=0.01 * k, nan=k == nan_expert, prompts=len(prompts) > 1, reuse=reuse
        )
        for k in range(experts)
    }
    models |= {f"shallow_{k}": shallow_graph(side, shift=0.01 * k) for k in range(experts if reuse else 0)}
    models["decoder"] = decoder_graph(tile)
    if encoder:
        models["encoder"] = encoder_graph(tile)
    graphs = {}
    for role, model in models.items():
        path = directory / f"{role}.onnx"
        onnx.save(model, path)
        full = boundary_of(role, tile, 3, FACTOR, with_latent=encoder, with_prompt=len(prompts) > 1)
        deep = TensorSpec("deep", "float32", (BATCH, 6, side, side))
        if reuse and role.startswith("expert"):
            full = replace(full, outputs=(*full.outputs, deep))
        elif reuse and role.startswith("shallow"):
            full = replace(full, inputs=(full.inputs[0], deep))
        parity = Parity(0.0, 0.0, 1e-5) if role == "decoder" else None
        graphs[role] = Graph(
            file=path.name,
            sha256=sha256_of(path),
            precision=precision,
            inputs=full.inputs,
            outputs=full.outputs,
            params=1,
            macs=1000,
            parity=parity,
        )
    values = {
        "name": "synthetic",
        "model": {},
        "scale": scale,
        "tile": tile,
        "latent_channels": 3,
        "latent_factor": FACTOR,
        "condition": "latent" if encoder else "image",
        "prompts": prompts,
        "graphs": graphs,
        "experts": tuple(
            Expert(f"expert_{k}", edges[k], edges[k + 1], f"shallow_{k}" if reuse else None)
            for k in range(experts)
        ),
        "schedule": schedule,
        "sampler": "ddpm",
        "steps": steps,
        "versions": {"moesr": "0"},
        "checkpoint_sha256": "0" * 64,
    }
    write_manifest(Manifest(**(values | entries)), directory)
    return directory


def expert_graph(
    side: int, *, shift: float, nan: bool = False, prompts: bool = False, reuse: bool = False
) -> onnx.ModelProto:
    """Return the graph eps = 0.9 z_t + 0.1 cond + 1e-4 t + shift (+ 0.2 for the second of two prompts).

    With `reuse` it has a second output, deep, which holds eps twice.
    """
    latent, batch = ["B", 3, side, side], ["B"]
    nodes = [
        helper.make_node("Mul", ["z_t", "gain"], ["z_part"]),
        helper.make_node("Mul", ["cond", "share"], ["cond_part"]),
        helper.make_node("Reshape", ["t", "column"], ["t_column"]),
        helper.make_node("Mul", ["t_column", "slope"], ["t_part"]),
        helper.make_node("Sum", ["z_part", "cond_part", "t_part", "shift"], ["total"]),
        helper.make_node("Log" if nan else "Identity", ["minus_one" if nan else "zero"], ["poison"]),
        helper.make_node("Add", ["total", "poison"], ["eps"]),
    ]
    constants = {"gain": 0.9, "share": 0.1, "slope": 1e-4, "shift": shift, "minus_one": -1.0, "zero": 0.0}
    values = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in constants.items()]
    values.append(numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "column"))
    inputs = {"z_t": latent, "cond": latent, "t": batch}
    if prompts:
        inputs["prompt"] = batch
        nodes[4].input.append("prompt_part")
        nodes[:0] = [
            helper.make_node("Reshape", ["prompt", "column"], ["prompt_column"]),
            helper.make_node("Mul", ["prompt_column", "avoided"], ["prompt_part"]),
        ]
        values.append(numpy_helper.from_array(np.array(0.2, np.float32), "avoided"))
    outputs = {"eps": latent}
    if reuse:
        nodes.append(helper.make_node("Concat", ["eps", "eps"], ["deep"], axis=1))
        outputs["deep"] = ["B", 6, side, side]
    return _model(nodes, inputs, outputs, values)


def shallow_graph(side: int, *, shift: float) -> onnx.ModelProto:
    """Return the graph eps = half of deep's last three channels + 0.4 z_t + shift."""
    latent = ["B", 3, side, side]
    nodes = [
        helper.make_node("Split", ["deep"], ["first", "last"], axis=1, num_outputs=2),
        helper.make_node("Mul", ["last", "half"], ["kept"]),
        helper.make_node("Mul", ["z_t", "gain"], ["z_part"]),
        helper.make_node("Sum", ["kept", "z_part", "shift"], ["eps"]),
    ]
    constants = {"half": 0.5, "gain": 0.4, "shift": shift}
    values = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in constants.items()]
    return _model(nodes, {"z_t": latent, "deep": ["B", 6, side, side]}, {"eps": latent}, values)


def decoder_graph(tile: int) -> onnx.ModelProto:
    """Return the graph image = fidelity * lr + 0.05 * nearest-neighbor(z), with one fidelity per tile."""
    image, latent = ["B", 3, tile, tile], ["B", 3, tile // FACTOR, tile // FACTOR]
    nodes = [
        helper.make_node("Resize", ["z", "", "scales"], ["z_up"], mode="nearest"),
        helper.make_node("Mul", ["z_up", "share"], ["detail"]),
        helper.make_node("Reshape", ["fidelity", "column"], ["gain"]),
        helper.make_node("Mul", ["lr", "gain"], ["base"]),
        helper.make_node("Add", ["base", "detail"], ["image"]),
    ]
    values = [
        numpy_helper.from_array(np.array([1, 1, FACTOR, FACTOR], np.float32), "scales"),
        numpy_helper.from_array(np.array(0.05, np.float32), "share"),
        numpy_helper.from_array(np.array([-1, 1, 1, 1], np.int64), "column"),
    ]
    return _model(nodes, {"z": latent, "lr": image, "fidelity": ["B"]}, {"image": image}, values)


def encoder_graph(tile: int) -> onnx.ModelProto:
    """Return the graph latent = mean of each block of the image + 0.1 noise."""
    image, latent = ["B", 3, tile, tile], ["B", 3, tile // FACTOR, tile // FACTOR]
    nodes = [
        helper.make_node("AveragePool", ["image"], ["mean"], kernel_shape=[FACTOR] * 2, strides=[FACTOR] * 2),
        helper.make_node("Mul", ["noise", "share"], ["spread"]),
        helper.make_node("Add", ["mean", "spread"], ["latent"]),
    ]
    values = [numpy_helper.from_array(np.array(0.1, np.float32), "share")]
    return _model(nodes, {"image": image, "noise": latent}, {"latent": latent}, values)


def _model(nodes: list, inputs: dict[str, list], outputs: dict[str, list], values: list) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "synthetic",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in outputs.items()],
        values,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
