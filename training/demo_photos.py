"""Write photographs to train small models on, and those kept out to measure them, to a folder:

  python -m moesr.training.demo_photos photos

They come with scikit-image, scikit-learn and Matplotlib; `photos/train` and `photos/validation` never share
a scene. Those to train on are also written smaller, as Real-ESRGAN's training set was: detail of every size
from few photographs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN = (
    "astronaut",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
    "brick",
    "grass",
    "gravel",
    "camera",
    "motorcycle",
)
TRAIN_SKLEARN = ("china.jpg", "flower.jpg")
TRAIN_MATPLOTLIB = ("grace_hopper.jpg",)
VALIDATION = ("chelsea", "coffee", "rocket")
SIZES = {"train": (1.0, 0.75, 0.5), "validation": (1.0,)}


def photographs(split: str) -> dict[str, np.ndarray]:
    """The photographs of `split` ("train" or "validation"), uint8 [H, W, 3] by name."""
    from skimage import data

    if split == "validation":
        return {name: getattr(data, name)() for name in VALIDATION}
    from matplotlib import pyplot as plt
    from matplotlib.cbook import get_sample_data
    from sklearn.datasets import load_sample_image

    images = {n: getattr(data, n)() for n in TRAIN if n != "motorcycle"}
    images["motorcycle"] = data.stereo_motorcycle()[0]
    images |= {Path(n).stem: load_sample_image(n) for n in TRAIN_SKLEARN}
    samples = {n: get_sample_data(n, asfileobj=False) for n in TRAIN_MATPLOTLIB}
    images |= {Path(n).stem: plt.imread(str(path)) for n, path in samples.items()}
    return {
        n: image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for n, image in images.items()
    }


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name, pixels in photographs(split).items():
            image = Image.fromarray(pixels)
            for size in SIZES[split]:
                path = folder / split / (f"{name}.png" if size == 1.0 else f"{name}_{size:g}.png")
                width, height = (round(side * size) for side in image.size)
                image.resize((width, height), Image.Resampling.LANCZOS).save(path)
                print(path, f"{width}x{height}")


if __name__ == "__main__":
    main()
