"""A small image behind a large one, and a folder of images with and without turns between them."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

from load_test.pictures import array, picture
from load_test.server import Server
from moesr.runtime.upscaler import Upscaler

FOLDER, ROUNDS = 6, 2
"""Number of images of the folder, and how often it is run in each way."""


@dataclass
class Fairness:
    """Measurements in seconds. `small` and `large` are the sides of the two square images in pixels."""

    small: int
    large: int
    alone: float = 0.0  # the small image with nothing else to do
    behind: float = 0.0  # the small image while the large one is sampled
    refused: str = ""  # the reason if the large image was not sampled
    as_folder: list[float] = field(default_factory=list)  # all images by `Upscaler.map`, without turns
    in_turns: list[float] = field(default_factory=list)  # all images by `Upscaler.submit`, each with its turn


def small_behind_large(server: Server, steps: int, found: Fairness) -> None:
    """Time a small image alone and while a large one is being sampled; cancel the large one at the end."""
    small = picture(found.small, found.small, seed=1)
    found.alone = _seconds(server, small, steps)
    try:
        job = _call(server, f"/v1/jobs?steps={steps}", picture(found.large, found.large, seed=2))
        while (state := _call(server, f"/v1/jobs/{job['id']}")).get("stage") != "sampling":
            if state["status"] in ("done", "failed"):
                found.refused = state.get("problem", {}).get("detail", "it was done too early")
                return
            time.sleep(0.1)
    except urllib.error.HTTPError as error:
        found.refused = json.load(error)["detail"]
        return
    try:
        found.behind = _seconds(server, small, steps)
    finally:
        request = urllib.request.Request(f"{server.url}/v1/jobs/{job['id']}", method="DELETE")
        urllib.request.urlopen(request, timeout=600).close()


def folder(engine: str, steps: int, sizes: Sequence[tuple[int, int]], found: Fairness) -> None:
    """Time a folder of images as one flow, as `moesr-run` does it, and as a flow per image, by turns."""
    images = [array(*sizes[k % len(sizes)], seed=k) for k in range(FOLDER)]
    with Upscaler(engine) as up:
        list(up.map(images, steps=steps))  # loads the graphs
        for _ in range(ROUNDS):
            begin = time.monotonic()
            list(up.map(images, steps=steps))
            found.as_folder.append(time.monotonic() - begin)
            begin = time.monotonic()
            for handle in [up.submit(image, steps=steps) for image in images]:
                handle.result()
            found.in_turns.append(time.monotonic() - begin)


def lines(found: Fairness) -> list[str]:
    """Return the section of the page, without anything that was not measured."""
    parts = []
    if found.refused:
        parts.append(f"The image of {_mp(found.large)} megapixels was not measured: {found.refused}")
    elif found.behind:
        times = found.behind / found.alone
        parts.append(
            f"An image of {_mp(found.small)} megapixels takes {found.alone:.2f} s alone and "
            f"{found.behind:.2f} s while one of {_mp(found.large)} megapixels is sampled: {times:.2f} times "
            "as long."
        )
    if found.in_turns:
        one, many = median(found.as_folder), median(found.in_turns)
        parts.append(
            f"A folder of {FOLDER} images takes {one:.2f} s as one flow (`Upscaler.map`, as in `moesr-run`) "
            f"and {many:.2f} s with a turn per image (`Upscaler.submit`), medians of {ROUNDS} runs in turns."
        )
    return ["## Fair shares", *parts] if parts else []


def _mp(side: int) -> str:
    return f"{side * side / 1e6:.3g}"


def _seconds(server: Server, image: bytes, steps: int) -> float:
    begin = time.monotonic()
    status, _ = server.upscale(image, steps)
    if status != 200:
        raise SystemExit(f"the small image got status {status}")
    return time.monotonic() - begin


def _call(server: Server, path: str, data: bytes | None = None) -> dict:
    with urllib.request.urlopen(server.url + path, data, timeout=600) as answer:
        return json.load(answer)
