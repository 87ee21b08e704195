"""One image over many workers: the result of a local run to the bit, though a worker dies."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from cluster_rig import TILE_RUNNER, picture, pids_of, tree
from engines import build_engine
from PIL import Image

from moesr.runtime import Upscaler
from moesr.runtime.cluster.remote import RemoteUpscaler
from moesr.runtime.cluster.tile_pool import TilePool, TileRunner

OPTIONS = {"name": "onnxruntime", "device": "cpu", "threads": 1}


class PoolOfOne:
    """A pool whose only runner is in this process."""

    per_run, capacity = 1, 3

    def __init__(self, engine: Path) -> None:
        self.runner, self.closed = TileRunner(str(engine), OPTIONS), False

    def run(self, role: str, parts: list) -> list:
        return [self.runner.run(role, *part) for part in parts]

    def abort(self) -> None:
        """There is nothing to stop."""

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("built", [{}, {"encoder": True}, {"reuse": True}], ids=["plain", "encoder", "reuse"])
def test_tiles_that_are_sent_give_the_result_of_a_local_run(built, tmp_path):
    engine = build_engine(tmp_path / "engine", steps=3, **built)
    pixels = np.random.default_rng(4).integers(0, 256, (40, 60, 3), np.uint8)
    options = {"reuse": 2} if built.get("reuse") else {}
    with Upscaler(engine, backend="onnxruntime", threads=1) as local:
        expected = local(pixels, **options)
    pool = PoolOfOne(engine)
    with RemoteUpscaler(str(engine), pool) as up:
        np.testing.assert_array_equal(up(pixels, **options), expected)
        assert up.statistics.tiles > up.statistics.ticks
    assert pool.closed


@pytest.mark.slow
def test_tiles_on_two_workers_though_one_is_killed(nodes, cluster_engine):
    pixels = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    with Upscaler(cluster_engine, backend="onnxruntime", threads=1) as local:
        expected = local(pixels, steps=60)
    with RemoteUpscaler(
        str(cluster_engine), TilePool(str(cluster_engine), OPTIONS, 2, {"num_cpus": 1})
    ) as up:
        victims = []

        def progress(done: float, total: float, stage: str) -> None:
            if done > total / 3 and not victims:
                victims.extend(pids_of(TILE_RUNNER)[:1])
                os.kill(victims[0], signal.SIGKILL)

        np.testing.assert_array_equal(up(pixels, steps=60, progress=progress), expected)
        assert victims and up.pool.ran.total() == up.statistics.tiles
        assert set(up.pool.ran) == {0, 1}, "both workers took part"


@pytest.mark.slow
def test_a_named_image_that_is_larger_than_a_worker(moesr, cluster_engine, tmp_path):
    picture(tmp_path / "in/big.png", 60, 40)
    picture(tmp_path / "in/small.png")
    names = tmp_path / "in/big.png", tmp_path / "in/small.png"
    made = moesr(*names, "-o", tmp_path / "out", "--memory-per-worker", "0.0005", "--backend", "onnxruntime")
    assert made.code == 0 and tree(tmp_path / "out") == ["big_x4.png", "small_x4.png"]
    with Upscaler(cluster_engine, backend="onnxruntime", threads=1) as local:
        expected = local(np.asarray(Image.open(names[0])))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/big_x4.png")), expected)
    again = moesr(names[0], "-o", tmp_path / "out", "--memory-per-worker", "0.0005")
    assert again.lines["big.png"]["status"] == "skipped"
