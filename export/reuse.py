"""Feature reuse: experts that also return deep features, and shallow graphs that start from them.

The deep levels of a UNet change little between neighboring steps (DeepCache: Ma et al., CVPR 2024). The full
graph returns, besides its prediction, the input features of its last output blocks; the shallow graph
consists of these blocks alone. Both are proved like any graph. Afterwards their weights are moved to a file
that they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from moesr.export import parity
from moesr.export.external_weights import ALIGNMENT, SMALL_BYTES, refer
from moesr.export.graphs.expert import shallow_parts
from moesr.export.lowering import SHALLOW_BLOCKS
from moesr.runtime.engine.graph_io import DEEP
from moesr.runtime.engine.graph_spec import Arrangement, File, Graph
from moesr.runtime.errors import UsageError
from moesr.training.config import ModelConfig, StableSRConfig
from moesr.training.networks import DenoisingUNet
from moesr.training.networks.unet import Conditions


class ShallowExpert(nn.Module):
    """The network that a shallow graph computes."""

    def __init__(self, unet: DenoisingUNet, blocks: int) -> None:
        super().__init__()
        self.unet, self.blocks = unet, blocks

    def forward(self, z_t: Tensor, cond: Tensor, t: Tensor, deep: Tensor) -> Tensor:
        """Predict eps from the expert's inputs and the features `deep` of this or an earlier step."""
        x, given = torch.cat((z_t, cond), dim=1), Conditions(self.unet.embed(t))
        return self.unet.run_shallow(x, given, self.blocks, deep)

    @property
    def params(self) -> int:
        """The number of parameters of the modules that it runs."""
        parts = [self.unet.time_embed, *shallow_parts(self.unet, self.blocks)]
        return sum(p.numel() for part in parts for p in part.parameters())


class DeepFeatures(nn.Module):
    """The network that computes the second output of a full graph."""

    def __init__(self, unet: DenoisingUNet, blocks: int) -> None:
        super().__init__()
        self.unet, self.blocks = unet, blocks

    def forward(self, z_t: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        """Compute the deep features from the expert's inputs."""
        x, given = torch.cat((z_t, cond), dim=1), Conditions(self.unet.embed(t))
        return self.unet.deep(x, given, self.blocks)


def check_blocks(model: ModelConfig, asked: int) -> None:
    """Raise UsageError, naming the range, if a model has no shallow graph of this many output blocks."""
    config = model.unet
    if config is None or isinstance(model, StableSRConfig):
        raise UsageError(f"--reuse: {model.name} has no shallow graphs; export it without --reuse")
    most = len(config.channel_mult) * (config.res_blocks + 1) - 1
    if not 1 <= asked <= most:
        raise UsageError(
            f"--reuse {asked}: expected 1 to {most} of the network's {most + 1} output blocks, or no number "
            f"for the last {SHALLOW_BLOCKS}"
        )


def shared(
    directory: Path, graphs: Mapping[str, Graph], full: str, shallow: str, params: int
) -> dict[str, Graph]:
    """Move the weights of two graphs to shared files, one per arrangement; returns their new entries.

    `full` and `shallow` are roles, and `params` is the number of parameters of the shallow graph.
    Arrangements that only one of the two has keep their weights.
    """
    pair = graphs[full], replace(graphs[shallow], params=params)
    targets = sorted(pair[0].variants.keys() & pair[1].variants.keys())
    own = _merge_weights(directory, full, *pair)
    variants = {
        t: _merge_weights(directory, f"{full}.{t}", *(graph.variants[t] for graph in pair)) for t in targets
    }
    found = {}
    for index, (role, graph) in enumerate(zip((full, shallow), pair, strict=True)):
        moved = graph.variants | {target: variants[target][index] for target in targets}
        found[role] = replace(graph, sha256=own[index].sha256, data=own[index].data, variants=moved)
    return found


def _merge_weights(directory: Path, name: str, *arrangements: Arrangement) -> list[Arrangement]:
    """Move the weights of graph files to one file, which holds equal weights once."""
    models = [onnx.load(directory / a.file) for a in arrangements]  # with external weights
    apart = {file.file for a in arrangements for file in a.data}
    data, places = bytearray(), dict[bytes, tuple[int, int]]()
    path = directory / f"{name}.weights"
    for tensor in (tensor for model in models for tensor in model.graph.initializer):
        raw = tensor.raw_data
        if len(raw) < SMALL_BYTES:
            continue
        key = hashlib.sha256(raw).digest()
        if key not in places:
            places[key] = len(data), len(raw)
            data += raw + bytes(-len(raw) % ALIGNMENT)
        refer(tensor, path.name, *places[key])
    path.write_bytes(data)
    listed, entries = File(path.name, hashlib.sha256(data).hexdigest()), []
    for arrangement, model in zip(arrangements, models, strict=True):
        # a compiled plan is identified by the hash of its graph's file, which must cover the weights
        del model.metadata_props[:]
        model.metadata_props.add(key=listed.file, value=listed.sha256)
        content = model.SerializeToString(deterministic=True)
        (directory / arrangement.file).write_bytes(content)
        entries.append(replace(arrangement, sha256=hashlib.sha256(content).hexdigest(), data=(listed,)))
    for file in apart:
        (directory / file).unlink()
    return entries


def recorded(unet: DenoisingUNet, inputs: Sequence[parity.Inputs], blocks: int) -> list[parity.Inputs]:
    """Return inputs to calibrate a shallow graph: an expert's steps with the features of the step before.

    The first step of an image, which has the highest t, gets its own features.
    """
    found, before = [], None
    for given in inputs:
        whole = shallow_inputs(unet, given, blocks)
        same_image = before is not None and given["t"][0] < before["t"][0]
        found.append(whole | ({DEEP: before[DEEP]} if before is not None and same_image else {}))
        before = whole
    return found


def shallow_inputs(unet: DenoisingUNet, inputs: parity.Inputs, blocks: int) -> parity.Inputs:
    """Return an expert's inputs together with the deep features that it computes from them."""
    return inputs | {DEEP: parity.network_output(DeepFeatures(unet, blocks), inputs)}
