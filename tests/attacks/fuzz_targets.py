"""Fuzz targets: each checks what moesr does with a mutated input and returns the kind of outcome.

An outcome is "accepted" or the name of an exception that the boundary may raise. Everything else is a
failure: another exception, a message without the file's name, a run that does not end, or a changed result.
"""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
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
from fuzz_inputs import (
    CACHE_DAMAGES,
    SEEDS,
    CacheDamage,
    command_lines,
    engine_folder,
    manifests,
    mutated,
)
from hostile_cache import DAMAGES
from hostile_images import encoded, picture
from hypothesis.strategies import SearchStrategy

from moesr.runtime import EngineError, InputError, MoesrError, Upscaler
from moesr.runtime.cli.run import main
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, read_manifest
from moesr.runtime.images import provenance, reading, writing
from moesr.runtime.images.provenance import Provenance

LIMIT_S = 20
"""An example that takes longer than this fails, because a hostile input must not hold a run up."""

LIMIT_BYTES = 4 << 30
"""An example may add this much to the address space of the process: an endless file must not fill memory."""

IMAGE = np.asarray(picture())
RECORD = Provenance(4, "synthetic fp32 00000000", {"steps": 1, "seed": 42}, "in.png", "0" * 64)


@dataclass(frozen=True)
class Target:
    """A fuzz target: a strategy that draws inputs, and a check that takes one input and an empty folder."""

    inputs: SearchStrategy[Any]
    check: Callable[[Any, Path], str]
    share: float  # share of the examples of a long run


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Fail if the block takes longer than `LIMIT_S` or needs more memory than `LIMIT_BYTES`."""

    def expire(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"takes longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, expire)
    space = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT_BYTES, space[1]))
    signal.alarm(LIMIT_S)
    faulthandler.dump_traceback_later(2 * LIMIT_S, exit=True)  # for a library that never returns
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        resource.setrlimit(resource.RLIMIT_AS, space)
        signal.signal(signal.SIGALRM, before)


def check_image(content: bytes, folder: Path) -> str:
    """Read the image, write it in every format and read it again, as `moesr-run` does."""
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
    """Check that a message is one line of bounded length that names the file and says something about it."""
    text = str(error)
    assert str(path) in text
    assert len(text.splitlines()) == 1
    assert len(str(path)) + 10 < len(text) < 2000
    assert text.isprintable()


def check_manifest(text: str, folder: Path) -> str:
    """Check that the manifest is refused or the engine upscales an image."""
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


def check_command(arguments: list[str], folder: Path) -> str:
    """Check the exit code (0 to 2), that no traceback is printed, and which files may change.

    Inputs never change. Other existing files change only with --force.
    """
    folder = folder / "inside"  # also keeps ".." inside the folder of this example
    folder.mkdir()
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
    assert not changed & taken(arguments, folder), "an input of the run was changed"
    assert not changed or "--force" in arguments, changed
    assert not [name for name in after if name.endswith(".tmp")], "a temporary file was left"
    assert len(after.keys() - before.keys()) <= len(results)
    return f"exit code {code}"


def taken(arguments: list[str], folder: Path) -> set[str]:
    """Return the names of the prepared images that are inputs of a run, also through their directory."""
    named = arguments[: arguments.index("-o")] if "-o" in arguments else arguments
    places = {os.path.realpath(folder / name.replace("\0", "")) for name in named}
    paths = {name: os.path.realpath(folder / name) for name in ("a.png", "b.jpg", "sub/c.png")}
    return {name for name, path in paths.items() if {path, str(Path(path).parent)} & places}


def prepare(folder: Path) -> None:
    """Create files of every kind that the arguments can name."""
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
    """Return the hashes of all regular files."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def check_cache(damages: list[CacheDamage], folder: Path) -> str:
    """Check that the result with a damaged cache equals the result without a cache."""
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
    """Return the result for a small image."""
    with Upscaler(engine_folder(), backend=backend, threads=1, cache=cache) as upscaler:
        return upscaler(IMAGE[:5, :6], steps=1)


TARGETS = {
    "images": Target(mutated(SEEDS), check_image, 0.4),
    "manifests": Target(manifests(), check_manifest, 0.3),
    "paths": Target(command_lines(), check_command, 0.15),
    "cache": Target(CACHE_DAMAGES, check_cache, 0.15),
}


def run_example(target: Target, value: Any, folder: Path) -> str:
    """Check one input in an empty folder and return the outcome."""
    with limits(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return target.check(value, folder)


logging.getLogger("moesr").addHandler(logging.NullHandler())
