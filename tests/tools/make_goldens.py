"""Write the goldens in `tests/assets/goldens` from the whole set of reference data:

  python tests/tools/make_goldens.py DIRECTORY

The goldens are inputs and outputs of the published networks and scripts, computed in float32 on a CPU; none
were computed by this project. Weights are generated from the names of the tensors (`weights_of_names.py`),
so no file holds weights. Inputs are complete. Results with more than `WHOLE` elements are sampled (see
`sample`); they are in brackets here.

unet_w32      width 32, two samples of 32x32: x, t -> eps
unet_w160     full width, one sample of 128x128: x, t -> [eps]
decoder_c32   32 channels, 256 codes, 128x128: lr_upsampled, z -> [image_w1], [image_w05], [image_w0],
              [lr_feature], prequant, codes; the refinement network alone, 64x48: aff_in ->
              [aff_filter_out], [aff_block_out], [aff_unet_out]
decoder_c128  full width, 512x512, LR image from a seed: z -> [image_every_4th]
ddim_s8_eta1  whole sampling loop over four experts of width 32: x_T, cond, noise -> x_0, and its tables
ddim_s5_eta0  a sampling loop of five steps without noise
schedule      alpha_bar, timesteps and sigmas for 200, 100, 50 and 20 steps
imresize      MATLAB's bicubic: small -> up2, [up8]; large -> down8, down4
colour_and_ffl  content, style -> [adain], [wavelet]; focal frequency loss: ffl_pred, ffl_target -> ffl
stablesr_unet   width 32, two samples of 16x24: x, t, context, struct -> out, and parts of the network;
                full width from seeds: [full.out]
stablesr_structcond  width 32, cases a and b: x, t -> [out]; full width from a seed: [full.out]
stablesr_text   width 64: token ids -> [out]; full width: [full.out]
stablesr_vae_cfw  32 channels, 64x96: image, noise, z -> moments, latent, [features], [images]
stablesr_loop   six steps of DDPM with and without guidance, and over a canvas of tiles
stablesr_ddim   five steps of DDIM with and without guidance
stablesr_schedule  tables for 1000, 200, 50, 6 and 4 steps of DDPM, 50, 20 and 5 of DDIM; tile weights
sd15_decoder_c32   32 channels: image, image_wide, noise -> moments, sample; z, z_wide -> [decoded],
              [decoded_plain] without the refinement network, [before], [after] it; small features through
              two parts of it
sd15_decoder_c128  full width: image -> moments; z -> [decoded], [decoded_plain]
stable_diffusion  computed by diffusers and transformers (`make_diffusers_golden.py`)
keys.json     a hash of the names and shapes of each published network's tensors
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).resolve().parents[1] / "assets" / "goldens"
STEMS = (
    "unet_w32",
    "unet_w160",
    "decoder_c32",
    "decoder_c128",
    "ddim_s8_eta1",
    "ddim_s5_eta0",
    "schedule",
    "imresize",
    "colour_and_ffl",
    "stablesr_unet",
    "stablesr_structcond",
    "stablesr_text",
    "stablesr_vae_cfw",
    "stablesr_loop",
    "stablesr_ddim",
    "stablesr_schedule",
    "sd15_decoder_c32",
    "sd15_decoder_c128",
)
SD15 = {"sd15_decoder_c32": "narrow", "sd15_decoder_c128": "full"}
RESULTS = re.compile(
    r"(.+\.)?out(\.\d+)?|aff_.+_out|image_(?!wide).+|eps|lr_feature|fea_level\d|adain|wavelet|up8"
    r"|tiny_.+_out|decoded.*|(before|after)_wide"
)  # names of the arrays that `cut` may sample
WHOLE = 8192  # largest number of elements of a result that is stored completely
EVERY = 13  # step of the samples; no side of an image or feature map is a multiple of it


def cut(stem: str, whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of the golden `stem` as the project stores them."""
    kept = {key: sample(value) if RESULTS.fullmatch(key) else value for key, value in whole.items()}
    if stem == "ddim_s5_eta0":
        kept["noise"] = np.zeros_like(kept["noise"])  # multiplied by 0 when eta is 0
    if "codes" in kept:
        kept["codes"] = kept["codes"].astype(np.int16)
    return kept


def sample(result: np.ndarray) -> np.ndarray:
    """Return every `EVERY`-th element of a result in C order, [n], or a small result unchanged.

    Since `EVERY` divides no side, the sample holds elements of all rows, columns and channels.
    """
    return result if result.size <= WHOLE else result.reshape(-1)[::EVERY]


def digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """Return a hash of the names and shapes of a network's tensors, independent of their order."""
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def digests(reference: Path) -> dict[str, str]:
    """Return the hash of each published network by the key lists in the directory `reference`."""
    keys = json.loads((reference / "checkpoint_keys.json").read_text())
    stablesr = json.loads((reference / "stablesr_keys.json").read_text())
    sd15 = json.loads((reference / "sd15_decoder_keys.json").read_text())
    keys |= {f"stablesr_{name}": shapes for name, shapes in stablesr.items()}
    keys |= {name: sd15[f"sd15_decoder_{kind}"] for name, kind in SD15.items()}
    return {name: digest(shapes) for name, shapes in sorted(keys.items())}


def main() -> None:
    """Write all goldens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path, help="directory with golden/ and the key lists")
    reference: Path = parser.parse_args().reference
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for stem in STEMS:
        with np.load(reference / "golden" / f"{stem}.npz") as whole:
            np.savez_compressed(GOLDENS / f"{stem}.npz", **cut(stem, whole))
    (GOLDENS / "keys.json").write_text(json.dumps(digests(reference), indent=1) + "\n")


if __name__ == "__main__":
    main()
