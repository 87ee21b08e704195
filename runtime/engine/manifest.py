"""The content of an engine directory's `manifest.json`, which the export writes and the runtime reads.

An engine directory holds `manifest.json` and the ONNX graphs that it lists by role: the experts (`expert_0`,
`expert_1`, ..), at most one `decoder`, and an `encoder` if the condition is a latent. The engine of an
autoencoder for a text-to-image model has no experts. The manifest says how to run the graphs (scale, tile,
schedule, timesteps of each expert) and how to check them (SHA-256, parity with the network).
`docs/engine-format.md` describes every entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from moesr.runtime.engine.field_types import Fraction, Sha256, Side, Text
from moesr.runtime.engine.framing import Framing
from moesr.runtime.engine.graph_io import DECODER, boundary_of, deep_of
from moesr.runtime.engine.graph_spec import Boundary, Expert, File, Graph, TensorSpec
from moesr.runtime.engine.preview_map import PreviewMap
from moesr.runtime.options import MAX_GUIDANCE
from moesr.runtime.sampling.samplers import Prediction
from moesr.runtime.sampling.schedule import MAX_TIMESTEPS, Schedule
from moesr.runtime.system.json_dataclass import Form, Range

SCHEMA = 2
MAX_SCALE = 64

Role = Annotated[
    str,
    Form(
        "expert_[0-9]+|shallow_[0-9]+|decoder|encoder|unrefined",
        "a role such as expert_0, shallow_0, decoder, encoder",
    ),
]
"""The name of a graph in the manifest."""


LatentScale = Annotated[float, Range(1e-6, 1e6)]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that the runtime needs to know about an engine. Unknown entries of the JSON file are ignored."""

    schema: int = SCHEMA
    name: Text
    model: dict[str, Any]  # configuration of the networks; the runtime does not read it
    scale: Annotated[int, Range(1, MAX_SCALE)]  # output pixels per input pixel, along one side
    tile: Side  # output pixels of one tile, along one side
    latent_channels: Side
    latent_factor: Side  # output pixels per latent pixel, along one side
    latent_scale: Annotated[float, Range(1e-6, 1e6)] = (
        1.0  # the graphs' latents are the autoencoder's times it
    )
    condition: Literal["image", "latent"] = "image"  # the LR image on the latent grid, or its latent
    init: Literal["noise", "latent"] = "noise"  # sampling starts from noise, or from the condition with noise
    prediction: Prediction = "eps"
    prompts: tuple[str, ...] = ()  # of the experts: one to follow and one to guide away from
    guidance: Annotated[float, Range(0, MAX_GUIDANCE)] = 1.0  # default; 1 is no guidance
    fidelity: Fraction = 1.0  # default weight of the LR features in the decoder
    framing: Framing = field(default_factory=Framing)
    preview: PreviewMap | None = None  # None: a preview fits a map to each image
    graphs: dict[Role, Graph]
    experts: tuple[Expert, ...]  # ascending in t, so the expert for the lowest noise comes first
    schedule: Schedule
    sampler: str  # default sampler, one of SAMPLERS
    steps: Annotated[int, Range(1, MAX_TIMESTEPS)]  # default number of sampling steps
    versions: dict[str, str]  # of the packages with which the engine was made
    checkpoint_sha256: Sha256

    @property
    def latent_tile(self) -> int:
        """The side of a tile in latent pixels."""
        return self.tile // self.latent_factor

    @property
    def expert_ranges(self) -> tuple[tuple[int, int], ...]:
        """(t_from, t_to) of every expert."""
        return tuple((e.t_from, e.t_to) for e in self.experts)

    @property
    def precision(self) -> str:
        """The precision of the main graph, after which the engine is named."""
        return self.graphs[self.main_role].precision

    @property
    def main_role(self) -> str:
        """The role of the first expert, or of the decoder if there are no experts."""
        return self.experts[0].graph if self.experts else DECODER

    @property
    def boundaries(self) -> dict[str, Boundary]:
        """All inputs that the runtime can feed to each graph and the outputs that it reads, by role."""
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
        """The features that experts pass to their shallow graphs; None if it has no shallow graphs."""
        every = self.experts and all(expert.shallow for expert in self.experts)
        return deep_of(self.graphs[self.experts[0].graph]) if every else None

    @property
    def guided(self) -> bool:
        """Whether there is a negative prompt, so that guidance may differ from 1."""
        return len(self.prompts) == 2

    @property
    def files(self) -> tuple[File, ...]:
        """Every file that the manifest lists."""
        listed = (f for g in self.graphs.values() for a in g.arrangements for f in a.files)
        return tuple(dict.fromkeys(listed))


@dataclass(frozen=True, kw_only=True)
class AutoencoderManifest(Manifest):
    """An engine of an autoencoder for the latents of a text-to-image model.

    It has a `decoder`, an `encoder` unless only the decoder's weights were known, and `unrefined` if the
    decoder has a refinement network. Latents at the graphs' inputs and outputs are the autoencoder's times
    `latent_scale`. There is no sampler: the loop treats it as an engine of scale 1, and the entries of a
    sampler are fixed and not stored.
    """

    kind: Literal["autoencoder"] = "autoencoder"
    scale: int = field(default=1, init=False)
    condition: Literal["image", "latent"] = field(default="latent", init=False)
    init: Literal["noise", "latent"] = field(default="noise", init=False)
    prediction: Prediction = field(default="eps", init=False)
    prompts: tuple[str, ...] = field(default=(), init=False)
    guidance: float = field(default=1.0, init=False)
    fidelity: float = field(default=1.0, init=False)
    framing: Framing = field(default_factory=Framing, init=False)
    preview: PreviewMap | None = field(default=None, init=False)
    experts: tuple[Expert, ...] = field(default=(), init=False)
    schedule: Schedule = field(default_factory=Schedule, init=False)
    sampler: str = field(default="ddim", init=False)
    steps: int = field(default=1, init=False)
