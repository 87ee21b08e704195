"""Write photographs for training small models, and held-out photographs for validation, to a folder:

  python -m moesr.training.data.demo_photos photos

Some photographs come with scikit-image, scikit-learn and Matplotlib; most come from the Debian packages that
`presets/demo_photos.toml` lists with their authors and licenses. apt-get downloads these packages; on other
systems download them by hand and pass their folder with --packages. `photos/train` and `photos/validation`
never share a scene. Training photographs are also written at smaller sizes, as for Real-ESRGAN: this gives
detail of every size from few scenes, and downsampled photographs are sharper than a camera's own pixels.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from moesr.runtime.system import console
from moesr.training.data import debian_packages

log = logging.getLogger("moesr")

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
CREDITS = "demo_photos.toml"
HALVINGS = 2  # a photograph of a package is also written at a half and a quarter of its sides ...
SHORTEST_PX = 400  # ... unless its short side would have fewer pixels than this


@dataclass(frozen=True)
class Credit:
    """A photograph in a Debian package, with its author and license."""

    name: str
    package: str
    path: str  # in the package
    author: str
    licence: str
    split: str  # "train" or "validation"


def catalogue() -> list[Credit]:
    """Return the photographs of Debian packages that the file beside the recipes lists."""
    text = (resources.files("moesr.training") / "presets" / CREDITS).read_text("utf-8")
    tables = tomllib.loads(text)
    kept_out = tables.pop("validation")
    return [
        Credit(
            name=photo["name"],
            package=package,
            path=f"{table['folder']}/{photo['file']}",
            author=photo["author"],
            licence=photo["licence"],
            split="validation" if photo["name"] in kept_out else "train",
        )
        for package, table in tables.items()
        for photo in table["photographs"]
    ]


def photographs(split: str) -> dict[str, np.ndarray]:
    """Return photographs of Python packages, uint8 [H, W, 3] by name; `split` is "train" or "validation"."""
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
    """Load one photograph of a Python package, uint8 [H, W, 3]."""
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


def packaged(packages: Path) -> Iterator[tuple[Credit, bytes]]:
    """Yield the photographs of the Debian packages in a folder as file contents; missing ones are logged."""
    listed = catalogue()
    for package in sorted({credit.package for credit in listed}):
        wanted = {credit.path: credit for credit in listed if credit.package == package}
        deb = debian_packages.find(package, packages)
        for path, content in debian_packages.read_files(deb, set(wanted)):
            yield wanted.pop(path), content
        for path in wanted:
            log.warning("%s: %s is not in this version of the package; skipped", deb.name, path)


def write_sizes(credit: Credit, content: bytes, folder: Path) -> list[Path]:
    """Write a photograph unchanged, and as PNG at a half and a quarter of its sides; returns the files.

    Of a validation photograph only the smallest size is written, since a full one takes minutes to measure.
    """
    image = Image.open(io.BytesIO(content)).convert("RGB")
    sizes = [1 / 2**i for i in range(HALVINGS + 1) if i == 0 or min(image.size) >= SHORTEST_PX * 2**i]
    written = []
    for size in sizes if credit.split == "train" else sizes[-1:]:
        if size == 1:
            path = folder / f"{credit.name}{PurePosixPath(credit.path).suffix.lower()}"
            path.write_bytes(content)
        else:
            path = folder / f"{credit.name}_{size:g}.png"
            sides = round(image.width * size), round(image.height * size)
            image.resize(sides, Image.Resampling.LANCZOS).save(path)
        written.append(path)
    return written


def write(folder: Path, packages: Path | None) -> int:
    """Write all photographs; `packages` is the folder of the Debian packages, None downloads them."""
    for module in ("matplotlib", "skimage", "sklearn"):
        importlib.import_module(module)  # a missing package is reported before any work is done
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        if packages is None:
            debian_packages.download({credit.package for credit in catalogue()}, Path(scratch))
        for credit, content in packaged(packages or Path(scratch)):
            for path in write_sizes(credit, content, folder / credit.split):
                print(path, f"{credit.author}, {credit.licence}")
    for split in ("train", "validation"):
        for name, image in photographs(split).items():
            Image.fromarray(image).save(folder / split / f"{name}.png")
            print(folder / split / f"{name}.png", f"{image.shape[1]}x{image.shape[0]}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    p = argparse.ArgumentParser(
        "moesr.training.data.demo_photos", description=__doc__, formatter_class=console.HelpFormatter
    )
    p.add_argument("folder", type=Path)
    p.add_argument("--packages", type=Path, metavar="DIR", help="folder of Debian packages downloaded before")
    return p


def main() -> int:
    """Entry point of the module; returns the exit code."""
    return console.run_program(
        "demo_photos", parser, lambda args: write(args.folder, args.packages), extra="bench"
    )


if __name__ == "__main__":
    sys.exit(main())
