"""Names and shapes of the tensors of Stable Diffusion as the library diffusers stores them, for any width."""

from __future__ import annotations

from collections.abc import Iterator

Shapes = dict[str, list[int]]


def unet_shapes(width: int, text: int, mult: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2) -> Shapes:
    """Return the shapes of a `UNet2DConditionModel`.

    All levels except the lowest attend to a text of `text` channels.
    """
    emb, levels = 4 * width, [width * m for m in mult]
    out = {**_conv("conv_in", width, 4), **_linear("time_embedding.linear_1", emb, width)}
    out |= _linear("time_embedding.linear_2", emb, emb)
    skips, channels = [width], width
    for i, c in enumerate(levels):
        for j in range(blocks):
            out |= _resnet(f"down_blocks.{i}.resnets.{j}", channels, c, emb)
            out |= _transformer(f"down_blocks.{i}.attentions.{j}", c, text) if i < len(levels) - 1 else {}
            channels = c
            skips.append(c)
        if i < len(levels) - 1:
            out |= _conv(f"down_blocks.{i}.downsamplers.0.conv", c, c)
            skips.append(c)
    out |= _resnet("mid_block.resnets.0", channels, channels, emb)
    out |= _transformer("mid_block.attentions.0", channels, text)
    out |= _resnet("mid_block.resnets.1", channels, channels, emb)
    for i, c in enumerate(reversed(levels)):
        for j in range(blocks + 1):
            out |= _resnet(f"up_blocks.{i}.resnets.{j}", channels + skips.pop(), c, emb)
            out |= _transformer(f"up_blocks.{i}.attentions.{j}", c, text) if i else {}
            channels = c
        out |= _conv(f"up_blocks.{i}.upsamplers.0.conv", c, c) if i < len(levels) - 1 else {}
    return {**out, **_norm("conv_norm_out", width), **_conv("conv_out", 4, width)}


def vae_shapes(width: int, mult: tuple[int, ...] = (1, 2, 4, 4), blocks: int = 2) -> Shapes:
    """Return the shapes of an `AutoencoderKL`."""
    levels = [width * m for m in mult]
    out, channels = _conv("encoder.conv_in", width, 3), width
    for i, c in enumerate(levels):
        for j in range(blocks):
            out |= _resnet(f"encoder.down_blocks.{i}.resnets.{j}", channels, c)
            channels = c
        out |= _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", c, c) if i < len(levels) - 1 else {}
    out |= _middle("encoder", channels)
    out |= {**_norm("encoder.conv_norm_out", channels), **_conv("encoder.conv_out", 8, channels)}
    out |= {**_conv("decoder.conv_in", channels, 4), **_middle("decoder", channels)}
    for i, c in enumerate(reversed(levels)):
        for j in range(blocks + 1):
            out |= _resnet(f"decoder.up_blocks.{i}.resnets.{j}", channels, c)
            channels = c
        out |= _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", c, c) if i < len(levels) - 1 else {}
    out |= {**_norm("decoder.conv_norm_out", channels), **_conv("decoder.conv_out", 3, channels)}
    return {**out, **_conv("quant_conv", 8, 8, 1), **_conv("post_quant_conv", 4, 4, 1)}


def text_shapes(width: int, layers: int, tokens: int = 77, vocabulary: int = 49408) -> Shapes:
    """Return the shapes of a transformers `CLIPTextModel`, which stores only the layers that are run."""
    out = {
        "text_model.embeddings.token_embedding.weight": [vocabulary, width],
        "text_model.embeddings.position_embedding.weight": [tokens, width],
    }
    for i in range(layers):
        layer = f"text_model.encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            out |= _linear(f"{layer}.self_attn.{name}", width, width)
        out |= _norm(f"{layer}.layer_norm1", width)
        out |= {
            **_linear(f"{layer}.mlp.fc1", 4 * width, width),
            **_linear(f"{layer}.mlp.fc2", width, 4 * width),
        }
        out |= _norm(f"{layer}.layer_norm2", width)
    return {**out, **_norm("text_model.final_layer_norm", width)}


def _conv(name: str, out: int, channels: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": [out, channels, side, side], f"{name}.bias": [out]}


def _linear(name: str, out: int, channels: int) -> Shapes:
    return {f"{name}.weight": [out, channels], f"{name}.bias": [out]}


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": [channels], f"{name}.bias": [channels]}


def _resnet(name: str, channels: int, out: int, emb: int = 0) -> Shapes:
    shapes = {**_norm(f"{name}.norm1", channels), **_conv(f"{name}.conv1", out, channels)}
    shapes |= _linear(f"{name}.time_emb_proj", out, emb) if emb else {}
    shapes |= {**_norm(f"{name}.norm2", out), **_conv(f"{name}.conv2", out, out)}
    return shapes | (_conv(f"{name}.conv_shortcut", out, channels, 1) if out != channels else {})


def _transformer(name: str, c: int, text: int) -> Shapes:
    block = f"{name}.transformer_blocks.0"
    shapes = {**_norm(f"{name}.norm", c), **_linear(f"{name}.proj_in", c, c)}
    for norm, attention, source in (("norm1", "attn1", c), ("norm2", "attn2", text)):
        shapes |= _norm(f"{block}.{norm}", c)
        shapes |= {f"{block}.{attention}.to_q.weight": [c, c]}
        shapes |= {f"{block}.{attention}.{p}.weight": [c, source] for p in ("to_k", "to_v")}
        shapes |= _linear(f"{block}.{attention}.to_out.0", c, c)
    shapes |= {**_norm(f"{block}.norm3", c), **_linear(f"{block}.ff.net.0.proj", 8 * c, c)}
    return {**shapes, **_linear(f"{block}.ff.net.2", c, 4 * c), **_linear(f"{name}.proj_out", c, c)}


def _middle(side: str, c: int) -> Shapes:
    attention = f"{side}.mid_block.attentions.0"
    shapes = {**_norm(f"{attention}.group_norm", c)}
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= _linear(f"{attention}.{layer}", c, c)
    for j in (0, 1):
        shapes |= _resnet(f"{side}.mid_block.resnets.{j}", c, c)
    return shapes


def old_vae_names(shapes: Shapes) -> Iterator[tuple[str, str]]:
    """Return pairs (current name, name before 2023) of the tensors of the autoencoder's attention."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key in shapes:
        for new, before in old.items():
            if f".attentions.0.{new}." in key:
                yield key, key.replace(f".{new}.", f".{before}.")
