"""Check this installation: versions, machine, backends, an engine, and one sampling step with it.

Exit codes: 0 no problem found, 2 wrong usage, 3 engine or backend unusable, 4 out of memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.autoencoder import Autoencoder
from moesr.runtime.backends import autotune
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.selection import BACKENDS, probe
from moesr.runtime.cli import doctor_gpu
from moesr.runtime.cli.engine_options import add_engine_options, cache_directory, engine_options
from moesr.runtime.engine.hub_names import origin_of
from moesr.runtime.engine.locate import engine_directory
from moesr.runtime.engine.manifest import AutoencoderManifest, Manifest
from moesr.runtime.engine.manifest_file import KINDS, read_manifest
from moesr.runtime.errors import EngineError
from moesr.runtime.options import check_device
from moesr.runtime.system import console, memory, user_cache
from moesr.runtime.upscaler import Upscaler

_PACKAGES = (
    *("moesr", "numpy", "pillow", "tqdm", "onnxruntime", "onnxruntime-gpu", "openvino", "cuda-core"),
    "huggingface_hub",
)
_SMOKE_PX = 16  # side of the test image


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-doctor` and return its exit code."""
    return console.run_program("moesr-doctor", parser, examine, argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `moesr-doctor`."""
    p = argparse.ArgumentParser("moesr-doctor", description=__doc__, formatter_class=console.HelpFormatter)
    add_engine_options(p)
    return p


def examine(args: argparse.Namespace) -> int:
    """Print the findings; raises EngineError or MemoryLimitError if the engine cannot be used."""
    check_device(args.device)
    _show_machine()
    _show_backends()
    directory = engine_directory(args.engine)
    manifest = read_manifest(directory, verify=not args.no_verify, anew=True, kinds=tuple(KINDS))
    index = SessionOptions(device=args.device or "cpu").index
    for label, text in doctor_gpu.findings(directory, manifest, index, cache_directory(args)):
        _line(label, text)
    _show_engine(manifest, f"{directory} ({'hashes not compared' if args.no_verify else 'hashes agree'})")
    if origin := origin_of(directory):
        _line("engine from", origin)
    options = engine_options(args)
    options["verify"] = False  # the hashes were compared before
    if isinstance(manifest, AutoencoderManifest):
        return _decode_once(directory, manifest, options)
    with Upscaler(directory, **options) as upscaler:
        _show_choice(upscaler)
        image = np.random.default_rng(0).integers(0, 256, (_SMOKE_PX, _SMOKE_PX, 3), np.uint8)
        start = time.perf_counter()
        shape = upscaler(image, steps=1).shape
        _line("smoke run", f"one step and a decode in {time.perf_counter() - start:.2f} s, output {shape}")
    return 0


def _decode_once(directory: Path, manifest: AutoencoderManifest, options: dict[str, Any]) -> int:
    """Decode one tile of noise with the engine of an autoencoder."""
    with Autoencoder(directory, **options) as vae:
        _line("runs on", f"{vae.backend.label} {vae.backend.version}, {vae.backend.options.device}")
        shape = (vae.channels, manifest.latent_tile, manifest.latent_tile)
        start = time.perf_counter()
        shape = vae.decode(np.random.default_rng(0).standard_normal(shape, np.float32)).shape
        _line("smoke run", f"one tile decoded in {time.perf_counter() - start:.2f} s, output {shape}")
    return 0


def _show_machine() -> None:
    for package in _PACKAGES:
        try:
            _line(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            _line(package, "not installed")
    _line("python", f"{platform.python_version()} on {platform.platform()}")
    _line("cpu", f"{platform.machine()}, {os.cpu_count()} logical cores")
    free = memory.available_bytes()
    _line("memory", "unknown" if free is None else f"{memory.readable(free)} available")


def _show_backends() -> None:
    for name in BACKENDS:
        try:
            offer = probe(name)
            also = f", {', '.join(offer.precisions)} with --precision" if offer.precisions else ""
            _line(f"backend {name}", f"{offer.version} on {', '.join(offer.devices)}{also}")
        except EngineError as error:
            _line(f"backend {name}", f"unusable: {error}")


def _show_engine(manifest: Manifest, where: str) -> None:
    _line("engine", where)
    if isinstance(manifest, AutoencoderManifest):
        how = f"scaling factor {manifest.latent_scale:g}, {', '.join(manifest.graphs)}"
        _line("autoencoder", f"{manifest.name}, tiles of {manifest.tile} px, {manifest.precision}, {how}")
        _show_proofs(manifest)
        return
    _line("model", f"{manifest.name}, x{manifest.scale}, tiles of {manifest.tile} px, {manifest.precision}")
    ranges = ", ".join(f"{t_from}..{t_to - 1}" for t_from, t_to in manifest.expert_ranges)
    _line("experts", f"{len(manifest.experts)}, for t in {ranges}")
    _line("defaults", f"{manifest.sampler}, {manifest.steps} steps")
    if manifest.guided:
        followed, avoided = map(repr, manifest.prompts)
        _line("prompts", f"{followed}, away from {avoided}, guidance {manifest.guidance:g}")
    if deep := manifest.deep:
        size = memory.readable(4 * math.prod(deep.shape(1)))
        _line("reuse", f"with --reuse N, {size} of features kept per tile")
    _show_proofs(manifest)


def _show_proofs(manifest: Manifest) -> None:
    """Print the error of every graph against its network."""
    for role, graph in manifest.graphs.items():
        for target, arrangement in (("", graph), *graph.variants.items()):
            if parity := arrangement.parity:
                verdict = "within" if parity.relative_l2 <= parity.threshold else "BEYOND"
                of = f" ({target}, {arrangement.precision})" if target else ""
                _line(f"parity {role}", f"{parity.relative_l2:.2e}, {verdict} {parity.threshold:.0e}{of}")
        if graph.calibration:
            _line(f"int8 {role}", str(graph.calibration))


def _show_choice(upscaler: Upscaler) -> None:
    """Print the backend and, if several were measured, their times and the directory of the measurements."""
    backend, measured = upscaler.backend, upscaler.measured
    instead = upscaler.manifest.precision == "bf16" and backend.options.precision is None
    how = " (its bf16 graphs in float32)" if instead else ""
    _line("runs on", f"{backend.label} {backend.version}, {backend.options.device}{how}")
    if measured:
        folder = user_cache.directory()
        _line("measured, one step", f"{measured} ({measured.machine})")
        _line(
            "measurements",
            f"{folder / autotune.FOLDER if folder else 'not cached, as there is no home directory'}",
        )


def _line(label: str, text: str) -> None:
    console.say(f"{label:<20} {text}")


if __name__ == "__main__":
    sys.exit(main())
