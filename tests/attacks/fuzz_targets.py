"""Fuzz targets: each takes a mutated input, checks what moesr does with it, and returns the kind of outcome.

An outcome is "accepted" or the name of an exception that the boundary may raise. Whatever else happens is a
failure: another exception, a message without the file's name, a run that does not end, a changed result.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from engines import build_engine
from hostile_cache import DAMAGES
from hostile_images import encoded, maker_note, picture, png, software
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from moesr.runtime import EngineError, InputError, MoesrError, Upscaler
from moesr.runtime.cli.run import main
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, read_manifest
from moesr.runtime.images import provenance, reading, writing
from moesr.runtime.images.provenance import Provenance

LIMIT_S = 20
"""An example that takes longer than this fails: hostile input must not hold a run up."""

LIMIT_BYTES = 4 << 30
"""Address space that an example may add to the process's: an endless file must not fill the machine."""

IMAGE = np.asarray(picture())
RECORD = Provenance(4, "synthetic fp32 00000000", {"steps": 1, "seed": 42}, "in.png", "0" * 64)


@dataclass(frozen=True)
class Target:
    """A strategy for inputs, and the check that takes one input and an empty folder."""

    inputs: SearchStrategy[Any]
    check: Callable[[Any, Path], str]
    share: float  # of the examples of a long run


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Fail if the block takes longer than `LIMIT_S` or more memory than `LIMIT_BYTES`."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"takes longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    space = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, space[1]))
    signal.alarm(LIMIT_S)
    faulthandler.dump_traceback_later(2 * LIMIT_S, exit=True)  # if a library does not return
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, space)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------------- images

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
"""Valid image files that examples start from."""

VALUES = [b"", b"\0", b"\xff", b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\x01"]
"""Bytes that often are edges of a range."""


@st.composite
def mutated(draw: DrawFn, seeds: list[bytes]) -> bytes:
    """A file with a few bytes replaced, inserted, removed or repeated, or cut off."""
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


def check_image(content: bytes, folder: Path) -> str:
    """Read, write in every format and read again, as `moesr-run` does around the upscaling."""
    path = folder / "in.png"
    path.write_bytes(content)
    provenance.read(path)
    provenance.is_whole(path)
    try:
        loaded = reading.load(path)
    except InputError as error:
        check_message(error, path)
        return "InputError"
    pixels = loaded.pixels
    assert pixels.dtype in (np.uint8, np.uint16)
    assert pixels.size and (pixels.ndim == 2 or pixels.shape[2] in (2, 3, 4))
    if pixels.size > 1_000_000:
        return "accepted, large"
    for suffix in (".png", ".tif", ".jpg", ".webp"):
        target = folder / f"out{suffix}"
        writing.save(target, loaded, RECORD)
        assert provenance.read(target) == RECORD
        assert provenance.is_whole(target)
        again = reading.load(target)
        assert again.pixels.shape[:2] == pixels.shape[:2]
        if suffix in (".png", ".tif") and (pixels.dtype == np.uint8 or pixels.ndim == 2):
            assert np.array_equal(again.pixels, pixels)
    return "accepted"


def check_message(error: MoesrError, path: Path) -> None:
    """A message is one line of bounded length that names the file and says more."""
    text = str(error)
    assert str(path) in text
    assert len(text.splitlines()) == 1
    assert len(str(path)) + 10 < len(text) < 2000
    assert text.isprintable()


# ----------------------------------------------------------------------------------------------- manifests

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
    """Every (container, key) inside of a JSON value."""
    keys = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def engine_folder() -> Path:
    """A sound engine, built once per process."""
    global _engine
    if _engine is None:
        import atexit
        import tempfile

        _engine = Path(tempfile.mkdtemp(prefix="moesr-fuzz-"))
        atexit.register(shutil.rmtree, _engine, ignore_errors=True)
        build_engine(_engine, steps=2, experts=2, tile=32)
    return _engine


_engine: Path | None = None


@st.composite
def manifests(draw: DrawFn) -> str:
    """The manifest of the sound engine with a few entries changed, or its text damaged."""
    values = json.loads((engine_folder() / MANIFEST_NAME).read_text())
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        container, key = draw(st.sampled_from(places(values)))
        old = container[key]
        match draw(st.sampled_from(("replace", "nudge", "nudge", "remove", "copy"))):
            case "nudge" if isinstance(old, (int, float)) and not isinstance(old, bool):
                container[key] = draw(st.sampled_from((old + 1, old - 1, old * 2, old / 2, -old, old * 1000)))
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


def check_manifest(text: str, folder: Path) -> str:
    """Either the manifest is refused, or the engine works on an image."""
    engine = folder / "engine"
    shutil.copytree(engine_folder(), engine)
    (engine / MANIFEST_NAME).write_text(text, encoding="utf-8")
    try:
        read_manifest(engine)
    except EngineError as error:
        assert str(engine) in str(error)
        assert len(str(error).splitlines()) == 1
        return "EngineError"
    try:
        with Upscaler(engine, backend="onnxruntime", threads=1, cache=False) as upscaler:
            result = upscaler(IMAGE[:5, :6], steps=1)
            assert result.shape == (5 * upscaler.manifest.scale, 6 * upscaler.manifest.scale, 3)
    except MoesrError as error:
        return f"read, then {type(error).__name__}"
    return "accepted"


# ------------------------------------------------------------------------------------- command line: paths

SOUND = st.sampled_from(("a.png", "b.jpg", "sub", "sub/c.png", "link.png", "./a.png", "sub/../b.jpg"))
NEW = st.sampled_from(("new/", "new.png", "deep/er/out.webp", "A.PNG", "out.tif", "sub/", "sub", "a_x4.png"))
ODD = st.one_of(
    st.sampled_from(("loop", "pipe", "text.txt", "new.xyz", "nothing.png", "dangling.png", "empty.png")),
    st.sampled_from(
        (".", "..", "", "/", "a.png/", "a.png/b", "-", "--", "~", "*.png", "/dev/null", ".b.png")
    ),
    st.sampled_from((" ", " .png", "\n.png", "a\tb.png", "\0.png", "\x1b[2J.png", "\udcff.png", "CON.png")),
    st.sampled_from(("é.png", "e\u0301.png")),
)
LONG = st.sampled_from(("x" * 300, "x" * 200 + ".png"))
NAMES = st.one_of(
    ODD, ODD, LONG, st.text(st.characters(), max_size=8), st.builds("{}.png".format, st.text(max_size=6))
)


@st.composite
def command_lines(draw: DrawFn) -> list[str]:
    """Inputs, perhaps an output and flags."""
    arguments = draw(st.lists(st.one_of(SOUND, SOUND, NAMES), min_size=1, max_size=3))
    if draw(st.booleans()):
        arguments += ["-o", draw(st.one_of(NEW, NEW, SOUND, NAMES))]
    return arguments + draw(st.lists(st.sampled_from(("--force", "--quiet")), max_size=2))


def check_command(arguments: list[str], folder: Path) -> str:
    """Exit codes 0 to 2, never a traceback; no input is changed, and other files only with --force."""
    prepare(folder)
    before = contents(folder)
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    home = Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            options = ["--engine", str(engine_folder()), "--steps", "1", "--threads", "1", "--no-cache"]
            code = main([*options, "--backend", "onnxruntime", *arguments])
    except SystemExit as leave:
        code = leave.code
    finally:
        os.chdir(home)
    out.flush()
    told, sent = err.getvalue(), out.buffer.getvalue()  # type: ignore[attr-defined]
    results = [] if sent.startswith(b"\x89PNG") else sent.decode().splitlines()
    after = contents(folder)
    assert code in (0, 1, 2), told
    assert "internal error, please" not in told and "Traceback" not in told, told
    assert "\x1b" not in told + "".join(results)
    assert all(" -> " in line for line in results), results
    assert code == 0 or "error" in told
    changed = {name for name, digest in before.items() if after.get(name) != digest}
    assert not changed & {"a.png", "b.jpg", "sub/c.png"}, "an input was changed"
    assert not changed or "--force" in arguments, changed
    assert not [name for name in after if name.endswith(".tmp")], "a temporary file was left"
    assert len(after.keys() - before.keys()) <= len(results)
    return f"exit code {code}"


def prepare(folder: Path) -> None:
    """Files of every kind to be named by arguments."""
    (folder / "sub").mkdir()
    for name, kind in (("a.png", "PNG"), ("b.jpg", "JPEG"), ("sub/c.png", "PNG")):
        (folder / name).write_bytes(encoded(kind, picture(size=(6, 5))))
    (folder / "link.png").symlink_to("a.png")
    (folder / "loop").symlink_to("loop")
    (folder / "dangling.png").symlink_to("nothing")
    (folder / "empty.png").touch()
    (folder / "text.txt").write_text("text")
    os.mkfifo(folder / "pipe")


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all plain files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


# --------------------------------------------------------------------------------------------------- cache


@dataclass(frozen=True)
class CacheDamage:
    """What happens to one file of a warm cache."""

    file: int
    kind: str | None  # of DAMAGES; None: the mutation
    mutation: bytes
    at: float  # where, as a share of the file


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


def check_cache(damages: list[CacheDamage], folder: Path) -> str:
    """The result with a damaged cache is the result without one."""
    cache, backend = folder / "cache", "onnxruntime"
    want = upscaled(cache, backend)
    for damage in damages:
        paths = sorted(path for path in cache.rglob("*") if path.is_file() and not path.is_symlink())
        if not paths:
            break
        path = paths[damage.file % len(paths)]
        if damage.kind:
            DAMAGES[damage.kind](path)
        else:
            content = bytearray(path.read_bytes())
            start = int(damage.at * len(content))
            content[start : start + len(damage.mutation)] = damage.mutation
            status = path.stat()
            path.write_bytes(content)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    got = upscaled(cache, backend)
    assert np.array_equal(got, want), f"off by {np.abs(got.astype(int) - want).max()}"
    assert np.array_equal(upscaled(cache, backend), want)
    return "same result"


def upscaled(cache: Path, backend: str) -> np.ndarray:
    """The result for a small image."""
    with Upscaler(engine_folder(), backend=backend, threads=1, cache=cache) as upscaler:
        return upscaler(IMAGE[:5, :6], steps=1)


TARGETS = {
    "images": Target(mutated(SEEDS), check_image, 0.4),
    "manifests": Target(manifests(), check_manifest, 0.3),
    "paths": Target(command_lines(), check_command, 0.15),
    "cache": Target(CACHE_DAMAGES, check_cache, 0.15),
}


def run_example(target: Target, value: Any, folder: Path) -> str:
    """Check one input in an empty folder; returns the outcome."""
    with limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return target.check(value, folder)


logging.getLogger("moesr").addHandler(logging.NullHandler())
