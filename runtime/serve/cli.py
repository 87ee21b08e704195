"""Serve engines over HTTP: images and jobs under /v1, a page for people at /, metrics at /metrics.

Accepted jobs are kept in the state directory and continue after a restart. On SIGTERM the server stops
accepting requests, finishes the running images within --grace seconds, and keeps the others for the next
start.
Exit codes: 0 stopped, 1 the address or the state directory cannot be used, 2 usage, 3 engine unusable.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesr.runtime.system import console

if TYPE_CHECKING:
    from moesr.runtime.serve.limits import Limits


def main(argv: Sequence[str] | None = None) -> int:
    """Run `moesr-serve` and return its exit code."""
    return console.run_program("moesr-serve", parser, run, argv, interrupted="stopped", extra="serve")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line of `moesr-serve`."""
    from moesr.runtime.cli.engine_options import add_engine_options
    from moesr.runtime.serve.limits import MEGA, Limits

    p = argparse.ArgumentParser("moesr-serve", description=__doc__, formatter_class=console.HelpFormatter)
    add = p.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add(
        "--port",
        type=int,
        default=8080,
        help="port to listen on; 0 selects a free one (default: %(default)s)",
    )
    add("--token-file", type=Path, metavar="FILE", help="file with the bearer token that requests must carry")
    text = "directory for jobs and results (default: serve/ in the user's cache)"
    add("--state", type=Path, metavar="DIR", help=text)
    add(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="format of the log (default: %(default)s)",
    )
    group = p.add_argument_group("limits")
    for flag, default, value, text in _limits(Limits(), MEGA):
        kind = type(default)
        group.add_argument(
            flag, type=kind, default=default, metavar=value, help=f"{text} (default: {default:g})"
        )
    add_engine_options(p, several=True)
    return p


def _limits(limits: Limits, mega: int) -> list[tuple[str, int | float, str, str]]:
    """Return flag, default, metavariable and help of each limit."""
    return [
        ("--max-megapixels", limits.input_px / mega, "N", "largest image, in megapixels"),
        ("--max-upload", limits.upload_bytes / mega, "MB", "largest request"),
        ("--max-uploads", limits.uploads_bytes / mega, "MB", "all requests together that are arriving"),
        ("--queue", limits.queue, "N", "number of images that may wait or run at the same time"),
        ("--time-limit", limits.request_s, "S", "seconds after which an image of /v1/upscale is cancelled"),
        ("--keep", limits.keep_s, "S", "seconds for which results of jobs are kept"),
        ("--grace", limits.grace_s, "S", "seconds for finishing images on SIGTERM"),
        ("--idle", limits.idle_s, "S", "seconds of silence after which a connection is closed"),
        ("--connections", limits.connections, "N", "number of connections open at the same time"),
    ]


def run(args: argparse.Namespace) -> int:
    """Serve until a signal arrives."""
    import contextlib

    from moesr.runtime.cli.engine_options import engine_options
    from moesr.runtime.serve.app import make_app
    from moesr.runtime.serve.server import listen, server_of
    from moesr.runtime.serve.service import Service
    from moesr.runtime.serve.store import Store
    from moesr.runtime.system import user_cache
    from moesr.runtime.upscaler import Upscaler

    limits, token = limits_of(args), read_token(args.token_file)
    store = Store(args.state or (user_cache.directory() or Path(tempfile.gettempdir(), "moesr")) / "serve")
    _set_log_format(args.log_format)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)
        listening = stack.enter_context(listen(args.host, args.port))
        options = engine_options(args)
        engines = {
            name: stack.enter_context(Upscaler(directory, **options))
            for name, directory in named_engines(args.engine or ["demo-x4"]).items()
        }
        service = Service(engines, store, limits)
        server = server_of(make_app(service, token), service)
        server.run(sockets=[listening])
    return 0


def limits_of(args: argparse.Namespace) -> Limits:
    """Return the limits of the options; UsageError names a limit that is out of range."""
    from moesr.runtime.errors import UsageError
    from moesr.runtime.serve.limits import MEGA, Limits

    given = {
        "upload_bytes": ("--max-upload", args.max_upload * MEGA),
        "uploads_bytes": ("--max-uploads", args.max_uploads * MEGA),
        "input_px": ("--max-megapixels", args.max_megapixels * MEGA),
        "queue": ("--queue", args.queue),
        "request_s": ("--time-limit", args.time_limit),
        "idle_s": ("--idle", args.idle),
        "connections": ("--connections", args.connections),
        "keep_s": ("--keep", args.keep),
        "grace_s": ("--grace", args.grace),
    }
    for name, (flag, value) in given.items():
        if not (value > 0 or (name == "grace_s" and value == 0)) or value == math.inf:
            raise UsageError(f"{flag} is {value:g}, expected more than 0")
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port is {args.port}, expected 0 to 65535")
    kinds = {name: type(default) for name, default in vars(Limits()).items()}
    return Limits(**{name: kinds[name](value) for name, (_, value) in given.items()})


def read_token(path: Path | None) -> str | None:
    """Return the token in a file; UsageError if the file cannot be read or holds none."""
    from moesr.runtime.errors import UsageError

    if path is None:
        return None
    try:
        token = path.read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a token ({error})") from error
    if not token:
        raise UsageError(f"{path}: is empty; write a token into it, e.g. the output of: openssl rand -hex 32")
    if len(token.split()) > 1:
        raise UsageError(f"{path}: holds more than one word, expected a token without spaces")
    return token


def named_engines(given: Sequence[str]) -> dict[str, str]:
    """Return engines by name, from NAME=ENGINE or from the last part of a directory or repository."""
    from moesr.runtime.engine.hub_names import is_hub_name, parse
    from moesr.runtime.errors import UsageError

    found: dict[str, str] = {}
    for text in given:
        name, equals, directory = text.partition("=")
        if not equals or os.sep in name:
            name, directory = Path(text).name, text
            if is_hub_name(text):
                name = Path(parse(text).repository).name
        if not name or not directory:
            raise UsageError(f"--engine {text}: expected NAME=DIR or DIR")
        if name in found:
            raise UsageError(f"--engine: two engines are called {name!r}; name them as NAME=DIR")
        found[name] = directory
    return found


def _set_log_format(kind: str) -> None:
    """Make every handler of the log write lines of this format."""
    from moesr.runtime.serve.server import JsonLines, TextLines

    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if kind == "json" else TextLines())
    root = logging.getLogger("moesr")
    root.handlers = [handler]
    logging.getLogger("uvicorn.error").handlers = [handler]
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
