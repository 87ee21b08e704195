"""The inputs and outputs of each graph of an engine, by its role.

=======  =======================================================================  ============================
role     inputs                                                                   output
=======  =======================================================================  ============================
expert   `z_t` [B, C, h, w], `cond` [B, 3 or C, h, w], `t` [B], `prompt` [B]      `eps`, `x0` or `v`, as `z_t`
shallow  as the expert, and its `deep` [B, D, H', W']                             as the expert
decoder  `z` [B, C, h, w], `lr` [B, 3, H, W], `fidelity` [B] (or [1])             `image` [B, 3, H, W]
encoder  `image` [B, 3, H, W], `noise` [B, C, h, w]                               `latent` [B, C, h, w]
=======  =======================================================================  ============================

Inputs and outputs are float32 whatever the precision inside. Images are in [-1, 1]; h, w are the tile's sides
in latent pixels, H, W in output pixels. A graph may lack any input but the first of its row. `prompt` is the
index of the tile's prompt; prompt 1 is the negative one. An expert with a shallow graph has a second output,
`deep`, of any size; the shallow graph takes it in place of computing the deep levels. The role `unrefined` is
the decoder without its refinement network.
"""

from __future__ import annotations

from collections.abc import Mapping

from moesr.runtime.engine.graph_spec import BATCH, Boundary, Graph, TensorSpec

DECODER, ENCODER = "decoder", "encoder"
UNREFINED = "unrefined"
DEEP = "deep"


def boundary_of(
    role: str,
    tile: int,
    latent_channels: int,
    latent_factor: int,
    prediction: str = "eps",
    *,
    with_latent: bool = False,
    with_prompt: bool = False,
) -> Boundary:
    """Return all inputs that the runtime can feed to the graph of a role, and the outputs that it reads.

    `tile` is in output pixels. With `with_latent` the condition is a latent; with `with_prompt` there are two
    prompts.
    """
    side = tile // latent_factor
    latent = (BATCH, latent_channels, side, side)
    image = (BATCH, 3, tile, tile)
    condition = latent if with_latent else (BATCH, 3, side, side)
    if role in (DECODER, UNREFINED):
        inputs, output = {"z": latent, "lr": image, "fidelity": (BATCH,)}, ("image", image)
    elif role == ENCODER:
        inputs, output = {"image": image, "noise": latent}, ("latent", latent)
    else:
        inputs, output = {"z_t": latent, "cond": condition, "t": (BATCH,)}, (prediction, latent)
        inputs |= {"prompt": (BATCH,)} if with_prompt else {}
    return Boundary(tuple(_spec(*item) for item in inputs.items()), (_spec(*output),))


def deep_of(graph: Graph) -> TensorSpec | None:
    """Return the output of an expert that its shallow graph reuses, or None if it has no such output."""
    return next((s for s in graph.outputs[1:] if _spec(DEEP, s.dims) == s and _is_feature(s)), None)


def deep_size(deep: TensorSpec) -> tuple[int, int, int]:
    """Return the channels, height and width of the features of one tile."""
    _, channels, height, width = deep.shape(1)
    return channels, height, width


def _is_feature(spec: TensorSpec) -> bool:
    sizes = spec.dims[1:]
    return spec.per_tile and len(sizes) == 3 and all(isinstance(size, int) and size > 0 for size in sizes)


def mismatches(graphs: Mapping[str, Graph], offered: Mapping[str, Boundary]) -> list[str]:
    """Return messages about graphs whose inputs or outputs do not fit the runtime.

    Both arguments are by role.
    """
    found = []
    for role, graph in graphs.items():
        full = offered[role]
        inputs = {spec.name: spec for spec in full.inputs}
        known = all(_fits(spec, inputs.get(spec.name)) for spec in graph.inputs)
        needed = {full.inputs[0].name} | ({DEEP} & inputs.keys())
        taken = {spec.name for spec in graph.inputs}
        if not (known and needed <= taken and graph.outputs == full.outputs):
            found.append(f"{role} is {graph.boundary}, expected {full}")
    return found


def _fits(spec: TensorSpec, offered: TensorSpec | None) -> bool:
    """Return True if an input fits; in schema 1 one value could serve all tiles of a run."""
    if offered is None:
        return False
    return spec == offered or (offered.dims == (BATCH,) and spec.dims == (1,) and spec.dtype == offered.dtype)


def _spec(name: str, dims: tuple[int | str, ...]) -> TensorSpec:
    return TensorSpec(name, "float32", dims)
