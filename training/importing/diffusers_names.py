"""Rename weights of Stable Diffusion from the diffusers layout to the layout of the published checkpoints.

The library diffusers names layers by level and block, as in `down_blocks.1.resnets.0.conv1.weight`. The
published layout numbers the UNet's blocks consecutively, as in `input_blocks.4.0.in_layers.2.weight`. The
text tower in the diffusers layout is that of the library transformers, with separate queries, keys and
values. Keys that match no rule keep their names, so that a later check against the network reports them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
Part = Literal["unet", "vae", "text"]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {
    "group_norm": "norm",
    **dict.fromkeys(("to_q", "query"), "q"),
    **dict.fromkeys(("to_k", "key"), "k"),
    **dict.fromkeys(("to_v", "value"), "v"),
    **dict.fromkeys(("to_out.0", "proj_attn"), "proj_out"),
}
"""Attention layers of the autoencoder's middle block: current diffusers names and names before 2023."""

TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
TEXT_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")
POSITIONS = "embeddings.position_ids"  # a buffer that older files hold: 0, 1, 2, ...


def part_of(state: StateDict) -> Part | None:
    """Return which diffusers network a state dict belongs to; None if it is none of them."""
    if "time_embedding.linear_1.weight" in state:
        return "unet"
    if "encoder.mid_block.resnets.0.conv1.weight" in state:
        return "vae"
    return "text" if any(key.endswith("embeddings.token_embedding.weight") for key in state) else None


def unet_state(state: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a UNet."""
    blocks = 1 + max(
        (int(m[1]) for m in (re.match(r"down_blocks\.0\.resnets\.(\d+)\.", k) for k in state) if m), default=0
    )
    attended = {m[1] for m in (re.match(r"up_blocks\.(\d+)\.attentions\.", k) for k in state) if m}

    def place(match: re.Match[str]) -> str:
        """Published name of a layer in a down or up block."""
        way, level, kind, number, rest = match.groups()
        stage = "input_blocks" if way == "down" else "output_blocks"
        first = int(level) * (blocks + 1) + (way == "down")
        if kind == "resnets":
            return f"{stage}.{first + int(number)}.0.{_resnet(rest)}"
        if kind == "attentions":
            return f"{stage}.{first + int(number)}.1.{rest}"
        if kind == "downsamplers":
            return f"{stage}.{first + blocks}.0.{rest.replace('conv.', 'op.', 1)}"
        return f"{stage}.{first + blocks}.{1 + (level in attended)}.{rest}"

    layers = r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
    middle = r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)"
    return _renamed(state, {layers: place, middle: _middle, _any(UNET): lambda m: f"{UNET[m[1]]}.{m[2]}"})


def _middle(match: re.Match[str]) -> str:
    kind, number, rest = match.groups()
    if kind == "attentions":
        return f"middle_block.{2 * int(number) + 1}.{rest}"
    return f"middle_block.{2 * int(number)}.{_resnet(rest)}"


def _resnet(rest: str) -> str:
    layer, _, entry = rest.partition(".")
    return f"{RESNET.get(layer, layer)}.{entry}"


def vae_state(state: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a KL autoencoder; linear layers of the middle block become 1x1 convolutions."""
    ups = (re.match(r"decoder\.up_blocks\.(\d+)\.", key) for key in state)
    levels = 1 + max((int(m[1]) for m in ups if m), default=0)

    def block(match: re.Match[str]) -> str:
        side, way, level, kind, number, rest = match.groups()
        at = int(level) if way == "down" else levels - 1 - int(level)
        if kind == "resnets":
            return f"{side}.{way}.{at}.block.{number}.{_shortcut(rest)}"
        return f"{side}.{way}.{at}.{kind.removesuffix('rs')}.{rest}"

    def attention(match: re.Match[str]) -> str:
        return f"{match[1]}.mid.attn_1.{ATTENTION[match[2]]}.{match[3]}"

    renamed = _renamed(
        state,
        {
            r"(\w+)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)": block,
            r"(\w+)\.mid_block\.resnets\.(\d+)\.(.+)": lambda m: (
                f"{m[1]}.mid.block_{int(m[2]) + 1}.{_shortcut(m[3])}"
            ),
            rf"(\w+)\.mid_block\.attentions\.0\.{_any(ATTENTION)}": attention,
            r"(\w+)\.conv_norm_out\.(.+)": lambda m: f"{m[1]}.norm_out.{m[2]}",
        },
    )
    linear = re.compile(r"\w+\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {k: v[:, :, None, None] if linear.fullmatch(k) and v.ndim == 2 else v for k, v in renamed.items()}


def _shortcut(rest: str) -> str:
    return rest.replace("conv_shortcut.", "nin_shortcut.", 1)


def text_state(state: StateDict) -> dict[str, Tensor]:
    """Rename the weights of a text tower.

    The published tower has one more layer, a projection and a scale. They are not used and the diffusers
    layout does not store them, so they become zeros.
    """
    bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    bare.pop(POSITIONS, None)
    joined: dict[str, Tensor] = {}
    for key in list(bare):
        match = re.fullmatch(r"(encoder\.layers\.\d+\.self_attn)\.q_proj\.(weight|bias)", key)
        names = [f"{match[1]}.{p}.{match[2]}" for p in PROJECTIONS] if match else []
        if names and all(name in bare for name in names):
            joined[f"{match[1]}.in_proj_{match[2]}"] = torch.cat([bare.pop(name) for name in names])  # type: ignore[index]

    def layer(match: re.Match[str]) -> str:
        number, rest = match.groups()
        found = re.fullmatch(rf"{_any(TEXT_LAYER)}", rest)
        inner = f"{TEXT_LAYER[found[1]]}.{found[2]}" if found else rest.replace("self_attn.", "attn.", 1)
        return f"transformer.resblocks.{number}.{inner}"

    whole = {TEXT.get(key, key): tensor for key, tensor in {**bare, **joined}.items()}
    renamed = _renamed(whole, {r"encoder\.layers\.(\d+)\.(.+)": layer})
    return {f"model.{key}": tensor for key, tensor in {**renamed, **_unused(renamed)}.items()}


def _unused(state: StateDict) -> dict[str, Tensor]:
    """Return zeros for the unused tensors of the published tower."""
    first = "transformer.resblocks.0."
    layers = {m[1] for m in (re.match(r"transformer\.resblocks\.(\d+)\.", key) for key in state) if m}
    last = f"transformer.resblocks.{len(layers)}."
    unused = {
        key.replace(first, last): torch.zeros_like(tensor)
        for key, tensor in state.items()
        if key.startswith(first)
    }
    norm = state.get("ln_final.weight")
    if norm is not None:
        unused["text_projection"] = norm.new_zeros(len(norm), len(norm))
        unused["logit_scale"] = norm.new_zeros(())
    return unused


def _renamed(state: StateDict, rules: Mapping[str, Callable[[re.Match[str]], str]]) -> dict[str, Tensor]:
    """Rename every key of `state` by the first rule whose regular expression matches the whole key."""
    result = {}
    for key, tensor in state.items():
        matches = ((rule, re.fullmatch(pattern, key)) for pattern, rule in rules.items())
        result[next((rule(match) for rule, match in matches if match), key)] = tensor
    return result


def _any(names: Mapping[str, str]) -> str:
    """Return a regular expression for any of these names, followed by a dot and the rest of the key."""
    return rf"({'|'.join(map(re.escape, names))})\.(.+)"
