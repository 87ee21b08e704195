"""Command-line options that choose an engine and how it runs, shared by the programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_engine_options(p: argparse.ArgumentParser) -> None:
    """Options that choose the engine and how it runs, shared with `moesr-doctor`."""
    from moesr.runtime.backends.selection import BACKENDS
    from moesr.runtime.options import PRECISIONS

    p.add_argument(
        "--engine", type=_path, metavar="DIR", help="engine directory, or demo-x4 (default) or demo-x8"
    )
    p.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="what runs the engine (default: %(default)s, the fastest as measured once on this machine)",
    )
    p.add_argument("--device", help="cpu, cuda or cuda:N (default: the fastest that the backend has)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one a core)")
    p.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="graph",
        help="of the arithmetic: the engine's, or bf16 with openvino on a CPU that has it, or auto, the "
        "faster of these (default: %(default)s)",
    )
    p.add_argument(
        "--cache",
        type=_path,
        metavar="DIR",
        help="where graphs are kept as backends prepare them, for a faster start (default: the user's cache, "
        "$MOESR_CACHE or ~/.cache/moesr)",
    )
    p.add_argument(
        "--no-cache",
        action="store_const",
        const=False,
        dest="cache",
        help="keep no prepared graphs on a CPU: at full width they take twice the engine's size",
    )
    p.add_argument(
        "--no-cuda-graphs",
        action="store_true",
        help="have a GPU do a tick launch by launch: the same, slower, easier to look into",
    )
    p.add_argument(
        "--no-verify", action="store_true", help="do not compare the engine's hashes: a faster start"
    )
    p.add_argument("--debug", action="store_true", help="show where an internal error happened")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What they say to an Upscaler, beside the engine."""
    given = {name: getattr(args, name) for name in ("backend", "device", "threads", "precision", "cache")}
    return given | {"verify": not args.no_verify, "cuda_graphs": not args.no_cuda_graphs}


def _name(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected the name of a file or directory")
    return text


def _path(text: str) -> Path:
    return Path(_name(text))
