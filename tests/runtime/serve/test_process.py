"""`moesr-serve` as a process: kills, orderly shutdown, and slow or hostile connections."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time

import numpy as np
import pytest
from pictures import picture, pixels_of
from PIL import Image

from moesr.runtime.serve import cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


def finished(client, names: list[str]) -> list[dict]:
    limit = time.monotonic() + 120
    while True:
        states = [client.get(f"/v1/jobs/{name}").json() for name in names]
        if all(state["status"] in ("done", "failed") for state in states):
            return states
        assert time.monotonic() < limit, states
        time.sleep(0.05)


def test_accepted_jobs_survive_a_kill_and_run_once(process, tiny_upscaler):
    first = process()
    data = [picture(100, 100, seed=k) for k in range(3)]
    names = [first.client.post("/v1/jobs?steps=60", content=one).json()["id"] for one in data]
    finished(first.client, names[:1])
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    second = process()
    assert all(state["status"] == "done" for state in finished(second.client, names))
    assert f"job {names[0]} continues" not in second.text(), "finished jobs are not repeated"
    for one, name in zip(data, names, strict=True):
        result = second.client.get(f"/v1/jobs/{name}/result").content
        want = tiny_upscaler(Image.fromarray(pixels_of(one)), steps=60)
        np.testing.assert_array_equal(pixels_of(result), np.asarray(want))


def test_sigterm_finishes_running_jobs_and_keeps_the_others(process):
    first = process("--grace", "60", "--log-format", "json")
    names = [
        first.client.post("/v1/jobs?steps=40", content=picture(100, 100, seed=k)).json()["id"]
        for k in range(12)
    ]
    assert first.stop(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in first.text().splitlines()]
    assert sum(line.get("status") == 202 for line in lines) == 12
    second = process()
    continued = second.text().count("continues")
    assert 0 < continued < 12, "some jobs are finished and some are kept"
    assert all(state["status"] == "done" for state in finished(second.client, names))


def test_disconnected_client_cancels_its_image(process):
    server = process()
    with socket.create_connection(server.address) as connection:
        data = picture(300, 300)
        head = f"POST /v1/upscale?steps=1000 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        metric(server, "moesr_queue", 1.0)
    metric(server, "moesr_queue", 0.0)
    metric(server, "moesr_cancelled_total", 1.0)


def metric(server, name: str, value: float) -> None:
    """Wait until a metric has a value."""
    limit = time.monotonic() + 60
    while f"{name} {value}" not in (text := server.client.get("/metrics").text):
        assert time.monotonic() < limit, text
        time.sleep(0.05)


def test_slow_and_silent_connections_are_closed(process):
    server = process("--idle", "1")
    silent = [socket.create_connection(server.address) for _ in range(200)]
    slow = socket.create_connection(server.address)
    slow.sendall(b"POST /v1/upscale HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
    assert server.client.post("/v1/upscale?steps=1", content=picture()).status_code == 200
    for connection in silent:
        connection.settimeout(30)
        assert connection.recv(100) == b""
        connection.close()
    begin = time.monotonic()
    slow.settimeout(30)
    assert b" 408 " in slow.recv(1000) and time.monotonic() - begin < 30
    slow.close()


def test_sigterm_ends_uploads_at_once(process):
    server = process("--grace", "60", "--idle", "60")
    with socket.create_connection(server.address) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nabc")
        metric(server, "moesr_uploads_bytes", 3.0)
        begin = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - begin < 30
        assert b" 503 " in connection.recv(1000)


def test_what_outlasts_the_grace_goes_on_at_the_next_start(process):
    first = process("--grace", "0.5")
    name = first.client.post("/v1/jobs?steps=1000", content=picture(60, 60)).json()["id"]
    with (
        socket.create_connection(first.address) as connection,
        socket.create_connection(first.address) as events,
    ):
        events.sendall(f"GET /v1/jobs/{name}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert b" 200 " in events.recv(1000)
        data = picture(300, 300)
        head = f"POST /v1/upscale?steps=1000 HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        metric(first, "moesr_queue", 2.0)
        begin = time.monotonic()
        assert first.stop(signal.SIGTERM) == 0
        assert time.monotonic() - begin < 30
        assert b" 503 " in connection.recv(1000)
    second = process()
    assert f"job {name} continues" in second.text()
    assert finished(second.client, [name])[0]["status"] == "done"


def test_a_job_of_an_engine_that_is_gone_fails_with_words(process, tiny_engine):
    first = process("--grace", "0")
    name = first.client.post("/v1/jobs?steps=1000", content=picture(300, 300)).json()["id"]
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    second = process("--engine", f"other={tiny_engine}")
    (state,) = finished(second.client, [name])
    assert state["status"] == "failed" and "not served any more" in state["problem"]["detail"]
    assert second.client.get(f"/v1/jobs/{name}/result").status_code == 404
    assert second.client.delete(f"/v1/jobs/{name}").status_code == 204


@pytest.mark.parametrize(("content", "message"), [("", "is empty"), ("a b", "more than one word")])
def test_files_that_hold_no_token(content, message, tmp_path, capsys):
    (tmp_path / "token").write_text(content)
    assert cli.main(["--state", str(tmp_path / "state"), "--token-file", str(tmp_path / "token")]) == 2
    assert message in capsys.readouterr().err


def test_a_directory_of_jobs_that_another_server_uses(process, tiny_engine, tmp_path, capsys):
    process()
    options = ["--state", str(tmp_path / "state"), "--engine", str(tiny_engine), "--port", "0"]
    assert cli.main(options) == 1
    assert "is used by another moesr-serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--queue", "0"], 2, "--queue is 0"),
        (["--max-upload", "nan"], 2, "--max-upload is nan"),
        (["--max-uploads", "inf"], 2, "--max-uploads is inf"),
        (["--grace", "-1"], 2, "--grace is -1"),
        (["--port", "99999"], 2, "--port is 99999"),
        (["--engine", "a=demo-x4", "a=demo-x8"], 2, "two engines are called 'a'"),
        (["--token-file", "/nonexistent"], 2, "cannot be read as a token"),
        (["--engine", "/nonexistent"], 3, "no such engine directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_give_one_line(options, code, message, tmp_path, capsys):
    assert cli.main(["--state", str(tmp_path), *options]) == code
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_address_in_use(process, tiny_engine, tmp_path, capsys):
    _, port = process().address
    assert (
        cli.main(["--state", str(tmp_path / "other"), "--engine", str(tiny_engine), "--port", str(port)]) == 1
    )
    assert "cannot listen on 127.0.0.1" in capsys.readouterr().err
