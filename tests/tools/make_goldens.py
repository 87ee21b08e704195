"""Cut the goldens that lie in `tests/assets/goldens` from the whole set of reference data:

  python tests/tools/make_goldens.py DIRECTORY

All hold outputs of the published networks and scripts in float32 on a CPU; none are of this project. Weights
are made from their names (`weights_of_names.py`), so no file holds any. Arrays in brackets are every
`every`-th pixel in both directions, from number `every // 2` on: the error is largest at the borders.

unet_w32      width 32, one sample of 32x32: x, t -> eps
decoder_c32   32 channels, 256 codes, 128x128: lr_upsampled, z -> [image_w1], [image_w05], [image_w0],
              [lr_feature], prequant, codes; without the AFF filter alone
ddim_s8_eta1  whole sampling loop over four experts of width 32: x_T, cond, noise -> x_0, and its tables
ddim_s5_eta0  the same without noise
schedule      alpha_bar, timesteps and sigmas for 200, 100, 50 and 20 steps
imresize      MATLAB's bicubic: small -> up2, [up8]; large -> down8, down4
colour_and_ffl  one channel: content, style -> [adain], [wavelet]; without the focal frequency loss
stablesr_unet   width 32, one sample of 16x24: x, t, context, struct -> out
stablesr_structcond  width 32, one sample of 16x24: x, t -> out
stablesr_text   width 64: token ids -> [out]
stablesr_vae_cfw  32 channels, 64x96: image, noise, z -> moments, latent, [features], [images]
stablesr_schedule  tables for 6 and 4 steps of DDPM, 5 of DDIM; tile weights
stable_diffusion  is of diffusers and transformers (`make_diffusers_golden.py`)
keys.json     a hash of the names and shapes of each published network's tensors
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

GOLDENS = Path(__file__).resolve().parents[1] / "assets" / "goldens"
EVERY = {"decoder_c32": 8, "imresize": 8, "colour_and_ffl": 4, "stablesr_text": 4, "stablesr_vae_cfw": 4}
THINNED = (
    "image_w1",
    "image_w05",
    "image_w0",
    "lr_feature",
    "adain",
    "wavelet",
    "fea_level1",
    "fea_level2",
    "out",
)
LEFT_OUT = ("aff_", "ffl", "mid.", "full.", "a.", "s200.", "s50.", "ddim50.", "ddim20.")
LEFT_OUT += ("s1000.sqrt", "s1000.posterior")
FIRST_SAMPLE = ("unet_w32", "stablesr_unet", "stablesr_structcond")


def cut(stem: str, whole: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The part of the golden `stem` that is kept."""
    kept = {key: value for key, value in whole.items() if not key.startswith(LEFT_OUT)}
    if stem in FIRST_SAMPLE:
        kept = {key: value[:1] for key, value in kept.items()}
    if stem == "ddim_s5_eta0":
        kept["noise"] = np.zeros_like(kept["noise"])  # eta 0 takes none
    if stem == "colour_and_ffl":
        kept = {key: value[:, :1] for key, value in kept.items()}
    if every := EVERY.get(stem):
        pixels = slice(every // 2, None, every)
        kept |= {key: kept[key][..., pixels, pixels] for key in THINNED if key in kept}
        kept |= {key: kept[key][pixels, pixels] for key in ("up8",) if key in kept}
        kept["every"] = np.array(every)
    if "codes" in kept:
        kept["codes"] = kept["codes"].astype(np.int16)
    return kept


def digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """Hash of the names and shapes of a network's tensors, whatever their order."""
    lines = sorted(f"{key} {list(shape)}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


STEMS = (
    "unet_w32",
    "decoder_c32",
    "ddim_s8_eta1",
    "ddim_s5_eta0",
    "schedule",
    "imresize",
    "colour_and_ffl",
    "stablesr_unet",
    "stablesr_structcond",
    "stablesr_text",
    "stablesr_vae_cfw",
    "stablesr_schedule",
)


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("reference", type=Path, help="directory with golden/ and the key lists")
    reference: Path = parser.parse_args().reference
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for stem in STEMS:
        with np.load(reference / "golden" / f"{stem}.npz") as whole:
            np.savez_compressed(GOLDENS / f"{stem}.npz", **cut(stem, whole))
    keys = json.loads((reference / "checkpoint_keys.json").read_text())
    stablesr = json.loads((reference / "stablesr_keys.json").read_text())
    keys |= {f"stablesr_{name}": shapes for name, shapes in stablesr.items()}
    digests = {name: digest(shapes) for name, shapes in sorted(keys.items())}
    (GOLDENS / "keys.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
