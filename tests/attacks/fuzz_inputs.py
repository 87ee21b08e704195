"""Inputs of the fuzz targets, as strategies of hypothesis: valid inputs that are mutated in a few places."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engines import build_engine
from hostile_cache import DAMAGES
from hostile_images import encoded, maker_note, picture, png, software
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from moesr.runtime.engine.manifest_file import MANIFEST_NAME

SEEDS = [
    png(),
    *(encoded("PNG", picture(mode)) for mode in ("L", "LA", "RGBA", "P", "1", "I;16")),
    encoded("PNG", dpi=(72, 72), exif=software("seed"), icc_profile=b"icc" * 40),
    *(encoded("JPEG", picture(mode), exif=software("seed"), dpi=(72, 72)) for mode in ("L", "RGB", "CMYK")),
    encoded("JPEG", progressive=True, comment=b"seed"),
    *(
        encoded("TIFF", picture(mode), compression=compression, dpi=(72, 72))
        for mode in ("RGB", "L", "CMYK", "LAB")
        for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate")
        if mode != "LAB" or compression == "raw"
    ),
    encoded("TIFF", picture("I;16"), exif=maker_note(40)),
    encoded("WEBP", exif=software("seed")),
    encoded("WEBP", picture("RGBA"), lossless=True),
    encoded("GIF", save_all=True, append_images=[picture("L")]),
    *(encoded(kind) for kind in ("BMP", "PPM", "TGA", "ICO", "JPEG2000")),
]
"""Examples of images start from these valid files."""

VALUES = [b"", b"\0", b"\xff", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\x01"]
"""Bytes that often lie at the edge of a range of values."""


@st.composite
def mutated(draw: DrawFn, seeds: list[bytes]) -> bytes:
    """Draw a file with a few bytes replaced, inserted, removed or repeated, or with its end cut off."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from((1, 1, 2, 4, 16, 200)))
        patch = draw(st.one_of(st.sampled_from(VALUES), st.binary(min_size=1, max_size=8)))
        match draw(st.sampled_from(("replace", "replace", "replace", "insert", "remove", "repeat", "cut"))):
            case "replace":
                content[at : at + len(patch)] = patch
            case "insert":
                content[at:at] = patch
            case "remove":
                del content[at : at + length]
            case "repeat":
                content[at:at] = content[at : at + length] * 3
            case "cut":
                del content[at:]
    return bytes(content)


HOSTILE_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.sampled_from((10**9, 2**31, 2**63, 10**30, -(10**30), 10**400)),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(("../x", "/etc/passwd", "expert_1", "expert_0.onnx", "B", "latent", "v", "x" * 10_000)),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(0, 9), max_size=3),
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) inside a JSON value."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


@cache
def engine_folder() -> Path:
    """Return the directory of a valid engine, which is built once per process."""
    folder = Path(tempfile.mkdtemp(prefix="moesr-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_engine(folder, steps=2, experts=2, tile=32)


@st.composite
def manifests(draw: DrawFn) -> str:
    """Draw the manifest of the valid engine with a few entries changed or with its text damaged."""
    values = json.loads((engine_folder() / MANIFEST_NAME).read_text())
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        container, key = draw(st.sampled_from(places(values)))
        old = container[key]
        match draw(st.sampled_from(("replace", "nudge", "nudge", "remove", "copy"))):
            case "nudge" if isinstance(old, (int, float)) and not isinstance(old, bool):
                container[key] = draw(
                    st.sampled_from((old + 1, old - 1, old * 2, old // 2, -old, old * 1000))
                )
            case "remove":
                del container[key]
            case "copy":
                other, other_key = draw(st.sampled_from(places(values)))
                container[key] = json.loads(json.dumps(other[other_key]))
            case _:
                container[key] = draw(HOSTILE_VALUES)
    text = json.dumps(values)
    if draw(st.integers(0, 9)) == 0:
        text = draw(mutated([text.encode()])).decode("utf-8", "replace")
    return text


SOUND = st.sampled_from(("a.png", "b.jpg", "sub", "sub/c.png", "link.png", "./a.png", "sub/../b.jpg"))
NEW = st.sampled_from(("new/", "new.png", "deep/er/out.webp", "A.PNG", "out.tif", "sub/", "sub", "a_x4.png"))
ODD = st.one_of(
    st.sampled_from(("loop", "pipe", "text.txt", "new.xyz", "nothing.png", "dangling.png", "empty.png")),
    st.sampled_from((".", "..", "", "a.png/", "a.png/b", "-", "--", "~", "*.png", "/dev/null", ".b.png")),
    st.sampled_from((" ", " .png", "\n.png", "a\tb.png", "\0.png", "\x1b[2J.png", "\udcff.png", "CON.png")),
    st.sampled_from(("é.png", "e\u0301.png")),
)
LONG = st.sampled_from(("x" * 300, "x" * 200 + ".png"))
TEXT = st.text(st.characters(), max_size=8).filter(lambda name: not name.startswith(("/", "..")))
NAMES = st.one_of(ODD, ODD, LONG, TEXT, TEXT.map("{}.png".format))


@st.composite
def command_lines(draw: DrawFn) -> list[str]:
    """Draw a command line: inputs, sometimes an output, and flags."""
    arguments = draw(st.lists(st.one_of(SOUND, SOUND, NAMES), min_size=1, max_size=3))
    if draw(st.booleans()):
        arguments += ["-o", draw(st.one_of(NEW, NEW, SOUND, NAMES))]
    return arguments + draw(st.lists(st.sampled_from(("--force", "--quiet")), max_size=2))


@dataclass(frozen=True)
class CacheDamage:
    """A description of how one file of a warm cache is damaged."""

    file: int
    kind: str | None  # a key of DAMAGES, or None for `mutation`
    mutation: bytes
    at: float  # position in the file, as a share of its size


CACHE_DAMAGES = st.lists(
    st.builds(
        CacheDamage,
        st.integers(0, 9),
        st.one_of(st.none(), st.none(), st.sampled_from(sorted(DAMAGES))),
        st.binary(min_size=1, max_size=8),
        st.floats(0, 1),
    ),
    min_size=1,
    max_size=3,
)
