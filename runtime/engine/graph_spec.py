"""The graphs of an engine as the manifest describes them: files, inputs and outputs, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

from moesr.runtime.engine.field_types import (
    Count,
    Dimension,
    Error,
    FileName,
    Fraction,
    Precision,
    Sha256,
    Text,
)
from moesr.runtime.sampling.schedule import MAX_TIMESTEPS
from moesr.runtime.system.json_dataclass import Form, Range

BATCH = "B"
"""The dimension that is the number of tiles in a run."""

MAX_PARAMS, MAX_MACS = 10**13, 10**18


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph: its element type ("float32") and dimensions, numbers or `BATCH`."""

    name: Text
    dtype: str
    dims: tuple[Dimension, ...]

    @property
    def per_tile(self) -> bool:
        """Whether each tile of a run has its own value, rather than one value for the whole run."""
        return bool(self.dims) and self.dims[0] == BATCH

    def shape(self, batch: int) -> tuple[int, ...]:
        """Return the shape in a run of `batch` tiles."""
        return tuple(batch if isinstance(size, str) else size for size in self.dims)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Boundary:
    """All inputs and outputs of a graph."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def only(self, names: set[str]) -> Boundary:
        """Return this boundary with only the inputs in `names`, those that a file has."""
        return Boundary(tuple(spec for spec in self.inputs if spec.name in names), self.outputs)

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}"


@dataclass(frozen=True)
class File:
    """A file of the engine directory (a plain name) and its SHA-256 in hexadecimal."""

    file: FileName
    sha256: Sha256


@dataclass(frozen=True)
class Parity:
    """The error of a graph against its network on seeded inputs; `threshold` bounds `relative_l2`."""

    relative_l2: Error
    max_abs: Error
    threshold: Error


@dataclass(frozen=True)
class Calibration:
    """The calibration that determined the ranges of an int8 graph.

    `images` went through `steps` sampling steps each, in which this graph ran `runs` times. `int8_fraction`
    is the share of the multiply-accumulates in int8, 0 to 1. `kept` names the layers that stay in float32
    because they are sensitive.
    """

    images: Count
    steps: Count
    runs: Count
    method: Text
    int8_fraction: Fraction
    kept: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.int8_fraction:.0%} of the multiply-accumulates, {len(self.kept)} layers left in float32; "
            f"ranges by {self.method} of {self.runs} runs ({self.images} images, {self.steps} steps)"
        )


@dataclass(frozen=True)
class Arrangement(File):
    """A graph as one ONNX file, with the files of its external weights, in one precision.

    `stored` is the precision in which the file stores its large weights, if it differs.
    """

    precision: Precision
    data: tuple[File, ...] = field(default=(), kw_only=True)
    stored: Annotated[str, Form("fp16", "fp16")] | None = field(default=None, kw_only=True)
    parity: Parity | None = field(default=None, kw_only=True)
    calibration: Calibration | None = field(default=None, kw_only=True)

    @property
    def files(self) -> tuple[File, ...]:
        """The ONNX file and its weights."""
        return (File(self.file, self.sha256), *self.data)


@dataclass(frozen=True, kw_only=True)
class Graph(Arrangement):
    """A graph of the engine.

    Its own files serve any target, and `variants` hold other files for some targets. `params` is the number
    of the network's parameters, `macs` the multiply-accumulates of one tile.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    params: Annotated[int, Range(0, MAX_PARAMS)]
    macs: Annotated[int, Range(0, MAX_MACS)]
    variants: dict[str, Arrangement] = field(default_factory=dict)  # by target: "cpu", "gpu", "parts"

    @property
    def boundary(self) -> Boundary:
        """The inputs and outputs that all its arrangements have."""
        return Boundary(self.inputs, self.outputs)

    def arrangement(self, target: str) -> Arrangement:
        """Return the files that serve a target best: "cpu", "gpu", "parts" or "plain".

        "parts" is a GPU that runs our kernels between the parts of a graph; without such a variant it is
        "gpu". "plain" is a CPU that needs the plain operators of the files for GPUs, if these have the same
        precision.
        """
        if target == "plain":
            plain = self.variants.get("gpu", self)
            return plain if plain.precision == self.precision else self
        if target == "parts" and target not in self.variants:
            target = "gpu"
        return self.variants.get(target, self)

    @property
    def arrangements(self) -> Iterator[Arrangement]:
        """All arrangements, starting with the graph's own."""
        yield self
        yield from self.variants.values()

    def pixels(self) -> int:
        """The number of pixels of its largest input or output, for one tile."""
        return max(math.prod(spec.shape(1)[2:]) for spec in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Expert:
    """The timesteps that an expert's graph serves: t_from inclusive, t_to exclusive.

    `shallow` names the graph that computes the same without the deep levels; it takes their features from an
    earlier step.
    """

    graph: str
    t_from: Annotated[int, Range(0, MAX_TIMESTEPS)]
    t_to: Annotated[int, Range(1, MAX_TIMESTEPS)]
    shallow: str | None = None
