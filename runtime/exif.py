"""EXIF blocks: what of one file's may travel to another."""

from __future__ import annotations

import logging

from PIL import Image

_ORIENTATION, _DETAILS, _POSITION, _WIDTH, _HEIGHT = 0x0112, 0x8769, 0x8825, 0xA002, 0xA003
_SUB_NAMES = {_DETAILS: "exposure data", _POSITION: "position"}
# Of a TIFF's tags those that describe how its own pixels are stored, and the ICC profile, kept elsewhere.
_STORAGE_TAGS = frozenset(
    (_ORIENTATION, 34675, *range(254, 267), 273, *range(277, 280), 284, *range(317, 348), *range(512, 533))
)

log = logging.getLogger("moesr")


def read(image: Image.Image, name: str) -> tuple[bytes | None, int]:
    """EXIF without orientation and the storage tags of a TIFF, and the orientation (1 is upright)."""
    try:
        exif = image.getexif()
        turn = int(exif.get(_ORIENTATION, 1))
        copy = Image.Exif()
        copy.load(exif.tobytes())
        for tag in _STORAGE_TAGS & set(copy):
            del copy[tag]
        return (copy.tobytes() if len(copy) else None), turn
    except Exception as error:  # a damaged block may hold anything; the picture is good without it
        log.warning("%s: its EXIF block is damaged and left out (%s)", name, error)
        return None, 1


def resized(exif: bytes | None, width: int, height: int) -> bytes | None:
    """EXIF with the pixel dimensions replaced, where it gives them."""
    if not exif:
        return None
    block = Image.Exif()
    block.load(exif)
    details = block.get_ifd(_DETAILS)
    for tag, size in ((_WIDTH, width), (_HEIGHT, height)):
        if tag in details:
            details[tag] = size
    return block.tobytes()


def for_tiff(exif: bytes, name: str) -> Image.Exif:
    """EXIF without its sub-directories, which Pillow cannot write into a TIFF."""
    block = Image.Exif()
    block.load(exif)
    for tag in _SUB_NAMES.keys() & set(block):
        log.warning("%s: TIFF cannot take the EXIF block's %s; PNG keeps it", name, _SUB_NAMES[tag])
        del block[tag]
    return block
