"""Folders and buckets on a cluster: the same files, names, reports and exit codes as a local run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from cluster_rig import has_results, kill_a_worker, picture, tree, when
from PIL import Image

from moesr.runtime import Upscaler
from moesr.runtime.cli import batch
from moesr.runtime.cli.batch import RunOptions
from moesr.runtime.cli.outputs import Naming
from moesr.runtime.cli.run import main
from moesr.runtime.cluster import listing, places
from moesr.runtime.cluster.listing import Sources, with_twins
from moesr.runtime.cluster.worker import Work, Worker
from moesr.runtime.engine.manifest_file import MANIFEST_NAME, read_manifest
from moesr.runtime.images import provenance
from moesr.runtime.system import user_cache
from moesr.runtime.system.files import sha256_of


@pytest.mark.slow
def test_bucket_gives_the_results_of_a_folder_though_a_worker_is_killed(
    bucket, moesr, cluster_engine, tmp_path, capfd
):
    source, target = bucket("a.png", "b.png", "b.jpg", "deep/c.tif"), bucket()
    (source / "bad.png").write_bytes(b"no image")
    (source / "note.txt").write_text("no image either")
    places = f"s3://{source.name}", "-o", f"s3://{target.name}/large", "--recursive", "--steps", "100"
    with when(has_results(target), kill_a_worker) as killed:
        made = moesr(*places, "--workers", "1")
    assert killed
    results = ["a_x4.png", "b_jpg_x4.png", "b_png_x4.png", "deep/c_x4.png"]
    assert made.code == 1 and tree(target / "large") == results
    assert {name: line["status"] for name, line in made.lines.items()} == dict.fromkeys(
        ("a.png", "b.png", "b.jpg", "c.tif"), "done"
    ) | {"bad.png": "failed"}
    assert made.lines["a.png"]["result"] == f"s3://{target.name}/large/a_x4.png"
    assert made.lines["bad.png"]["error"].startswith(f"s3://{source.name}/bad.png: not an image")
    said = capfd.readouterr()
    assert "4 done, 0 skipped, 1 failed" in said.err and "Traceback" not in said.err

    local = tmp_path / "local"
    assert main(["--engine", str(cluster_engine), str(source), "-o", str(local), *places[3:]]) == 1
    assert tree(local) == results
    for name in results:
        here, there = (np.asarray(Image.open(folder / name)) for folder in (local, target / "large"))
        np.testing.assert_array_equal(here, there)
        assert provenance.read(local / name) == provenance.read(target / "large" / name)


def test_second_run_makes_what_is_missing(bucket, cluster_engine):
    """A worker decides by the record in a result, without a cluster."""
    source, target = bucket("a.png", "b.png"), bucket()
    wanted, how = batch.prepared(read_manifest(cluster_engine), {}, RunOptions())
    work = Work(str(cluster_engine), {}, f"s3://{target.name}", {}, how, wanted)
    with Upscaler(cluster_engine, threads=1) as up:
        worker = Worker(work, upscaler=up)

        def statuses(worker: Worker = worker) -> list[str]:
            rows = Sources((f"s3://{source.name}",), Naming("_x4")).rows()
            lines = [json.loads(worker(row.values())["line"]) for row in rows]
            return [f"{line['status']} {line['error'] or ''}".strip() for line in lines]

        assert statuses() == ["done", "done"]
        (target / "b_x4.png").unlink()
        assert statuses() == ["skipped", "done"]
        picture(source / "a.png")  # is newer than its result now
        assert statuses() == ["skipped", "skipped"]
        (target / "b_x4.png").write_bytes(b"something else")
        (failure,) = (line for line in statuses() if "failed" in line)
        assert "exists and is not a result; pass --force to overwrite it" in failure
        forced = Worker(dataclasses.replace(work, how=dataclasses.replace(how, force=True)), upscaler=up)
        assert statuses(forced) == ["done", "done"]


@pytest.mark.slow
def test_folders_and_named_files(moesr, tmp_path, capfd):
    picture(tmp_path / "in/a.png")
    picture(tmp_path / "in/sub/b.png")
    made = moesr(tmp_path / "in/a.png", f"file://{tmp_path}/in/sub", "-o", tmp_path / "out", "--scale", "2")
    assert made.code == 0 and tree(tmp_path / "out") == ["a_x2.png", "b_x2.png"]
    other = moesr(tmp_path / "in/a.png", "-o", tmp_path / "out", "--scale", "2", "--steps", "3")
    assert other.code == 1 and "made with steps 2 (now 3)" in other.lines["a.png"]["error"]
    folder = moesr(tmp_path / "in", "-o", tmp_path / "out", "--scale", "2", "--steps", "3")
    assert folder.code == 0 and folder.lines["a.png"]["status"] == "skipped"
    assert "made with steps 2 (now 3)" in capfd.readouterr().err


@pytest.mark.slow
def test_engine_behind_a_url_is_copied_once_per_node(bucket, moesr, cluster_engine, tmp_path, s3):
    source, store, cache = bucket("a.png"), bucket(), user_cache.directory() / "engines"
    shutil.copytree(cluster_engine, store, dirs_exist_ok=True)
    copy = cache / sha256_of(cluster_engine / MANIFEST_NAME)[:16]
    shutil.rmtree(copy, ignore_errors=True)
    made = moesr(f"s3://{source.name}", "-o", tmp_path / "out", "--engine", f"s3://{store.name}")
    assert made.code == 0 and tree(tmp_path / "out") == ["a_x4.png"]
    assert tree(copy) == tree(cluster_engine) and not any(cache.glob(".moesr-*"))
    (graph,) = {path for _, path in s3.proxy.requests if path.startswith(f"/{store.name}/decoder")}
    assert s3.proxy.requests.count(("GET", graph)) == 1


def test_listing_is_streamed():
    """Neither a million keys nor their files are held in memory."""
    read = itertools.count()
    entries = ((f"{next(read):07d}.frame.png", 0.0) for _ in range(1_000_000))
    rows = with_twins(entries)
    next(rows)
    assert next(read) < 10
    tracemalloc.start()
    assert all(alone for _, _, alone in itertools.islice(rows, 20_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_names_that_differ_only_in_the_extension():
    keys = ["a.avif", "a.b.jpg", "a.b.png", "a.d/x.png", "a.png", "b.png", "c/a.png"]
    found = [(key, alone) for key, _, alone in with_twins((key, 0.0) for key in keys)]
    assert sorted(key for key, _ in found) == keys
    assert sorted(key for key, alone in found if alone) == ["a.d/x.png", "b.png", "c/a.png"]


def test_results_in_the_source_are_not_inputs(tmp_path: Path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "out/a_x4.png")
    sources = Sources((str(tmp_path),), Naming("_x4"), True, f"{tmp_path}/out/")
    assert [row.key for row in sources.rows()] == ["a.png"]
    assert list(listing.images(listing.place_of(str(tmp_path)), False)) != []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s3://a/b", "-o", "x"], "s3://a/b: is a URL; add --ray"),
        (["a.png", "--workers", "2"], "--workers is for runs with --ray"),
        (["a.png", "--ray"], "name a folder or URL with -o"),
        (["--ray", "a.png"], "name a folder or URL with -o"),
        (["a.png", "-o", "b", "--compare", "--ray"], "--compare is not available with --ray"),
        (["s3://a", "-o", "s3://a", "--ray"], "is also an input"),
        (["ftp://a", "-o", "b", "--ray"], "expected a folder, or a URL of s3://"),
        (["a", "-o", "b", "--workers", "0", "--ray"], "--workers is 0, expected 1 or more"),
    ],
)
def test_wrong_usage(arguments, message, capfd):
    assert main(arguments) == 2
    assert message in capfd.readouterr().err


@pytest.mark.parametrize("library", ["ray", "obstore"])
def test_missing_library_is_reported_with_its_extra(library, tmp_path, monkeypatch, capfd):
    picture(tmp_path / "a.png")
    monkeypatch.setattr(places, "_stores", {})
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    target = f"{tmp_path}/out" if library == "ray" else "s3://out"
    assert main(["--ray", str(tmp_path / "a.png"), "-o", target]) == 2
    assert f"{library} is not installed; install it with: pip install 'moesr[ray]'" in capfd.readouterr().err


def test_input_that_changes_while_it_is_read_is_a_failure(bucket, cluster_engine, monkeypatch):
    source, target = bucket("a.png"), bucket()
    wanted, how = batch.prepared(read_manifest(cluster_engine), {}, RunOptions())
    upscale = batch.run

    def changed_meanwhile(*arguments: object) -> int:
        picture(source / "a.png")
        return upscale(*arguments)

    with Upscaler(cluster_engine, threads=1) as up:
        worker = Worker(Work(str(cluster_engine), {}, f"s3://{target.name}", {}, how, wanted), upscaler=up)
        (row,) = Sources((f"s3://{source.name}",), Naming("_x4")).rows()
        monkeypatch.setattr(batch, "run", changed_meanwhile)
        line = json.loads(worker(row.values())["line"])
        assert line["status"] == "failed" and "was modified while it was read; run again" in line["error"]
        assert tree(target) == []
        monkeypatch.setattr(batch, "run", upscale)
        assert json.loads(worker(row.values())["line"])["status"] == "done"


def test_several_folders_are_refused(tmp_path, capfd):
    for name in ("a", "b"):
        picture(tmp_path / name / "x.png")
    assert main(["--ray", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "out")]) == 2
    assert "run them one by one, each with -o of its own" in capfd.readouterr().err


def test_internal_error_is_a_failure_of_one_input(cluster_engine, tmp_path, monkeypatch):
    picture(tmp_path / "a.png")
    wanted, how = batch.prepared(read_manifest(cluster_engine), {}, RunOptions())
    with Upscaler(cluster_engine, threads=1) as up:
        worker = Worker(Work(str(cluster_engine), {}, f"{tmp_path}/out", {}, how, wanted), upscaler=up)
        monkeypatch.setattr(batch, "run", lambda *_: 1 / 0)
        (row,) = Sources((str(tmp_path),), Naming("_x4")).rows()
        made = worker(row.values())
    line = json.loads(made["line"])
    assert made["code"] == 1 and line["status"] == "failed"
    assert line["error"].endswith(
        "a.png: internal error, please report it: ZeroDivisionError: division by zero"
    )
