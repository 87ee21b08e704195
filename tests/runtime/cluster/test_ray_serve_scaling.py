"""The number of replicas of the Ray Serve application follows the number of requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from benchlib.local_store import free_port
from cluster_rig import picture
from test_ray_serve import sender, wait_for


@pytest.fixture
def state(nodes: Any, cluster_engine: Path, tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """Start one replica, of which there may be two; return its directory and the port."""
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    from ray import serve

    from moesr.runtime.cluster.serving import Replica, Settings

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = {
        "state": str(tmp_path / "state"),
        "engines": [f"tiny={cluster_engine}"],
        "upscaler": {"backend": "onnxruntime", "threads": 1},
    }
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
    delays = {"upscale_delay_s": 0.5, "downscale_delay_s": 2.0}
    replica = Replica.options(autoscaling_config=scaling | delays, ray_actor_options={"num_cpus": 0.5})
    serve.run(replica.bind(Settings.of(args)), route_prefix="/")
    yield tmp_path / "state", port
    serve.shutdown()


def running() -> int:
    from ray import serve

    (application,) = serve.status().applications.values()
    return application.deployments["replica"].replica_states.get("RUNNING", 0)


@pytest.mark.slow
def test_second_replica_comes_under_a_queue_and_goes_afterwards(state, tmp_path):
    root, port = state
    send, over, statuses = sender(port), threading.Event(), list[int]()
    image = picture(tmp_path / "a.png", 24, 24).read_bytes()
    assert running() == 1

    def ask() -> None:
        while not over.is_set():
            statuses.append(send("/v1/upscale?steps=100", image)[0])

    clients = [threading.Thread(target=ask) for _ in range(6)]
    for client in clients:
        client.start()
    try:
        wait_for(lambda: running() == 2)
        assert sorted(path.name for path in root.iterdir()) == ["replica-0", "replica-1"]
    finally:
        over.set()
        for client in clients:
            client.join()
    assert statuses and set(statuses) == {200}
    wait_for(lambda: running() == 1)
    assert send("/v1/upscale?steps=2", image)[0] == 200
