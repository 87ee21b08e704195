"""EXIF blocks: what of one file's may travel to another."""

from __future__ import annotations

import logging

from PIL import Image

from moesr.runtime.images.provenance import Provenance, to_software, without_mark

_ORIENTATION, _SOFTWARE, _DETAILS, _POSITION = 0x0112, 0x0131, 0x8769, 0x8825
_WIDTH, _HEIGHT = 0xA002, 0xA003
_SUB_NAMES = {_DETAILS: "exposure data", _POSITION: "position"}
# Of a TIFF's tags those that describe how its own pixels are stored, and the ICC profile, kept elsewhere.
_STORAGE_TAGS = frozenset(
    (_ORIENTATION, 34675, *range(254, 267), 273, *range(277, 280), 284, *range(317, 348), *range(512, 533))
)

log = logging.getLogger("moesr")


def read(image: Image.Image, name: str) -> tuple[bytes | None, int]:
    """EXIF and the orientation (1 is upright); without it, the storage tags of a TIFF and our own mark."""
    try:
        exif = image.getexif()
        turn = int(exif.get(_ORIENTATION, 1))
        copy = Image.Exif()
        copy.load(exif.tobytes())
        for tag in _STORAGE_TAGS & set(copy):
            del copy[tag]
        if isinstance(software := copy.get(_SOFTWARE), str):
            copy[_SOFTWARE] = without_mark(software)
            if not copy[_SOFTWARE]:
                del copy[_SOFTWARE]
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
    if _DETAILS not in block:
        return exif
    details = block.get_ifd(_DETAILS)
    for tag, size in ((_WIDTH, width), (_HEIGHT, height)):
        if tag in details:
            details[tag] = size
    return block.tobytes()


def marked(exif: bytes | None, record: Provenance) -> bytes:
    """EXIF whose Software tag holds `record` too."""
    block = Image.Exif()
    if exif:
        block.load(exif)
    block[_SOFTWARE] = to_software(block.get(_SOFTWARE), record)
    return block.tobytes()


def for_tiff(exif: bytes, name: str) -> Image.Exif:
    """EXIF without its sub-directories, which Pillow cannot write into a TIFF."""
    block = Image.Exif()
    block.load(exif)
    for tag in _SUB_NAMES.keys() & set(block):
        log.warning("%s: TIFF cannot take the EXIF block's %s; PNG keeps it", name, _SUB_NAMES[tag])
        del block[tag]
    return block
