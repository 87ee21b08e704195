"""Folders of photographs: a scan of their sizes, and a bounded cache of decoded images."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import get_worker_info

from moesr.runtime.errors import InputError
from moesr.runtime.images.reading import READ_SUFFIXES, load

log = logging.getLogger("moesr")

CACHE_BYTES = 2**30  # memory for decoded photographs, shared by all loader processes on the machine


@dataclass(frozen=True)
class PhotoFolder:
    """A scanned folder: the (width, height) of every image below it, sorted by path."""

    folder: Path
    sizes: Mapping[Path, tuple[int, int]]

    def at_least(self, minimum_px: int) -> list[Path]:
        """Return the images with both sides of at least `minimum_px`; smaller ones are logged and skipped.

        Raises InputError if none is left.
        """
        found = []
        for path, (width, height) in self.sizes.items():
            if min(width, height) >= minimum_px:
                found.append(path)
                continue
            log.warning("%s: skipped, %dx%d is smaller than a crop of %d px", path, width, height, minimum_px)
        if not found:
            raise InputError(
                f"{self.folder}: no readable image with sides of at least {minimum_px} px; add photographs"
            )
        return found


def scan(folder: Path) -> PhotoFolder:
    """Find the images under `folder`, at any depth.

    Only headers are read, so a folder may hold a million files. Files without an image suffix are ignored;
    empty and unreadable images are logged and skipped. Raises InputError if `folder` is not a directory.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: not a directory; expected a folder of photographs")
    files = (Path(root, name) for root, _, names in os.walk(folder, followlinks=True) for name in names)
    sizes = {}
    for path in sorted(p for p in files if p.suffix.lower() in READ_SUFFIXES and p.name[0] != "."):
        try:
            with Image.open(path) as image:
                sizes[path] = image.size
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            log.warning("%s: skipped, cannot be read (%s)", path, error)
    return PhotoFolder(folder, sizes)


def load_rgb(path: Path) -> np.ndarray | None:
    """Decode an image with `read_rgb`; None, after a warning, if it cannot be read."""
    try:
        return read_rgb(path)
    except InputError as error:
        log.warning("%s: skipped", error)
        return None


def image_files(folder: Path) -> list[Path]:
    """Return the paths of the images directly in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in READ_SUFFIXES)


def read_rgb(path: Path) -> np.ndarray:
    """Decode an image to upright uint8 RGB [H, W, 3] without alpha; InputError if it cannot be read."""
    pixels = load(path).pixels
    if pixels.dtype == np.uint16:
        pixels = (pixels >> 8).astype(np.uint8)
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels = np.ascontiguousarray(pixels[..., :-1])  # a copy, which frees the alpha channel
    return np.broadcast_to(pixels.reshape(*pixels.shape[:2], -1), (*pixels.shape[:2], 3))


class PhotoCache:
    """A cache of the photographs decoded last: at most `share_bytes()`, or a single larger one."""

    def __init__(self) -> None:
        self._images: OrderedDict[Path, np.ndarray | None] = OrderedDict()
        self.held_bytes = 0

    def load(self, path: Path) -> np.ndarray | None:
        """Return `load_rgb(path)`, from the cache if it is there."""
        if path in self._images:
            self._images.move_to_end(path)
            return self._images[path]
        self._images[path] = image = load_rgb(path)
        self.held_bytes += _bytes_of(image)
        while self.held_bytes > share_bytes() and len(self._images) > 1:
            self.held_bytes -= _bytes_of(self._images.popitem(last=False)[1])
        return image

    def clear(self) -> None:
        """Empty the cache."""
        self._images.clear()
        self.held_bytes = 0


def share_bytes() -> int:
    """Return the cache size of this process: CACHE_BYTES divided by the number of loader processes."""
    worker = get_worker_info()
    loaders = 1 if worker is None else worker.num_workers
    return CACHE_BYTES // (loaders * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _bytes_of(image: np.ndarray | None) -> int:
    return 0 if image is None else image.nbytes


decoded = PhotoCache()
