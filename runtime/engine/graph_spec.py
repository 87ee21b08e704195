"""The graphs of an engine as the manifest describes them: files, inputs and outputs, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

BATCH = "B"
"""The dimension that counts the tiles of one run."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph: its element type ("float32") and dimensions, numbers or `BATCH`."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    @property
    def per_tile(self) -> bool:
        """Whether each tile of a run has a value of its own; otherwise one value serves the whole run."""
        return bool(self.dims) and self.dims[0] == BATCH

    def shape(self, batch: int) -> tuple[int, ...]:
        """Its shape in a run of `batch` tiles."""
        return tuple(batch if isinstance(size, str) else size for size in self.dims)

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Boundary:
    """All that a graph takes and gives."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.inputs))} -> {', '.join(map(str, self.outputs))}"


@dataclass(frozen=True)
class File:
    """A file of the engine directory (a plain name) and its SHA-256 in hexadecimal."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Parity:
    """Error of a graph against its network, on seeded inputs; `threshold` bounds `relative_l2`."""

    relative_l2: float
    max_abs: float
    threshold: float


@dataclass(frozen=True)
class Calibration:
    """How the ranges of an int8 graph were found: on what, by which method, and what is not int8.

    `images` went through `steps` sampling steps each, and `runs` runs of this graph were looked at. `share`
    of its multiply-accumulates is int8, 0 to 1; `kept` names the layers that are float32 as they are
    sensitive.
    """

    images: int
    steps: int
    runs: int
    method: str
    share: float
    kept: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.share:.0%} of the multiply-accumulates, {len(self.kept)} layers left in float32; ranges "
            f"by {self.method} of {self.runs} runs ({self.images} images, {self.steps} steps)"
        )


@dataclass(frozen=True)
class Arrangement(File):
    """A graph as one ONNX file, with the files of its external weights, in one precision.

    `stored` is the precision in which the file keeps its large weights, where that is another.
    """

    precision: str
    data: tuple[File, ...] = field(default=(), kw_only=True)
    stored: str | None = field(default=None, kw_only=True)
    parity: Parity | None = field(default=None, kw_only=True)
    calibration: Calibration | None = field(default=None, kw_only=True)

    @property
    def files(self) -> tuple[File, ...]:
        """The ONNX file and its weights."""
        return (File(self.file, self.sha256), *self.data)


@dataclass(frozen=True, kw_only=True)
class Graph(Arrangement):
    """A graph of the engine. Its own files are for any target; `variants` hold others for some targets.

    `params` counts the network's parameters, `macs` the multiply-accumulates of one tile.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    params: int
    macs: int
    variants: dict[str, Arrangement] = field(default_factory=dict)  # by target: "cpu", "gpu", "parts"

    @property
    def boundary(self) -> Boundary:
        """What every arrangement of it takes and gives."""
        return Boundary(self.inputs, self.outputs)

    def arrangement(self, target: str) -> Arrangement:
        """The files that serve a target best: "cpu", "gpu", "parts" or "plain".

        "parts" is a GPU with our kernels between the parts of a graph, where there are any.
        "plain" is a CPU that wants the plain operators of a GPU's files, where their precision is the same.
        """
        if target == "plain":
            plain = self.variants.get("gpu", self)
            return plain if plain.precision == self.precision else self
        if target == "parts" and target not in self.variants:
            target = "gpu"
        return self.variants.get(target, self)

    @property
    def arrangements(self) -> Iterator[Arrangement]:
        """All of them, its own first."""
        yield self
        yield from self.variants.values()

    def pixels(self) -> int:
        """Pixels of its largest input or output, for one tile."""
        return max(math.prod(spec.shape(1)[2:]) for spec in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class Expert:
    """The timesteps that a graph serves: t_from inclusive, t_to exclusive.

    `shallow` computes the same but for the deep levels, whose features it takes from an earlier step.
    """

    graph: str
    t_from: int
    t_to: int
    shallow: str | None = None
