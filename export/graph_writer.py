"""Writes the graphs of an engine into its directory and proves each of them against its network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import nn

from moesr.export import parity
from moesr.export.external_weights import write_graph
from moesr.export.graphs.builder import BuiltGraph
from moesr.export.lowering import Lowering
from moesr.export.partition import partition
from moesr.export.partition.writer import write_parts
from moesr.export.polygraphy_data import write_inputs
from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.graph_spec import Arrangement, Graph

OnStage = Callable[[str], None]
Build = Callable[[Lowering], BuiltGraph]


class GraphWriter:
    """Writes every graph once for each lowering; the first lowering is that of the engine's own graph."""

    def __init__(
        self,
        directory: Path,
        lowerings: Mapping[str, Lowering],
        on_stage: OnStage,
        *,
        keep_inputs: bool = False,
    ) -> None:
        """`on_stage` is called with the name of each stage when it begins.

        With `keep_inputs`, the inputs that prove each graph are written for Polygraphy.
        """
        self.directory = directory
        self._lowerings, self._on_stage, self._keep_inputs = dict(lowerings), on_stage, keep_inputs

    def write(
        self, role: str, network: nn.Module, build: Build, inputs: parity.Inputs, *others: nn.Module
    ) -> Graph:
        """Write the graph that `build` makes of a network, and prove it on `inputs`.

        `others` are networks of the same inputs that compute the graph's outputs after the first.
        """
        self._on_stage(f"run the network of {role}")
        wants = [parity.network_output(each, inputs) for each in (network, *others)]
        (_, own), *variations = self._lowerings.items()
        if own.precision == "int8":
            self._on_stage(f"try the layers of {role}")
        built = build(own)
        main = self._proved(self._save(role, built, own), inputs, wants, own)
        variants: dict[str, Arrangement] = {}
        for target, choices in variations:
            variant = self._variant(f"{role}.{target}", role, build, choices, inputs, wants, main.sha256)
            if variant:
                variants[target] = variant
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

    def _variant(
        self,
        name: str,
        role: str,
        build: Build,
        choices: Lowering,
        inputs: parity.Inputs,
        wants: Sequence[np.ndarray],
        own_sha256: str,
    ) -> Arrangement | None:
        """Another arrangement of a graph; None if it does not apply or equals the engine's own."""
        if choices.kernels and role != DECODER:
            return None
        if choices.kernels:
            return self._in_parts(role, build(choices), inputs, wants[0], choices)
        variant = self._save(name, build(choices), choices)
        if variant.sha256 == own_sha256:  # true for small tiles, which no lowering cuts into strips
            for file in variant.files:
                (self.directory / file.file).unlink()
            return None
        return self._proved(variant, inputs, wants, choices)

    def _save(self, name: str, built: BuiltGraph, choices: Lowering) -> Arrangement:
        self._on_stage(f"write {name}")
        file, data = write_graph(self.directory, name, built)
        stored = choices.store if choices.store != choices.precision else None
        return Arrangement(
            file.file, file.sha256, choices.precision, data=data, stored=stored, calibration=built.calibration
        )

    def _in_parts(
        self, role: str, built: BuiltGraph, inputs: parity.Inputs, want: np.ndarray, choices: Lowering
    ) -> Arrangement | None:
        """Write and prove a graph that is cut at our kernels; None if it holds none of them."""
        if not built.calls:
            return None
        self._on_stage(f"write {role} in parts")
        parts = partition.cut(built)
        main, *data = write_parts(self.directory, role, built, parts)
        self._on_stage(f"prove {role} in parts")
        graphs = [file.file for file in data if file.file.endswith(".onnx")]

        def keep(number: int, given: Mapping[str, np.ndarray]) -> None:
            if self._keep_inputs and choices.precision != "bf16":  # NumPy has no such type
                write_inputs(self.directory, graphs[number], given)

        got = partition.run(parts, inputs, built.boundary.outputs[0].name, on_graph=keep)
        proof = parity.judge(self.directory / main.file, got, want, choices)
        return Arrangement(main.file, main.sha256, choices.precision, data=tuple(data), parity=proof)

    def _proved(
        self, arrangement: Arrangement, inputs: parity.Inputs, wants: Sequence[np.ndarray], choices: Lowering
    ) -> Arrangement:
        self._on_stage(f"prove {arrangement.file.removesuffix('.onnx')}")
        want, *further = wants
        proof = parity.prove(self.directory / arrangement.file, inputs, want, choices, further=further)
        if self._keep_inputs:
            write_inputs(self.directory, arrangement.file, inputs)
        return replace(arrangement, parity=proof)
