"""Write photographs to train small models on, and those kept out to measure them, to a folder:

  python -m moesr.training.data.demo_photos photos

Some come with scikit-image, scikit-learn and Matplotlib, most from the Debian packages that
`presets/demo_photos.toml` names with their authors and licences. apt-get fetches these; on other systems
download them and name their folder with --packages. `photos/train` and `photos/validation` never share a
scene. Photographs to train on are also written smaller, as Real-ESRGAN's were: detail of every size from few
scenes, and from large ones sharper than a camera's own pixels.
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
HALVINGS = 2  # a photograph of a package is written at a half and a quarter too ...
SHORTEST_PX = 400  # ... as far as that leaves this many pixels along its short side


@dataclass(frozen=True)
class Credit:
    """A photograph in a Debian package, and whom it is from."""

    name: str
    package: str
    path: str  # in the package
    author: str
    licence: str
    split: str  # "train" or "validation"


def catalogue() -> list[Credit]:
    """The photographs of Debian packages, as the file beside the recipes lists them."""
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
    """The photographs of Python packages in `split` ("train" or "validation"), uint8 [H, W, 3] by name."""
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


def packaged(packages: Path) -> Iterator[tuple[Credit, bytes]]:
    """The photographs in the Debian packages in a folder, as files; what a package lacks is reported."""
    listed = catalogue()
    for package in sorted({credit.package for credit in listed}):
        wanted = {credit.path: credit for credit in listed if credit.package == package}
        deb = debian_packages.find(package, packages)
        for path, content in debian_packages.read_files(deb, set(wanted)):
            yield wanted.pop(path), content
        for path in wanted:
            log.warning("%s: %s is not in this version of the package; skipped", deb.name, path)


def write_sizes(credit: Credit, content: bytes, folder: Path) -> list[Path]:
    """Write one photograph as it is, and as PNG at a half and a quarter of its sides; returns the files.

    To validate on only the smallest is written: a whole one takes minutes to measure.
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
    """Write all photographs; `packages` holds the Debian packages, None has apt-get fetch them."""
    for module in ("matplotlib", "skimage", "sklearn"):
        importlib.import_module(module)  # what is missing is missed before any work
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
    """The command line of the module."""
    p = argparse.ArgumentParser(
        "moesr.training.data.demo_photos", description=__doc__, formatter_class=console.HelpFormatter
    )
    p.add_argument("folder", type=Path)
    p.add_argument("--packages", type=Path, metavar="DIR", help="the Debian packages, downloaded already")
    return p


def main() -> int:
    """Entry point of the module; returns the exit code."""
    return console.run_program(
        "demo_photos", parser, lambda args: write(args.folder, args.packages), extra="bench"
    )


if __name__ == "__main__":
    sys.exit(main())
