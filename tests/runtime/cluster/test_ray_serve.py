"""The service as an application of Ray Serve: one request of each kind, and jobs of another replica."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchlib.local_store import free_port
from cluster_rig import picture
from PIL import Image

CONFIG = Path(__file__).resolve().parents[3] / "docs/serving/ray-serve.yaml"


Send = Callable[..., tuple[int, Any, bytes]]


def sender(port: int) -> Send:
    """Return a function that sends a request and returns status, headers and body, once the route exists."""

    def send(path: str, data: bytes | None = None, method: str | None = None) -> tuple[int, Any, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    wait_for(lambda: send("/healthz")[0] == 200)  # the proxy learns the route a little later
    return send


def wait_for(condition: Callable[[], bool], patience_s: float = 120.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def service(nodes: Any, cluster_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Send]:
    """Two replicas of the application of the configuration file; returns a function that sends requests."""
    pytest.importorskip("ray.serve", reason="ray[serve] is not installed")
    import yaml
    from ray import serve
    from ray.serve.schema import ServeDeploySchema

    from moesr.runtime.cluster.serving import Replica, Settings, app

    config = yaml.safe_load(CONFIG.read_text())
    ServeDeploySchema.model_validate(config)
    (given,) = config["applications"]
    assert given["import_path"] == "moesr.runtime.cluster.serving:app"
    (deployment,) = given["deployments"]
    assert deployment["name"] == "replica" and deployment["autoscaling_config"]["target_ongoing_requests"]
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    args = given["args"] | {
        "state": str(tmp_path_factory.mktemp("state")),
        "engines": [f"tiny={cluster_engine}"],
        "upscaler": {"backend": "onnxruntime", "threads": 1},
    }
    assert isinstance(app(args), serve.Application)
    two = Replica.options(num_replicas=2, ray_actor_options={"num_cpus": 0.5})
    serve.run(two.bind(Settings.of(args)), route_prefix="/")

    yield sender(port)
    serve.shutdown()


@pytest.mark.slow
def test_one_request_of_each_kind(service, tmp_path):
    image = picture(tmp_path / "a.png").read_bytes()
    status, headers, body = service("/v1/upscale?steps=2", image)
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(body)).size == (48, 36)

    status, headers, body = service("/v1/jobs?steps=3", image)
    job = json.loads(body)
    assert status == 202 and headers["Location"] == f"/v1/jobs/{job['id']}"
    events = service(f"/v1/jobs/{job['id']}/events")[2].decode()
    assert "event: done" in events
    assert json.loads(service(f"/v1/jobs/{job['id']}")[2])["status"] == "done"
    result = np.asarray(Image.open(io.BytesIO(service(f"/v1/jobs/{job['id']}/result")[2])))
    assert result.shape == (36, 48, 3)
    assert service(f"/v1/jobs/{job['id']}", method="DELETE")[0] == 204
    assert service(f"/v1/jobs/{job['id']}")[0] == 404

    assert [engine["name"] for engine in json.loads(service("/v1/engines")[2])] == ["tiny"]
    for path in ("/healthz", "/readyz", "/metrics", "/", "/static/page.js", "/v1/openapi.json"):
        assert service(path)[0] == 200, path
    status, headers, body = service("/v1/upscale", b"no image")
    assert status == 415 and headers["Content-Type"].startswith("application/problem+json")


@pytest.mark.slow
def test_a_job_of_another_replica(service, tmp_path):
    """With two replicas, about half of the requests come to the one that does not have the job."""
    image = picture(tmp_path / "a.png").read_bytes()
    jobs = [json.loads(service("/v1/jobs?steps=2", image)[2])["id"] for _ in range(4)]
    for job in jobs:
        wait_for(lambda job=job: json.loads(service(f"/v1/jobs/{job}")[2])["status"] == "done")
        assert {service(f"/v1/jobs/{job}/result")[0] for _ in range(6)} == {200}
