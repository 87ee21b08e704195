"""Profiles of graphs by the library that runs them: milliseconds by module and by operator."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from moesr.runtime.backends import ov
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.ort import session_options

Profile = dict[str, dict[str, float]]
Inputs = Mapping[str, np.ndarray]


def onnxruntime_profile(path: Path, values: Inputs, threads: int) -> Profile:
    """Profile the second run of a graph on ONNX Runtime."""
    import onnx  # imported here, so that it adds no memory to other measurements
    import onnxruntime as ort

    options = session_options(threads)
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as scratch:
        options.profile_file_prefix = f"{scratch}/profile"
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        for _ in range(2):
            session.run(None, {k: v for k, v in values.items() if k in wanted})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = onnx.load(path, load_external_data=False).graph.node
    makers = {f"{name}_nchwc": node.name for node in nodes for name in node.output}  # as optimised
    second = max(e["ts"] for e in events if e["name"] == "model_run")
    modules, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    for event in events:
        if event["cat"] == "Node" and event["ts"] >= second and event["name"].endswith("_kernel_time"):
            name: str = event["name"].removesuffix("_kernel_time")
            modules[_module(makers.get(name, name))] += event["dur"] / 1000
            operators[event["args"]["op_name"]] += event["dur"] / 1000
    return _sorted(modules, operators)


def openvino_profile(path: Path, values: Inputs, options: SessionOptions) -> Profile:
    """Profile the second run of a graph on OpenVINO; operators are named with their compute type."""
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    known = {name: values[name] for port in model.inputs for name in port.names if name in values}
    model.reshape({name: list(value.shape) for name, value in known.items()})
    compiled = core.compile_model(model, "CPU", {**ov.properties(options), "PERF_COUNT": True})
    request = compiled.create_infer_request()
    for _ in range(2):
        request.infer(known)
    modules, operators = defaultdict[str, float](float), defaultdict[str, float](float)
    for node in request.get_profiling_info():
        spent = node.real_time.total_seconds() * 1000
        modules[_module(node.node_name)] += spent
        operators[f"{node.node_type} {node.exec_type.rsplit('_', 1)[-1]}"] += spent
    return _sorted(modules, operators)


def _module(node: str) -> str:
    """Return the module that a node belongs to; nodes that an optimizer added have no name."""
    scope = re.split(r"/?[A-Z]", node)[0]
    return "/".join(scope.split("/")[:2]) or "layout changes"


def _sorted(modules: Mapping[str, float], operators: Mapping[str, float]) -> Profile:
    """Return both groups sorted by descending time."""
    groups = {"modules": modules, "operators": operators}
    return {name: dict(sorted(g.items(), key=lambda item: -item[1])) for name, g in groups.items()}
