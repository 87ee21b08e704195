"""The routes: results equal those of the Upscaler, jobs, limits, tokens, and problems for wrong requests."""

from __future__ import annotations

import io
import json
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from pictures import picture, pixels_of
from PIL import Image

from moesr.runtime.images import provenance
from moesr.runtime.serve.problems import without_paths

PROBLEM = "application/problem+json"


def wait_for(client, job: dict) -> dict:
    limit = time.monotonic() + 60
    while (state := client.get(f"/v1/jobs/{job['id']}").json())["status"] not in ("done", "failed"):
        assert time.monotonic() < limit, state
        time.sleep(0.02)
    return state


def test_result_equals_the_upscaler(serve, tiny_upscaler):
    data = picture()
    want = tiny_upscaler(Image.open(io.BytesIO(data)), steps=3, seed=7, color_fix="none")
    with serve() as client:
        raw = client.post("/v1/upscale?steps=3&seed=7&color_fix=none", content=data)
        fields = {"steps": "3", "seed": "7", "color-fix": "none"}
        form = client.post("/v1/upscale", data=fields, files={"image": ("a.png", data)})
    for answer in (raw, form):
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        np.testing.assert_array_equal(pixels_of(answer.content), np.asarray(want))


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [
        ("image/webp", "", "WEBP"),
        ("text/html, image/jpeg;q=0.8", "", "JPEG"),
        ("*/*", "", "PNG"),
        ("image/webp", "&format=tiff", "TIFF"),
    ],
)
def test_requested_format(serve, accept, query, kind):
    with serve() as client:
        answer = client.post(f"/v1/upscale?steps=1{query}", content=picture(), headers={"Accept": accept})
    assert Image.open(io.BytesIO(answer.content)).format == kind


def test_results_carry_the_record(serve, tmp_path):
    with serve() as client:
        (tmp_path / "a.png").write_bytes(client.post("/v1/upscale?steps=2", content=picture()).content)
    record = provenance.read(tmp_path / "a.png")
    assert record and record.settings["steps"] == 2 and len(record.digest) == 64


def test_life_of_a_job(serve, tiny_upscaler):
    data = picture(40, 30)
    with serve() as client:
        answer = client.post("/v1/jobs?steps=4&seed=1", content=data)
        assert answer.status_code == 202
        job = answer.json()
        assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
        early = client.get(f"/v1/jobs/{job['id']}/result")
        assert early.status_code in (200, 409)
        state = wait_for(client, job)
        assert state["status"] == "done" and (state["width"], state["height"]) == (30, 40)
        result = client.get(f"/v1/jobs/{job['id']}/result")
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
        for path in ("", "/result", "/events"):
            assert client.get(f"/v1/jobs/{job['id']}{path}").status_code == 404
    want = tiny_upscaler(Image.open(io.BytesIO(data)), steps=4, seed=1)
    np.testing.assert_array_equal(pixels_of(result.content), np.asarray(want))


def test_events_end_with_the_job(serve):
    with serve() as client:
        job = client.post("/v1/jobs?steps=60", content=picture(100, 100)).json()
        with client.stream("GET", f"/v1/jobs/{job['id']}/events") as stream:
            lines = [line for line in stream.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    states = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert names[-1] == "done" and states[-1]["fraction"] == 1.0
    fractions = [state["fraction"] for state in states]
    assert fractions == sorted(fractions)


def test_canceled_job_frees_its_place_in_the_queue(serve):
    with serve(queue=1) as client:
        job = client.post("/v1/jobs?steps=1000", content=picture(200, 200)).json()
        refused = client.post("/v1/jobs", content=picture())
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) >= 1
        assert client.post("/v1/upscale", content=picture()).status_code == 503
        assert client.delete(f"/v1/jobs/{job['id']}").status_code == 204
        assert client.post("/v1/upscale?steps=1", content=picture()).status_code == 200
        text = client.get("/metrics").text
    assert "moesr_cancelled_total 1.0" in text and "moesr_rejected_total 2.0" in text
    assert "moesr_queue 0.0" in text and "moesr_ticks_total" in text


def test_simultaneous_requests_do_not_exceed_the_queue(serve, monkeypatch):
    with serve(queue=1) as client:
        accept = client.service.store.accept
        monkeypatch.setattr(client.service.store, "accept", lambda *a: (time.sleep(0.5), accept(*a))[1])
        with ThreadPoolExecutor(4) as pool:
            sent = [pool.submit(client.post, "/v1/jobs?steps=1", content=picture()) for _ in range(4)]
        statuses = sorted(one.result().status_code for one in sent)
        assert statuses == [202, 503, 503, 503]


def test_results_expire(serve):
    with serve(keep_s=0.2) as client:
        job = client.post("/v1/jobs?steps=1", content=picture()).json()
        limit = time.monotonic() + 30
        while client.get(f"/v1/jobs/{job['id']}").status_code != 404:
            assert time.monotonic() < limit
            time.sleep(0.1)


def bomb() -> bytes:
    """Return a small PNG that declares 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    header = (100_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    data = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


WRONG = {
    "empty": (b"", "", 400),
    "text": (b"hello, world", "", 415),
    "html": (b"<html></html>", "", 415),
    "truncated": (picture()[:-200], "", 422),
    "header only": (picture()[:30], "", 415),
    "bomb": (bomb(), "", 413),
    "too many pixels": (picture(101, 100), "", 413),
    "too many bytes": (b"\x89PNG" + bytes(300_000), "", 413),
    "unknown option": (picture(), "?stepz=3", 400),
    "not a number": (picture(), "?steps=many", 400),
    "infinite": (picture(), "?fidelity=inf", 400),
    "not finite": (picture(), "?fidelity=nan", 400),
    "digits": (picture(), "?seed=" + "9" * 400, 400),
    "out of range": (picture(), "?steps=100000", 400),
    "no such sampler": (picture(), "?sampler=../../etc/passwd", 400),
    "no such engine": (picture(), "?engine=../../etc/passwd", 404),
    "no such format": (picture(), "?format=exe", 400),
    "no such priority": (picture(), "?priority=urgent", 400),
    "quality": (picture(), "?quality=0", 400),
}


@pytest.mark.parametrize("route", ["/v1/upscale", "/v1/jobs"])
@pytest.mark.parametrize(("data", "query", "status"), WRONG.values(), ids=WRONG)
def test_wrong_requests_get_a_problem_and_leave_no_files(serve, tmp_path, route, data, query, status):
    with serve(upload_bytes=200_000, input_px=10_000) as client:
        answer = client.post(route + query, content=data)
        if answer.status_code == 202:  # the damage is found only by decoding
            state = wait_for(client, answer.json())
            assert state["status"] == "failed" and state["problem"]["status"] == status
            return
        assert client.service.in_queue == 0
    assert answer.status_code == status and answer.headers["content-type"] == PROBLEM
    body = answer.json()
    assert body["status"] == status and body["detail"] and str(tmp_path) not in answer.text
    assert "Traceback" not in answer.text and "incoming" not in answer.text
    assert not [p for kind in ("incoming", "jobs") for p in (tmp_path / "state" / kind).iterdir()]


@pytest.mark.parametrize(
    "content",
    [b"--x\r\nbroken", b"", b"--x\r\nContent-Disposition: form-data; name=steps\r\n\r\n3\r\n--x--\r\n"],
    ids=["broken", "empty", "no file"],
)
def test_damaged_forms(serve, content):
    with serve() as client:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = client.post("/v1/upscale", content=content, headers=headers)
    assert answer.status_code == 400 and answer.headers["content-type"] == PROBLEM


def test_upload_limit_counts_the_received_bytes(serve):
    """Content-Length is the client's claim, and the bytes of a form are counted as well."""
    with serve(upload_bytes=1000) as client:
        form = client.post("/v1/upscale", files={"image": ("a.png", bytes(5000))})

        def chunks():
            for _ in range(10):
                yield bytes(500)

        chunked = client.post("/v1/upscale", content=chunks())
    assert form.status_code == chunked.status_code == 413


@pytest.mark.parametrize(
    "path", ["/v1/jobs/..%2f..%2fetc%2fpasswd", "/v1/jobs/" + "a" * 31, "/v1/jobs/x/result"]
)
def test_no_path_reaches_the_file_system(serve, path):
    with serve() as client:
        assert client.get(path).status_code == 404


def test_token_is_required_if_one_is_set(serve):
    with serve(token="secret") as client:
        for path in ("/healthz", "/readyz", "/", "/static/page.js"):
            assert client.get(path).status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
            refused = client.get("/v1/engines", headers=headers)
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert client.get("/metrics", headers=headers).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert client.get("/v1/engines", headers=right).json()[0]["name"] == "tiny"


def test_all_responses_have_a_strict_policy(serve):
    with serve() as client:
        for path in ("/", "/static/page.js", "/v1/engines", "/nothing"):
            headers = client.get(path).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"


def test_large_headers_and_addresses_are_refused_even_in_one_packet(serve):
    with serve() as client:
        assert client.get("/healthz", headers={"X": "a" * 20_000}).status_code == 431
        assert client.get("/healthz?" + "a" * 20_000).status_code == 431


def test_a_job_shows_its_image_while_it_is_sampled(serve):
    with serve() as client:
        job = client.post("/v1/jobs?steps=1000", content=picture(20, 30)).json()
        address, limit = f"/v1/jobs/{job['id']}/preview", time.monotonic() + 60
        while (answer := client.get(address)).status_code == 204:
            assert time.monotonic() < limit and not answer.content
            time.sleep(0.01)
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"
        shown = Image.open(io.BytesIO(answer.content))
        assert (shown.format, shown.mode, shown.size) == ("JPEG", "RGB", (30, 20))
        client.delete(f"/v1/jobs/{job['id']}")
        assert client.get(address).status_code == 404
        done = client.post("/v1/jobs?steps=1", content=picture()).json()
        wait_for(client, done)
        assert client.get(f"/v1/jobs/{done['id']}/preview").status_code == 204
        assert "/v1/jobs/{job_id}/preview" in client.get("/v1/openapi.json").json()["paths"]


def test_openapi_describes_the_options(serve):
    with serve() as client:
        described = client.get("/v1/openapi.json").json()
    post = described["paths"]["/v1/upscale"]["post"]
    assert {"steps", "engine", "format", "priority"} <= {p["name"] for p in post["parameters"]}
    assert all("example" in p for p in post["parameters"])
    assert "multipart/form-data" in post["requestBody"]["content"]


def test_messages_name_no_files_of_the_server():
    assert without_paths("/tmp/x/incoming/ab/input: is damaged") == "the image: is damaged"
