"""`moesr-run --info`: the record in a result, and the command that repeats the result."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from moesr.runtime.engine.hub_names import is_hub_name
from moesr.runtime.engine.locate import DEMO_ENGINES, engine_directory
from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.errors import EngineError, InputError, UsageError
from moesr.runtime.images import provenance
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.system import console
from moesr.runtime.system.files import check_file

_OPTIONS = {
    "steps": "--steps",
    "sampler": "--sampler",
    "seed": "--seed",
    "color_fix": "--color-fix",
    "fidelity": "--fidelity",
    "guidance": "--guidance",
    "reuse": "--reuse",
    "start_step": "--start-step",
    "tiling": "--tiling",
    "quality": "--quality",
    "scale": "--scale",
    "size": "--size",
    "frames": "--frames",
}
"""The option of `moesr-run` for each setting that has one value."""


def show(path: Path) -> None:
    """Print the record of a result; InputError if the file has none."""
    check_file(path)
    record = provenance.read(path)
    if record is None:
        raise InputError(
            f"{path}: holds no record of moesr; only results of moesr in other formats than BMP hold one"
        )
    for label, text in lines(path, record):
        console.say(f"{label:<14} {text}")


def lines(path: Path, record: Provenance) -> Iterator[tuple[str, str]]:
    """Return labels and texts of everything in a record."""
    yield "result", str(path)
    yield "input", record.source
    yield "input sha256", record.digest
    yield "made by", f"moesr {record.version}"
    yield "engine", f"{record.engine}, x{record.scale}"
    if record.origin:
        yield "engine from", record.origin
    for name, value in record.settings.items():
        yield name.replace("_", " "), str(value)
    yield "command", command(path, record)


def command(path: Path, record: Provenance) -> str:
    """Return the command line that makes a result again from its input, quoted for a shell.

    A record holds no directories. Therefore the engine is DIR unless it is a bundled one or one of the
    Hugging Face hub, and the network for pre-cleaning has its file name only.
    """
    if "scaling_factor" in record.settings:
        return _decoding(path, record)
    words = ["moesr-run", record.source, "-o", str(path), "--engine", _engine(record)]
    tiling = {"tiling": "overlap"}  # left out of records, as in those of versions that knew no other
    for name, value in (tiling | dict(record.settings)).items():
        if name in _OPTIONS:
            words += [_OPTIONS[name], str(value)]
        elif name == "pre_clean":
            words += ["--pre-clean", str(value).rpartition(" ")[0]]
        elif value is True:
            words.append(f"--{name.replace('_', '-')}")
    return shlex.join([*words, "--force"])


def _decoding(path: Path, record: Provenance) -> str:
    """Return the command line that decodes a latent again."""
    words = ["moesr-decode", record.source, "-o", str(path), "--engine", _engine(record)]
    words += [f"--{name.replace('_', '-')}" for name, value in record.settings.items() if value is True]
    if "quality" in record.settings:
        words += ["--quality", str(record.settings["quality"])]
    return shlex.join([*words, "--force"])


def _engine(record: Provenance) -> str:
    """Return the engine that a record names if it is a bundled one or one of the hub, or DIR."""
    if is_hub_name(record.origin):
        return record.origin
    for name in DEMO_ENGINES:
        try:
            manifest = read_manifest(engine_directory(name), verify=False)
        except (EngineError, UsageError):
            continue
        if f"{manifest.name} {manifest.precision} {manifest.checkpoint_sha256[:8]}" == record.engine:
            return name
    return "DIR"
