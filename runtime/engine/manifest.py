"""The engine directory's `manifest.json`: written by the export, read by the runtime, defined once here.

An engine directory holds `manifest.json` and the ONNX graphs that it lists by role: `expert_0` and further
ones, which predict what a sampler needs, at most one `decoder`, and an `encoder` where the condition is a
latent. The manifest says how to drive the graphs (scale, tile, schedule, the experts' timesteps) and proves
them (SHA-256, parity with the network). `docs/engine-format.md` describes it entry by entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moesr.runtime.engine.framing import Framing
from moesr.runtime.engine.graph_io import boundary_of, deep_of
from moesr.runtime.engine.graph_spec import Boundary, Expert, File, Graph, TensorSpec
from moesr.runtime.sampling.samplers import ETA, Prediction
from moesr.runtime.sampling.schedule import Schedule

SCHEMA = 2
SAMPLERS = tuple(ETA)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything the runtime needs to know about an engine. Unknown entries of the JSON file are ignored."""

    schema: int = SCHEMA
    name: str
    model: dict[str, Any]  # configuration of the networks, for the reader
    scale: int  # output pixels per input pixel, along one side
    tile: int  # output pixels of one tile, along one side
    latent_channels: int
    latent_factor: int  # output pixels per latent pixel, along one side
    latent_scale: float = 1.0  # of the autoencoder's latents inside the graphs, for the reader
    condition: Literal["image", "latent"] = (
        "image"  # the LR image on the latent grid, or the encoder's latent
    )
    init: Literal["noise", "latent"] = "noise"  # sampling starts from noise, or from the noised condition
    prediction: Prediction = "eps"
    prompts: tuple[str, ...] = ()  # that the experts know: one to follow, one to guide away from
    guidance: float = 1.0  # default strength of classifier-free guidance; 1 is none
    fidelity: float = 1.0  # default weight of the LR features in the decoder
    framing: Framing = field(default_factory=Framing)
    graphs: dict[str, Graph]  # by role
    experts: tuple[Expert, ...]  # ascending in t: the lowest noise first
    schedule: Schedule
    sampler: str  # default sampler, one of SAMPLERS
    steps: int  # default number of sampling steps
    versions: dict[str, str]  # of the packages that made the engine
    checkpoint_sha256: str

    @property
    def latent_tile(self) -> int:
        """Side of a tile in latent pixels."""
        return self.tile // self.latent_factor

    @property
    def expert_ranges(self) -> tuple[tuple[int, int], ...]:
        """(t_from, t_to) of every expert."""
        return tuple((e.t_from, e.t_to) for e in self.experts)

    @property
    def precision(self) -> str:
        """Precision of the experts, by which an engine is called."""
        return self.graphs[self.experts[0].graph].precision

    @property
    def boundaries(self) -> dict[str, Boundary]:
        """What the runtime can feed to each graph, and takes from it, by role."""
        sizes = self.tile, self.latent_channels, self.latent_factor, self.prediction
        latent = self.condition == "latent"
        options = {"with_latent": latent, "with_prompt": self.guided}
        offered = {role: boundary_of(role, *sizes, **options) for role in self.graphs}
        for expert in self.experts:
            deep = deep_of(self.graphs[expert.graph]) if expert.shallow else None
            if expert.shallow and deep:
                full, shallow = offered[expert.graph], offered[expert.shallow]
                offered[expert.graph] = replace(full, outputs=(*full.outputs, deep))
                offered[expert.shallow] = replace(shallow, inputs=(*shallow.inputs, deep))
        return offered

    @property
    def deep(self) -> TensorSpec | None:
        """The features that experts leave to their shallow graphs; None where there are none to reuse."""
        every = all(expert.shallow for expert in self.experts)
        return deep_of(self.graphs[self.experts[0].graph]) if every else None

    @property
    def guided(self) -> bool:
        """Whether there is a negative prompt, so that guidance may be other than 1."""
        return len(self.prompts) == 2

    @property
    def files(self) -> tuple[File, ...]:
        """Every file that the manifest lists."""
        listed = (f for g in self.graphs.values() for a in g.arrangements for f in a.files)
        return tuple(dict.fromkeys(listed))
