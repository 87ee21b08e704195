"""Command-line options that choose an engine and how it runs, shared by the programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_engine_options(
    p: argparse.ArgumentParser, *, several: bool = False, required: str | None = None
) -> None:
    """Add the options that choose the engine, or `several` engines, and how they run.

    A program for which no engine is bundled has a `required` one, with this help text.
    """
    from moesr.runtime.backends.selection import BACKENDS
    from moesr.runtime.options import PRECISIONS

    group = p.add_argument_group("engine and machine")
    kind = (
        "engine directory, a bundled engine: demo-x4 (default) or demo-x8, or one of the Hugging Face hub: "
        "hf://OWNER/NAME@REVISION (without @REVISION the branch main)"
    )
    if several:
        names = f"one or more of the following, each with its own name if NAME= is given: {kind}"
        group.add_argument("--engine", nargs="+", type=name_argument, metavar="[NAME=]DIR", help=names)
    elif required:
        group.add_argument("--engine", type=engine_argument, metavar="DIR", required=True, help=required)
    else:
        group.add_argument("--engine", type=engine_argument, metavar="DIR", help=kind)
    group.add_argument(
        "--backend",
        choices=("auto", *BACKENDS),
        default="auto",
        help="library that runs the engine (default: %(default)s, the fastest one, which is measured once "
        "per machine)",
    )
    group.add_argument("--device", help="cpu, cuda or cuda:N (default: the fastest one of the backend)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: one per core)")
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="graph",
        help="precision of the arithmetic: graph, that of the engine's graphs; bf16, with openvino on CPUs "
        "that have it; auto, the faster of the two (default: %(default)s)",
    )
    _add_start_options(group)


def _add_start_options(group: argparse._ArgumentGroup) -> None:
    """Add the options about how an engine is opened."""
    group.add_argument(
        "--cache",
        type=path_argument,
        metavar="DIR",
        help="directory for prepared graphs, with which later runs start faster (default: "
        "$MOESR_CACHE or ~/.cache/moesr)",
    )
    group.add_argument(
        "--no-cache",
        action="store_const",
        const=False,
        dest="cache",
        help="store no prepared graphs for a CPU; at full width they are twice as large as the engine",
    )
    group.add_argument(
        "--no-cuda-graphs",
        action="store_true",
        help="launch each GPU operation separately: same results, but slower, for debugging",
    )
    group.add_argument(
        "--no-verify", action="store_true", help="start faster without comparing the engine's hashes"
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of an internal error")


def cache_directory(args: argparse.Namespace) -> Path | None:
    """Return the directory of cached plans, given or the user's; `--no-cache` applies to CPUs only."""
    from moesr.runtime.system import user_cache

    return args.cache or user_cache.directory()


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of an Upscaler for these options, except the engine."""
    given = {name: getattr(args, name) for name in ("backend", "device", "threads", "precision", "cache")}
    return given | {"verify": not args.no_verify, "cuda_graphs": not args.no_cuda_graphs}


def name_argument(text: str) -> str:
    """Return a name that must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected the name of a file or directory")
    return text


def engine_argument(text: str) -> Path | str:
    """Return the directory of an engine; a URL stays as it is."""
    return name_argument(text) if "://" in text else path_argument(text)


def path_argument(text: str) -> Path:
    """Return the path of a file or directory, which must not be empty."""
    return Path(name_argument(text))
