"""Runs from bucket to bucket with an engine in a bucket; the driver is also the worker, without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_rig import picture, tree

from moesr.runtime import Upscaler
from moesr.runtime.cli.run import main
from moesr.runtime.cluster import dataset
from moesr.runtime.cluster.engines import engine_on_this_node, hash_of
from moesr.runtime.cluster.ledger import Counts
from moesr.runtime.cluster.listing import Sources
from moesr.runtime.cluster.places import Bucket
from moesr.runtime.cluster.worker import Work, Worker
from moesr.runtime.engine.manifest_file import MANIFEST_NAME
from moesr.runtime.errors import EngineError
from moesr.runtime.images import provenance
from moesr.runtime.system.files import scratch_path


class RowsWithoutRay:
    """Stands for `ReportRows`: the rows of a worker in this process."""

    def __init__(self, sources: Sources, work: Work, *_: object) -> None:
        self._sources, self._work, self._listed = sources, work, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with Upscaler(engine_on_this_node(self._work.engine), **self._work.upscaler) as upscaler:
            worker = Worker(self._work, upscaler=upscaler)
            for row in self._sources.rows():
                self._listed += 1
                yield worker(row.values())

    def counts(self) -> Counts:
        return Counts(self._listed, True)

    def close(self) -> None:
        """There is nothing to stop."""


@pytest.fixture
def stored_engine(bucket, cluster_engine: Path) -> Path:
    """Return a bucket with the engine."""
    store = bucket()
    shutil.copytree(cluster_engine, store, dirs_exist_ok=True)
    return store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the directory for engines in an empty cache."""
    monkeypatch.setenv("MOESR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/engines"


def test_bucket_is_read_written_and_resumed(bucket, stored_engine, cache, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(dataset, "connected", lambda address: contextlib.nullcontext())
    monkeypatch.setattr(dataset, "report_rows", RowsWithoutRay)
    source, target, log = bucket("a.png", "deep/b.jpg", "c.png"), bucket(), tmp_path / "log.jsonl"
    (source / "bad.png").write_bytes(b"no image")
    arguments = (
        f"s3://{source.name}",
        "-o",
        f"s3://{target.name}/large",
        "--engine",
        f"s3://{stored_engine.name}",
    )

    def run() -> tuple[int, dict[str, str], str]:
        log.unlink(missing_ok=True)
        code = main(["--ray", *arguments, "--recursive", "--log", str(log)])
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        return code, {line["input"]: line["status"] for line in lines}, capfd.readouterr().err

    names = [f"s3://{source.name}/{key}" for key in ("a.png", "bad.png", "c.png", "deep/b.jpg")]
    code, statuses, said = run()
    assert code == 1 and statuses == dict(zip(names, ("done", "failed", "done", "done"), strict=True))
    assert "3 done, 0 skipped, 1 failed" in said and "bad.png: not an image" in said
    results = ["a_x4.png", "c_x4.png", "deep/b_x4.png"]
    assert tree(target / "large") == results
    records = [provenance.read(target / "large" / name) for name in results]
    assert [record.source for record in records if record] == ["a.png", "c.png", "b.jpg"]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [
        hash_of(stored_engine / MANIFEST_NAME)
    ]

    (target / "large/c_x4.png").unlink()
    picture(source / "bad.png")
    code, statuses, said = run()
    assert code == 0 and statuses == dict(zip(names, ("skipped", "done", "done", "skipped"), strict=True))
    assert "2 done, 2 skipped, 0 failed" in said
    assert tree(target / "large") == sorted([*results, "bad_x4.png"])


COPY = """
import pathlib, sys, time
from moesr.runtime.cluster.engines import engine_on_this_node
url, ready, go = sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3])
ready.touch()
while not go.exists():
    time.sleep(0.001)
print(engine_on_this_node(url))
"""


def test_two_processes_copy_an_engine_once(stored_engine, cache, tmp_path, s3):
    url, go = f"s3://{stored_engine.name}", tmp_path / "go"
    marks = [tmp_path / str(number) for number in range(2)]
    racers = [
        subprocess.Popen([sys.executable, "-c", COPY, url, mark, go], stdout=subprocess.PIPE, text=True)
        for mark in marks
    ]
    deadline = time.monotonic() + 60
    while not all(mark.exists() for mark in marks) and time.monotonic() < deadline:
        time.sleep(0.001)
    go.touch()
    copy = cache / hash_of(stored_engine / MANIFEST_NAME)
    assert [Path(racer.communicate()[0].strip()) for racer in racers] == [copy, copy]
    assert s3.proxy.requests.count(("GET", f"/{stored_engine.name}/decoder.onnx")) == 1
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [copy.name]
    assert tree(copy) == tree(stored_engine)


def test_what_a_killed_process_left_in_the_cache_is_removed(stored_engine, cache):
    url = f"s3://{stored_engine.name}"
    copy = engine_on_this_node(url)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = scratch_path(cache)
    left = left.with_name(left.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    shutil.copytree(copy, left / "engine")
    assert engine_on_this_node(url) == copy
    assert not left.exists() and tree(copy) == tree(stored_engine)


def test_copy_that_another_node_makes_meanwhile(stored_engine, cache, monkeypatch):
    """Two nodes may share a cache on a file system without locks; the first copy stays."""
    fetch = Bucket.fetch

    def fetched_by_another(self: Bucket, key: str, folder: Path) -> tuple[Path, str]:
        made = fetch(self, key, folder)
        if key.startswith("decoder"):
            shutil.copytree(stored_engine, cache / hash_of(stored_engine / MANIFEST_NAME))
            (cache / hash_of(stored_engine / MANIFEST_NAME) / "first").touch()
        return made

    monkeypatch.setattr(Bucket, "fetch", fetched_by_another)
    copy = engine_on_this_node(f"s3://{stored_engine.name}")
    assert (copy / "first").exists() and [path for path in cache.iterdir() if path.is_dir()] == [copy]


def test_engine_that_is_replaced_while_it_is_copied(stored_engine, cache, monkeypatch):
    fetch = Bucket.fetch

    def fetched_before_a_change(self: Bucket, key: str, folder: Path) -> tuple[Path, str]:
        made = fetch(self, key, folder)
        (stored_engine / MANIFEST_NAME).write_bytes(b"another manifest")
        return made

    monkeypatch.setattr(Bucket, "fetch", fetched_before_a_change)
    with pytest.raises(EngineError, match="was replaced while it was copied; run again"):
        engine_on_this_node(f"s3://{stored_engine.name}")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []
