"""A tiny synthetic engine: point-wise graphs in place of networks, with a correct manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moesr.runtime.manifest import Expert, Graph, Manifest, Parity, sha256_of
from moesr.runtime.schedule import Schedule

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
) -> Path:
    """Write the engine; expert `nan_expert` produces NaN. Returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    schedule = Schedule()
    edges = [schedule.timesteps * k // experts for k in range(experts + 1)]
    entries = []
    for k in range(experts):
        path = directory / f"expert_{k}.onnx"
        onnx.save(expert_graph(tile // FACTOR, shift=0.01 * k, nan=k == nan_expert), path)
        entries.append(Expert(path.name, sha256_of(path), edges[k], edges[k + 1]))
    onnx.save(decoder_graph(tile), directory / "decoder.onnx")
    Manifest(
        name="synthetic",
        model={},
        scale=scale,
        tile=tile,
        latent_channels=3,
        latent_factor=FACTOR,
        precision=precision,
        experts=tuple(entries),
        decoder=Graph("decoder.onnx", sha256_of(directory / "decoder.onnx")),
        schedule=schedule,
        sampler="ddpm",
        steps=steps,
        params={"expert": 1, "decoder": 1},
        macs={"expert": 1000, "decoder": 1000},
        versions={"moesr": "0"},
        checkpoint_sha256="0" * 64,
        parity={"decoder": Parity(0.0, 0.0, 1e-5)},
    ).write(directory)
    return directory


def expert_graph(side: int, *, shift: float, nan: bool = False) -> onnx.ModelProto:
    """eps = 0.9 z_t + 0.1 cond + 1e-4 t + shift, point by point."""
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
    return _model(nodes, inputs, ("eps", latent), values)


def decoder_graph(tile: int) -> onnx.ModelProto:
    """image = fidelity * lr + 0.05 * nearest-neighbour(z)."""
    image, latent = ["B", 3, tile, tile], ["B", 3, tile // FACTOR, tile // FACTOR]
    nodes = [
        helper.make_node("Resize", ["z", "", "scales"], ["z_up"], mode="nearest"),
        helper.make_node("Mul", ["z_up", "share"], ["detail"]),
        helper.make_node("Mul", ["lr", "fidelity"], ["base"]),
        helper.make_node("Add", ["base", "detail"], ["image"]),
    ]
    values = [
        numpy_helper.from_array(np.array([1, 1, FACTOR, FACTOR], np.float32), "scales"),
        numpy_helper.from_array(np.array(0.05, np.float32), "share"),
    ]
    return _model(nodes, {"z": latent, "lr": image, "fidelity": [1]}, ("image", image), values)


def _model(nodes: list, inputs: dict[str, list], output: tuple[str, list], values: list) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "synthetic",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(output[0], FLOAT, output[1])],
        values,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
