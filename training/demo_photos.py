"""Write photographs to train small models on, and those kept out to measure them, to a folder:

  python -m moesr.training.demo_photos photos

They come with scikit-image, scikit-learn and Matplotlib; `photos/train` and `photos/validation` never share
a scene. Scenes to train on are also written smaller, as Real-ESRGAN's were: detail of every size from few
photographs, and fewer of the crops from plain textures and soft or scientific pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SCENES = ("astronaut", "camera", "motorcycle", "china.jpg", "flower.jpg", "grace_hopper.jpg")
OTHERS = (
    "brick",
    "clock",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "moon",
    "retina",
)
VALIDATION = ("chelsea", "coffee", "rocket")
SMALLER = (0.75, 0.5)


def photographs(split: str) -> dict[str, np.ndarray]:
    """The photographs of `split` ("train" or "validation"), uint8 [H, W, 3] by name."""
    if split == "validation":
        return {name: photograph(name) for name in VALIDATION}
    images = {Path(name).stem: photograph(name) for name in (*SCENES, *OTHERS)}
    for name in SCENES:
        image = Image.fromarray(images[Path(name).stem])
        for size in SMALLER:
            sides = round(image.width * size), round(image.height * size)
            images[f"{Path(name).stem}_{size:g}"] = np.asarray(image.resize(sides, Image.Resampling.LANCZOS))
    return images


def photograph(name: str) -> np.ndarray:
    """One photograph, uint8 [H, W, 3]."""
    from matplotlib import cbook
    from skimage import data
    from sklearn.datasets import load_sample_image

    if name == "grace_hopper.jpg":
        image = np.asarray(Image.open(str(cbook.get_sample_data(name, asfileobj=False))))
    elif name.endswith(".jpg"):
        image = load_sample_image(name)
    else:
        image = data.stereo_motorcycle()[0] if name == "motorcycle" else getattr(data, name)()
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name, image in photographs(split).items():
            Image.fromarray(image).save(folder / split / f"{name}.png")
            print(folder / split / f"{name}.png", f"{image.shape[1]}x{image.shape[0]}")


if __name__ == "__main__":
    main()
