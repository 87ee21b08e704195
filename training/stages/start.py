"""Initial weights of narrow networks: they pass colors through, which random weights hardly ever learn to do.

This is not from the papers, whose networks are wide and start from published weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesr.training.data.crops import resize_batch, to_float
from moesr.training.networks import Autoencoder
from moesr.training.networks.fusion import RESIDUAL_SCALE

COLORS = 3
KEPT = 0.03  # factor of the first stage's features, which are ten times as large as the LR image's
OFFSETS = 3.0  # standard deviation of the constants in the channels beside the colors
RIDGE = 1e-4

PASSING = re.compile(r"(.*\.)?(conv_in|downsample\.conv|upsample\.conv|nin_shortcut|encode_enc_1\.conv_out)")
ENDING = re.compile(r".*(block[._]\d+|encode_enc_\d)\.conv2")  # last layers of residual blocks
OTHERS = re.compile(r".*(quant_conv|attn_1\.\w+|unet_1\..*)")  # layers that keep PyTorch's initialization
GAINS, HE = {1.0: PASSING, 0.5: ENDING}, 2.0  # gains; the variance of weights is gain / number of inputs
FAINT = 1e-3  # standard deviation of the last layer's weights
RESIDUAL = re.compile(r".*(block\.\d+\.conv2|rdb\d\.conv5)$")


@torch.no_grad()
def pass_on(layers: Sequence[tuple[str, nn.Module]], kept: float, offsets: float) -> None:
    """Make layers copy their first three channels, and make residual blocks add nothing.

    The random weights are kept with the factor `kept`. Constants with the standard deviation `offsets` in the
    other channels prevent GroupNorm from removing the mean and the contrast of a crop.
    """
    for name, layer in layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            if PASSING.fullmatch(name):
                layer.weight.mul_(kept).add_(nn.init.dirac_(torch.zeros_like(layer.weight)))
                nn.init.zeros_(layer.bias[:COLORS])
                nn.init.normal_(layer.bias[COLORS:], std=offsets)
            elif RESIDUAL.fullmatch(name):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def keep_scale(network: Autoencoder) -> None:
    """Initialize the layers of a network without normalization so that they keep the scale of features.

    PyTorch's initialization would lose a third of the variance at every layer, and the gradient with it.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.groups == 1 and not OTHERS.fullmatch(name):
            gain = next((gain for gain, names in GAINS.items() if names.fullmatch(name)), HE)
            nn.init.normal_(layer.weight, std=math.sqrt(gain / layer.weight[0].numel()))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    nn.init.normal_(network.decoder.conv_out.weight, std=FAINT)


@torch.no_grad()
def add_to_lr(network: Autoencoder) -> None:
    """Initialize a decoder that adds to the LR image: it adds nothing, and its layers keep the scale."""
    keep_scale(network)
    nn.init.zeros_(network.decoder.conv_in.weight)  # else the latent's features would dominate
    pass_refinement(network)


@torch.no_grad()
def pass_lr(network: Autoencoder, batch: Sequence[Tensor]) -> None:
    """Make the LR image's colors pass from the encoder to the image, next to the first stage's features.

    The last layer is fitted to `batch` (number, HR, LR, latent) by least squares.
    """
    encoder, decoder, level = network.encoder, network.decoder, network.config.fusion_level
    assert level is not None, "the decoder has no layer that fuses the LR image"
    fusion = decoder.fusions[level]
    pass_on([("conv_in", encoder.conv_in), *encoder.down.named_modules(prefix="down")], 0.1, 1.0)
    pass_on(list(fusion.encode_enc_2.named_modules()), 0.0, 0.0)
    weight = fusion.get_parameter("encode_enc_1.conv_out.weight")
    count = len(weight)
    nn.init.dirac_(weight)
    kept = torch.full((count,), KEPT)
    kept[:COLORS] = 0.0
    weight[:, count:, 0, 0] = torch.diag(kept - 1.0)  # the layer is residual: a factor `kept` remains
    weight /= (1.0 + RESIDUAL_SCALE) ** len(fusion.encode_enc_2)  # an RRDB that adds nothing still gains
    pass_on(list(decoder.up[:level].named_modules()), 0.0, OFFSETS)
    if level:
        pass_on([("upsample.conv", decoder.up[level].get_submodule("upsample.conv"))], 0.0, OFFSETS)
    pass_refinement(network)
    fit_last_layer(network, batch)


def pass_refinement(network: Autoencoder) -> None:
    """Make the refinement network, if there is one, add nothing to its input."""
    refinement = getattr(network.decoder, "unet_1", None)
    if refinement is not None:
        for block in (refinement.conv1, refinement.up_conv2):
            nn.init.zeros_(block.norm2.weight)
            nn.init.zeros_(block.mlp.block.red_1x1.block.norm.weight)


def fit_last_layer(network: Autoencoder, batch: Sequence[Tensor]) -> None:
    """Set the decoder's last layer to the ridge regression of HR on its input features."""
    _, hr, lr, z = batch[:4]
    last, seen = network.decoder.conv_out, list[Tensor]()
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.train().decode(z, to_float(resize_batch(lr, *hr.shape[-2:])))
    hook.remove()
    patches = F.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    patches = torch.cat((patches, torch.ones_like(patches[:, :1])), dim=1)
    target = to_float(hr).permute(0, 2, 3, 1).reshape(-1, COLORS).double()
    gram = patches.T @ patches
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()))
    solution = torch.linalg.solve(gram, patches.T @ target).float()
    assert last.bias is not None
    last.weight.copy_(solution[:-1].T.reshape(last.weight.shape))
    last.bias.copy_(solution[-1])
