"""ICC profiles: made from the color tags of a PNG for formats without such tags, and converted to sRGB.

A profile made here has the primaries as a matrix and one curve for all channels (ICC.1:2001-04, section 6.3).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageCms

SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)  # x and y of white, red, green and blue
_PRIMARIES = {  # by their number in ITU-T H.273
    1: SRGB_PRIMARIES,
    5: (0.3127, 0.3290, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (0.3127, 0.3290, 0.63, 0.34, 0.31, 0.595, 0.155, 0.07),
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_GAMMA = {4: 2.2, 5: 2.8, 8: 1.0}  # of transfer functions by number; 13 is that of sRGB
_SRGB_TRANSFER = 13
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50 = np.array([0.9642, 1.0, 0.8249])


def of_color_tags(tags: Mapping[bytes, bytes], grey: bool) -> bytes | None:
    """Return the profile that the color tags of a PNG describe; None if no profile can express them.

    Of several tags the one with the highest rank counts: cICP, sRGB, then gAMA with cHRM.
    """
    if b"cICP" in tags and len(tags[b"cICP"]) == 4:
        primaries, transfer, matrix, full_range = tags[b"cICP"]
        known = primaries in _PRIMARIES and (transfer in _GAMMA or transfer == _SRGB_TRANSFER)
        if not known or matrix != 0 or full_range != 1:
            return None
        return _profile(_PRIMARIES[primaries], _GAMMA.get(transfer), grey)
    if b"sRGB" in tags:
        return _profile(SRGB_PRIMARIES, None, grey)
    if len(tags.get(b"gAMA", b"")) != 4:
        return None
    (gamma,) = struct.unpack(">I", tags[b"gAMA"])
    if not gamma:
        return None
    primaries = SRGB_PRIMARIES
    if len(tags.get(b"cHRM", b"")) == 32:
        primaries = tuple(value / 100_000 for value in struct.unpack(">8I", tags[b"cHRM"]))
    try:
        return _profile(primaries, 100_000 / gamma, grey)
    except (np.linalg.LinAlgError, ZeroDivisionError, struct.error):
        return None


def is_srgb(tags: Mapping[bytes, bytes]) -> bool:
    """Return True if the color tags of a PNG describe sRGB, as is assumed for a file without a profile."""
    if b"cICP" in tags:
        return tags[b"cICP"][:2] == bytes((1, _SRGB_TRANSFER))
    if b"sRGB" in tags:
        return True
    if len(tags.get(b"gAMA", b"")) != 4:
        return b"gAMA" not in tags  # primaries without a transfer function have no effect
    (gamma,) = struct.unpack(">I", tags[b"gAMA"])
    chromaticities = tags.get(b"cHRM", b"")
    primaries = SRGB_PRIMARIES
    if len(chromaticities) == 32:
        primaries = tuple(value / 100_000 for value in struct.unpack(">8I", chromaticities))
    return abs(gamma - 45_455) < 500 and np.allclose(primaries, SRGB_PRIMARIES, atol=0.002)


def to_srgb(image: Image.Image, icc: bytes) -> Image.Image | None:
    """Convert an 8-bit image without alpha from its profile to sRGB; None if that is not possible."""
    if image.mode not in ("L", "RGB"):
        return None
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ImportError, TypeError):
        return None
    return converted.convert(image.mode) if converted else None


def _profile(primaries: tuple[float, ...], gamma: float | None, grey: bool) -> bytes:
    """Return a display profile; `gamma` None stands for sRGB's curve."""
    curve = _curve(gamma)
    white = _xyz(*primaries[:2])
    adapted = _adaptation(white)
    tags = {
        b"desc": _description("RGB of a PNG's color tags" if not grey else "Grey of a PNG's gamma"),
        b"cprt": b"text\0\0\0\0No copyright, use freely\0",
        b"wtpt": _numbers(_D50),
    }
    if grey:
        tags[b"kTRC"] = curve
    else:
        columns = np.stack([_xyz(*primaries[i : i + 2]) for i in (2, 4, 6)], axis=1)
        matrix = adapted @ (columns * np.linalg.solve(columns, white))
        for i, name in enumerate((b"r", b"g", b"b")):
            tags[name + b"XYZ"] = _numbers(matrix[:, i])
            tags[name + b"TRC"] = curve
    return _assembled(tags, b"GRAY" if grey else b"RGB ")


def _assembled(tags: Mapping[bytes, bytes], space: bytes) -> bytes:
    """Return the file: a header of 128 bytes, a table of tags, and their data aligned to 4 bytes."""
    table, data = struct.pack(">I", len(tags)), b""
    start = 132 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    size = start + len(data)
    header = struct.pack(">II I4s4s4s", size, 0, 0x02400000, b"mntr", space, b"XYZ ")
    header += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp").ljust(44, b"\0")
    header += _numbers(_D50)[8:]
    return header.ljust(128, b"\0") + table + data


def _curve(gamma: float | None) -> bytes:
    """Return a curve tag: a power, or 1024 samples of sRGB's curve."""
    if gamma is not None:
        return struct.pack(">4sIIH", b"curv", 0, 1, min(round(gamma * 256), 0xFFFF))
    x = np.linspace(0.0, 1.0, 1024)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return struct.pack(">4sII", b"curv", 0, 1024) + np.rint(linear * 65535).astype(">u2").tobytes()


def _description(text: str) -> bytes:
    """Return a textDescriptionType with its ASCII part only."""
    ascii_text = text.encode("ascii") + b"\0"
    return b"desc" + bytes(4) + struct.pack(">I", len(ascii_text)) + ascii_text + bytes(78)


def _numbers(values: np.ndarray) -> bytes:
    """Return an XYZ tag of s15Fixed16 numbers."""
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def _xyz(x: float, y: float) -> np.ndarray:
    """Return the XYZ of a chromaticity with luminance 1."""
    return np.array([x / y, 1.0, (1.0 - x - y) / y])


def _adaptation(white: np.ndarray) -> np.ndarray:
    """Return the Bradford matrix that maps `white` to D50, the white of profiles."""
    gains = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    return np.linalg.inv(_BRADFORD) @ (gains[:, None] * _BRADFORD)
