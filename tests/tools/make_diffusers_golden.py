"""Make `tests/assets/goldens/stable_diffusion.npz`, outputs of the libraries diffusers and transformers:

  pip install diffusers transformers; python tests/tools/make_diffusers_golden.py

The networks are narrow and run in float32 on a CPU. Their weights are generated from the names that the
libraries give the tensors (`weights_of_names.py`, salt "dev"), so the file holds only inputs and outputs:
`z`, `t`, `context` -> `eps`; `image` -> `moments`; `latent` -> `decoded`; `ids` -> `encoded` (first tokens).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from weights_of_names import weights

TOKENS = 12
OUT = Path(__file__).resolve().parents[1] / "assets" / "goldens" / "stable_diffusion.npz"


def networks() -> tuple[Any, Any, Any]:
    """Return a UNet, an autoencoder and a text encoder with the structure of Stable Diffusion 2.1."""
    diffusers, transformers = (importlib.import_module(name) for name in ("diffusers", "transformers"))
    widths = (32, 64, 128, 128)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=widths,
        attention_head_dim=(2, 4, 8, 8),  # numbers of heads, despite the name
        cross_attention_dim=64,
        use_linear_projection=True,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths,
        layers_per_block=2,
    )
    config = transformers.CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_act="gelu",
    )
    return unet, vae, transformers.CLIPTextModel(config)


def fill(network: torch.nn.Module, before: str = "") -> None:
    """Fill a network with weights generated from the tensors' names; in files these begin with `before`."""
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    made = weights({before + key.removeprefix(before): shape for key, shape in shapes.items()}, "dev")
    state = {key: torch.from_numpy(made[before + key.removeprefix(before)]) for key in shapes}
    network.load_state_dict(state)
    network.eval()


@torch.inference_mode()
def main() -> None:
    """Compute the outputs and write the file."""
    unet, vae, text = networks()
    fill(unet)
    fill(vae)
    fill(text, "text_model.")
    rng = np.random.default_rng(0)
    given = {
        "z": rng.standard_normal((1, 4, 8, 16), np.float32),
        "t": np.array([700]),
        "context": rng.standard_normal((1, 16, 64), np.float32),
        "image": rng.uniform(-1, 1, (1, 3, 16, 24)).astype(np.float32),
        "latent": rng.standard_normal((1, 4, 2, 3), np.float32),
        "ids": np.pad(rng.integers(1, 49408, (1, 9)), ((0, 0), (0, 68))),
    }
    x = {key: torch.from_numpy(value) for key, value in given.items()}
    found = {
        "eps": unet(x["z"], x["t"], x["context"]).sample,
        "moments": vae.encode(x["image"]).latent_dist.parameters,
        "decoded": vae.decode(x["latent"]).sample,
        "encoded": text(x["ids"]).last_hidden_state[:, :TOKENS],
    }
    np.savez_compressed(OUT, **given, **{key: value.numpy() for key, value in found.items()})


if __name__ == "__main__":
    main()
