"""The service under load: many clients of mixed sizes against one image at a time, and hostile clients.

Starts `moesr-serve` as a process of its own on 127.0.0.1 and sends requests to that address alone. Reports
throughput, latencies, slots filled per tick, memory over time, and whether results equal serial ones.
Exit codes: 0 done, 1 a result differed or a hostile request was not refused.
"""

from __future__ import annotations

import argparse
import http.client
import io
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import benchlib.missing_extra  # noqa: F401
import numpy as np
from benchlib.machine import load_average
from benchlib.origin import origin_line
from PIL import Image

SIZES = ((48, 64), (96, 128), (64, 64), (192, 144))
"""Heights and widths of the inputs, in pixels; clients take them in turns."""

LISTENING = re.compile(r"listening on http://([\d.]+):(\d+)")
TIMEOUT_S = 600.0


@dataclass
class Load:
    """Measurements of one way of serving."""

    name: str
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    wrong: int = 0  # results that differ from serial ones
    refused: int = 0  # answers 503
    slots_per_tick: float = 0.0
    memory_mb: list[float] = field(default_factory=list)  # sampled over time

    def row(self) -> list[str]:
        """The cells of the table."""
        times = [np.percentile(self.latencies, q) if self.latencies else float("nan") for q in (50, 95, 99)]
        rate = len(self.latencies) / self.seconds if self.seconds else 0.0
        memory = f"{self.memory_mb[0]:.0f} to {max(self.memory_mb):.0f}" if self.memory_mb else "-"
        cells = [f"{value:.2f}" for value in times]
        return [
            self.name,
            str(len(self.latencies)),
            f"{rate:.3f}",
            *cells,
            f"{self.slots_per_tick:.2f}",
            memory,
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the loads, print the page, and write it if asked."""
    args = parser().parse_args(argv)
    loads, hostile = [], {}
    with (
        tempfile.TemporaryDirectory(prefix="moesr-serving-") as scratch,
        served(args, Path(scratch)) as server,
    ):
        images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
        want = [server.upscale(image, args.steps)[1] for image in images]
        loads.append(run("one at a time", server, images, want, 1, args))
        loads.append(run(f"{args.clients} clients", server, images, want, args.clients, args))
        hostile = attack(server)
        over = run(f"{args.over} clients, beyond the queue", server, images, want, args.over, args)
        loads.append(over)
    text = page(args, loads, hostile)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")
    return int(
        any(load.wrong for load in loads) or any(not 400 <= status < 500 for status in hostile.values())
    )


class Server:
    """A client of the service's process."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"

    def upscale(self, image: bytes, steps: int) -> tuple[int, np.ndarray | None]:
        """Status and pixels of one image."""
        request = urllib.request.Request(f"{self.url}/v1/upscale?steps={steps}", image)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.status, np.asarray(Image.open(io.BytesIO(answer.read())))
        except urllib.error.HTTPError as error:
            return error.code, None

    def metrics(self) -> dict[str, float]:
        """Sums of the metrics by name."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        found: dict[str, float] = {}
        for line in lines:
            if line and not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        return found


@contextmanager
def served(args: argparse.Namespace, scratch: Path) -> Iterator[Server]:
    """The service as a process, for the time of a block."""
    command = [
        sys.executable,
        "-m",
        "moesr.runtime.serve.cli",
        "--port",
        "0",
        "--state",
        str(scratch / "state"),
    ]
    command += ["--engine", args.engine, "--queue", str(args.clients + 2), "--idle", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := LISTENING.search(line):
                break
        else:
            raise SystemExit("".join(lines))
        threading.Thread(target=lambda: [None for _ in process.stderr or ()], daemon=True).start()
        try:
            yield Server(found[1], int(found[2]))
        finally:
            process.terminate()


def picture(height: int, width: int, seed: int) -> bytes:
    """A PNG of seeded noise, enlarged so that it has smooth parts."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def run(
    name: str,
    server: Server,
    images: Sequence[bytes],
    want: Sequence[Any],
    clients: int,
    args: argparse.Namespace,
) -> Load:
    """Have clients send images for the time that the arguments allow; each waits for its answer."""
    load, lock = Load(name), threading.Lock()
    before, begin = server.metrics(), time.monotonic()
    end = begin + args.seconds

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < end:
            start, which = time.monotonic(), turn % len(images)
            status, got = server.upscale(images[which], args.steps)
            with lock:
                if status == 503:
                    load.refused += 1
                elif status == 200:
                    load.latencies.append(time.monotonic() - start)
                    load.wrong += not np.array_equal(np.asarray(got), want[which])
                else:
                    load.wrong += 1
            turn += 1
            if status == 503:
                time.sleep(1.0)

    threads = [threading.Thread(target=client, args=(k,)) for k in range(clients)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        load.memory_mb.append(server.metrics()["moesr_resident_bytes"] / 1e6)
        for thread in threads:
            thread.join(1.0 / clients)
    load.seconds = time.monotonic() - begin
    after = server.metrics()
    ticks = after["moesr_ticks_total"] - before["moesr_ticks_total"]
    load.slots_per_tick = (after["moesr_slots_total"] - before["moesr_slots_total"]) / max(ticks, 1)
    return load


def attack(server: Server) -> dict[str, int]:
    """Send what a hostile client would; returns the status of each, 408 for a connection that was cut off."""
    image = picture(64, 64, 0)

    def post(path: str, body: bytes, **headers: str) -> int:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
        with suppress(BrokenPipeError, ConnectionError):
            connection.request("POST", path, body, headers)
        try:
            return connection.getresponse().status
        except (http.client.HTTPException, OSError):
            return 408
        finally:
            connection.close()

    attempts: dict[str, Callable[[], int]] = {
        "no image": lambda: post("/v1/upscale", b""),
        "text": lambda: post("/v1/upscale", b"x" * 1000),
        "a truncated image": lambda: post("/v1/upscale", image[: len(image) // 2]),
        "an upload beyond the limit": lambda: post("/v1/upscale", bytes(70_000_000)),
        "an option with a path": lambda: post("/v1/upscale?engine=../../etc/passwd", image),
        "huge headers": lambda: post("/v1/upscale", image, X="a" * 100_000),
        "a damaged form": lambda: post("/v1/upscale", b"--", **{"Content-Type": "multipart/form-data"}),
        "a slow upload": lambda: slow(server),
    }
    found = {name: attempt() for name, attempt in attempts.items()}
    idle = []
    with suppress(OSError):  # at the limit of connections, or of this process
        for _ in range(500):
            idle.append(socket.create_connection((server.host, server.port), timeout=10))
    status, _ = server.upscale(image, 1)
    found["500 idle connections (an image in between)"] = 408 if status == 200 else 500
    for connection in idle:
        connection.close()
    return found


def slow(server: Server) -> int:
    """Announce a body and send nothing of it; returns the status of the answer."""
    with socket.create_connection((server.host, server.port), timeout=60) as connection:
        connection.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        return int(connection.recv(100).split()[1])


def page(args: argparse.Namespace, loads: Sequence[Load], hostile: dict[str, int]) -> str:
    """The results as Markdown."""
    sizes = ", ".join(f"{width}x{height}" for height, width in SIZES)
    load = load_average()
    heads = (
        "load",
        "images",
        "images per s",
        "p50 (s)",
        "p95 (s)",
        "p99 (s)",
        "slots per tick",
        "memory (MB)",
    )
    lines = [
        "# The service under load",
        "",
        origin_line(),
        "",
        f"Engine {args.engine}, {args.steps} steps, inputs of {sizes} pixels in turns, "
        f"{args.seconds:g} seconds per load"
        + (f", load average {load:.1f} at the end." if load is not None else "."),
        "",
        f"| {' | '.join(heads)} |",
        "| --- " * len(heads) + "|",
        *(f"| {' | '.join(one.row())} |" for one in loads),
        "",
        *(f"{one.name}: {one.wrong} wrong results, {one.refused} refused with 503." for one in loads),
        "",
        "Hostile requests, each with its status (408: cut off): "
        + ", ".join(f"{name} {status}" for name, status in hostile.items())
        + ".",
    ]
    if len(loads) > 1 and loads[0].latencies and loads[1].latencies:
        rates = [len(one.latencies) / one.seconds for one in loads[:2]]
        lines += ["", f"Throughput of {loads[1].name} over one at a time: {rates[1] / rates[0]:.2f}."]
        lines.append(
            f"Median latency: {median(loads[0].latencies):.2f} s against {median(loads[1].latencies):.2f} s."
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--engine", default="demo-x4", metavar="DIR", help="engine directory or name (default: %(default)s)")
    add("--clients", type=int, default=8, metavar="N", help="clients at once (default: %(default)s)")
    add(
        "--over",
        type=int,
        default=16,
        metavar="N",
        help="clients beyond the queue's places (default: %(default)s)",
    )
    add("--steps", type=int, default=5, metavar="N", help="sampling steps (default: %(default)s)")
    add("--seconds", type=float, default=600.0, metavar="S", help="of each load (default: %(default)g)")
    add("-o", "--output", type=Path, metavar="FILE", help="also write the page there")
    return p


if __name__ == "__main__":
    sys.exit(main())
