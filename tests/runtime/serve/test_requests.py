"""Details of requests and answers: formats, methods, headers, events, metrics, and a disk that fails."""

from __future__ import annotations

import errno
import io
import json

import pytest
from pictures import picture
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from moesr.runtime.errors import OutputError
from moesr.runtime.images.jxl_header import jxl_size
from moesr.runtime.loop.settings import OPTION_NAMES
from moesr.runtime.serve.problems import Problem
from moesr.runtime.serve.result_format import choose
from moesr.runtime.serve.store import Store

PROBLEM = "application/problem+json"

ACCEPTED = {
    "": "png",
    "*/*": "png",
    "image/*": "png",
    "image/webp": "webp",
    "IMAGE/WEBP": "webp",
    "image/webp;q=0.1, image/png;q=0.9": "png",
    "image/webp;q=0.1, image/jpeg;q=0.5": "jpeg",
    "image/png;q=0, */*": "jpeg",
    "image/*;q=0.5, image/tiff": "tiff",
    "image/jpeg, image/webp": "jpeg",
    "image/avif,image/webp,image/apng,*/*;q=0.8": "webp",
    "text/html, */*;q=0.1": "png",
    "image/webp;quality=0, image/tiff;q=0.2": "webp",
    "image/webp;q=x, image/tiff;q=0.2": "tiff",
    "image/webp; q=0.3; x=y, image/tiff;level=1;q=0.2": "webp",
}


@pytest.mark.parametrize(("accept", "name"), ACCEPTED.items())
def test_the_format_follows_the_weights(accept, name):
    assert choose(None, accept) == name


@pytest.mark.parametrize("accept", ["text/html", "image/bmp", "*/*;q=0", "image/png;q=0", "application/json"])
def test_nothing_that_is_acceptable(accept):
    with pytest.raises(Problem) as caught:
        choose(None, accept)
    assert caught.value.status == 406
    assert choose("webp", accept) == "webp", "the option wins"


def test_a_client_of_jobs_that_accepts_json_gets_a_png():
    assert choose(None, "application/json", described=True) == "png"


def test_methods(serve):
    with serve() as client:
        head = client.head("/v1/engines")
        assert head.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == client.get("/v1/engines").headers["content-length"]
        assert client.head("/").status_code == 200
        refused = client.put("/v1/upscale")
        assert refused.status_code == 405 and refused.headers["content-type"] == PROBLEM
        assert refused.headers["allow"] == "OPTIONS, POST"
        allowed = client.options("/v1/jobs/" + "0" * 32)
        assert allowed.status_code == 204 and allowed.headers["allow"] == "DELETE, GET, HEAD, OPTIONS"
        assert client.request("BREW", "/v1/jobs").status_code == 405
        assert client.get("/v1/jobs/", follow_redirects=False).status_code == 404
        text = client.get("/metrics").text
    assert 'method="HEAD"' in text and "BREW" not in text


def test_ranges_are_not_served(serve):
    with serve() as client:
        answer = client.get("/static/page.js", headers={"Range": "bytes=0-1,1-2"})
    assert answer.status_code == 200 and answer.headers["accept-ranges"] == "none"


def test_pages_of_other_sites_are_refused(serve):
    with serve() as client:
        sites = ("cross-site", "same-site", "same-origin", "none")
        statuses = [
            client.post(
                "/v1/upscale?steps=1", content=picture(), headers={"Sec-Fetch-Site": site}
            ).status_code
            for site in sites
        ]
    assert statuses == [403, 403, 200, 200]


def test_a_token_beyond_ascii(serve):
    with serve(token="schlüssel") as client:
        for given, status in (("schlüssel", 200), ("schl", 401), ("schlüssel2", 401)):
            headers = {b"Authorization": f"Bearer {given}".encode()}
            assert client.get("/v1/engines", headers=headers).status_code == status


def test_events_can_be_taken_up_again(serve):
    with serve() as client:
        job = client.post("/v1/jobs?steps=2", content=picture()).json()
        path = f"/v1/jobs/{job['id']}/events"
        lines = client.get(path, headers={"Last-Event-ID": "41"}).text.splitlines()
        names = [line.removeprefix("id: ") for line in lines if line.startswith("id: ")]
        assert names[-1] == "end" and names[0] in ("42", "end")
        assert client.get(path, headers={"Last-Event-ID": "end"}).status_code == 204
        assert client.get(path, headers={"Last-Event-ID": "../x"}).text.splitlines()
        head = client.head(path)
        assert head.status_code == 200 and head.headers["content-type"].startswith("text/event-stream")


def test_small_images_do_not_wait_for_places_of_large_ones(serve, monkeypatch):
    monkeypatch.setattr("moesr.runtime.serve.service.DECODED", 1)
    monkeypatch.setattr("moesr.runtime.serve.service.SMALL_PX", 1000)
    with serve() as client:
        large = [client.post("/v1/jobs?steps=1000", content=picture(200, 200)).json()["id"] for _ in range(2)]
        assert client.post("/v1/upscale?steps=1", content=picture()).status_code == 200
        states = [client.get(f"/v1/jobs/{one}").json() for one in large]
        assert states[1]["stage"] == "queued" and states[1]["position"] == 1
        for one in large:
            client.delete(f"/v1/jobs/{one}")


def test_an_image_that_takes_too_long_is_canceled(serve):
    with serve(request_s=0.3) as client:
        answer = client.post("/v1/upscale?steps=1000", content=picture(300, 300))
        assert answer.status_code == 504 and "/v1/jobs" in answer.json()["detail"]
        assert client.service.in_queue == 0
        assert "moesr_cancelled_total 1.0" in client.get("/metrics").text


def declared(kind: str) -> bytes:
    """Return a small image whose header declares about 65,000 x 65,000 pixels."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, kind)
    data = bytearray(out.getvalue())
    if kind == "GIF":
        data[6:10] = b"\xff\xff\xff\xff"
    elif kind == "BMP":
        data[18:26] = (65_000).to_bytes(4, "little") * 2
    elif kind == "JPEG":
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = b"\xff\xdc\xff\xdc"
    elif kind == "TIFF":
        for tag in (256, 257):  # width and length of the image
            entry = data.index(tag.to_bytes(2, "little") + b"\x04\x00\x01\x00\x00\x00")
            data[entry + 8 : entry + 12] = (65_000).to_bytes(4, "little")
    return bytes(data)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "JPEG", "TIFF"])
def test_declared_sizes_are_checked_before_pixels_are_decoded(serve, kind):
    with serve() as client:
        answer = client.post("/v1/jobs", content=declared(kind))
    assert answer.status_code == 413, answer.text


@pytest.mark.parametrize("size", [(8, 8), (1, 1), (70, 35), (300, 17), (64, 64), (512, 96), (600, 9000)])
def test_the_size_of_a_jpeg_xl_is_read_without_decoding_it(tmp_path, size):
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    for exif in (None, b"Exif\0\0MM\0*\0\0\0\x08\0\0"):  # with metadata it is a file of boxes
        Image.new("L", size).save(tmp_path / "a.jxl", **({"exif": exif} if exif else {}))
        with (tmp_path / "a.jxl").open("rb") as stream:
            assert jxl_size(stream) == size
    assert jxl_size(io.BytesIO(b"\x89PNG and more bytes")) is None


def test_a_large_jpeg_xl_is_refused_by_its_header(serve):
    pytest.importorskip("pillow_jxl", reason="pillow-jxl-plugin is not installed")
    header = b"\xff\x0a" + (0b11 << 1 | (2**30 - 1) << 3 | 1 << 33).to_bytes(8, "little")
    boxes = b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0\0\0\0jxlc" + header
    with serve() as client:
        assert client.post("/v1/jobs", content=header + bytes(40)).status_code == 413
        assert client.post("/v1/jobs", content=boxes + bytes(40)).status_code == 413
        assert client.post("/v1/jobs", content=boxes[:12] + bytes(40)).status_code == 422


def test_a_png_with_a_long_text_is_read(serve):
    out, text = io.BytesIO(), PngInfo()
    text.add_text("comment", "a" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=text)
    with serve() as client:
        assert client.post("/v1/upscale?steps=1", content=out.getvalue()).status_code == 200


def test_only_the_first_frame_of_an_animation_is_decoded(serve):
    out = io.BytesIO()
    frames = [Image.new("P", (64, 64), k % 256) for k in range(2000)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    with serve() as client:
        answer = client.post("/v1/upscale?steps=1", content=out.getvalue())
    assert Image.open(io.BytesIO(answer.content)).size == (256, 256)


def test_jobs_that_are_not_there(serve):
    with serve() as client:
        job = client.post("/v1/jobs?steps=1", content=picture()).json()
        path = f"/v1/jobs/{job['id']}"
        assert [client.delete(path).status_code for _ in range(2)] == [204, 404]
        assert client.delete("/v1/jobs/" + "0" * 32).status_code == 404
        assert client.delete("/v1/jobs/..%2f..%2fetc").status_code == 404


def test_what_is_asked_of_ended_jobs_reads_no_disk(serve):
    with serve() as client:
        job = client.post("/v1/jobs?steps=1", content=picture()).json()
        path = f"/v1/jobs/{job['id']}"
        while client.get(path).json()["status"] != "done":
            pass
        kept = client.service.store.jobs[job["id"]]
        assert not kept.input.exists(), "it is not needed any more"
        kept.result.unlink()
        assert client.get(path).json()["status"] == "done"
        assert client.get(path + "/result").status_code == 404


def test_all_uploads_together_are_bounded(serve):
    with serve(uploads_bytes=1000) as client:
        refused = client.post("/v1/upscale", content=bytes(5000))
        assert refused.status_code == 503 and refused.headers["retry-after"] == "5"
        form = client.post("/v1/jobs", files={"image": ("a.png", bytes(5000))})
        assert form.status_code == 503
        assert client.service.arrivals.bytes == 0
        assert client.post("/v1/upscale?steps=1", content=picture(8, 8)).status_code == 200
        assert "moesr_rejected_total 2.0" in client.get("/metrics").text


def test_every_metric_moves(serve):
    with serve() as client:
        client.post("/v1/upscale?steps=3", content=picture())
        job = client.post("/v1/jobs?steps=1000", content=picture(200, 200)).json()
        while client.get(f"/v1/jobs/{job['id']}").json()["status"] != "running":
            pass
        during = client.get("/metrics").text
        client.delete(f"/v1/jobs/{job['id']}")
        failed = client.post("/v1/jobs", content=picture()[:-200]).json()
        while client.get(f"/v1/jobs/{failed['id']}").json()["status"] != "failed":
            pass
        text = client.get("/metrics").text
    assert "moesr_queue 1.0" in during and 'moesr_jobs_by_stage{stage="' in during
    assert 'moesr_active{engine="tiny"} 1.0' in during
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    stages = ("receiving", "queued", "reading", "waiting", "preparing", "running", "sampling", "decoding")
    for stage in (*stages, "finishing", "writing"):
        assert float(values[f'moesr_stage_seconds_count{{engine="tiny",stage="{stage}"}}']) >= 1, stage
    assert float(values['moesr_stage_seconds_sum{engine="tiny",stage="sampling"}']) > 0
    moved = ["ticks_total", "slots_total", "slots_limit", "image_seconds_count", "image_seconds_sum"]
    assert all(float(values[f'moesr_{name}{{engine="tiny"}}']) > 0 for name in moved)
    assert float(values["moesr_resident_bytes"]) > 1e6 and float(values["moesr_queue_limit"]) == 32
    assert values["moesr_cancelled_total"] == values["moesr_failed_total"] == "1.0"


@pytest.mark.parametrize("step", ["incoming", "accept"])
def test_a_full_disk_is_said_and_leaves_nothing(serve, tmp_path, monkeypatch, step):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with serve() as client:
        monkeypatch.setattr(client.service.store, step, full)
        answer = client.post("/v1/jobs", content=picture())
        assert client.service.in_queue == 0 and not client.service.store.jobs
    assert answer.status_code == 507 and answer.headers["content-type"] == PROBLEM
    assert not [p for kind in ("incoming", "jobs") for p in (tmp_path / "state" / kind).iterdir()]


def test_a_result_that_cannot_be_stored_fails_the_job(serve, monkeypatch, caplog):
    def full(*_: object) -> None:
        raise OutputError("/state/x: No space left on device")

    monkeypatch.setattr("moesr.runtime.images.writing.save", full)
    with serve() as client:
        assert client.post("/v1/upscale?steps=1", content=picture()).status_code == 507
        assert "No space left" in caplog.text, "the answer refers to the log"
        job = client.post("/v1/jobs?steps=1", content=picture()).json()
        while (state := client.get(f"/v1/jobs/{job['id']}").json())["status"] != "failed":
            pass
    assert state["problem"]["status"] == 507 and "/state" not in json.dumps(state)


def test_one_process_per_directory(tmp_path):
    first = Store(tmp_path)
    with pytest.raises(OutputError, match="another moesr-serve"):
        Store(tmp_path)
    first.close()
    Store(tmp_path).close()


def test_a_jpeg_of_many_scans_is_refused(serve):
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG", progressive=True)
    data = out.getvalue()
    scan = data[data.rindex(b"\xff\xda") : data.rindex(b"\xff\xd9")]
    with serve() as client:
        assert client.post("/v1/upscale?steps=1", content=data).status_code == 200
        answer = client.post("/v1/upscale", content=data[:-2] + scan * 500 + data[-2:])
    assert answer.status_code == 422 and "scans" in answer.json()["detail"]


WRONG = {
    "underscores": ("seed=1_000", 400),
    "other digits": ("steps=\uff13", 400),
    "real number of steps": ("steps=3.0", 400),
    "exponent": ("fidelity=1e999", 400),
    "hexadecimal": ("steps=0x10", 400),
    "huge seed": ("seed=99999999999999999999", 400),
    "no flag": ("keep_colors_under_alpha=maybe", 400),
    "zero byte": ("engine=tiny%00", 404),
    "priority of another type": ("priority=4", 400),
    "latents that would stay on the disk": ("checkpoint_every=1", 400),
    "header in a value": ("format=png%0d%0aX:1", 400),
}


@pytest.mark.parametrize(("query", "status"), WRONG.values(), ids=WRONG)
def test_values_of_another_form(serve, query, status):
    with serve() as client:
        answer = client.post(f"/v1/jobs?{query}", content=picture())
    assert answer.status_code == status and answer.headers["content-type"] == PROBLEM


def test_every_option_of_the_command_line_is_described_and_read(serve):
    given = {"steps": "2", "seed": "0", "reuse": "1", "fidelity": "1", "guidance": "1", "sampler": "ddim"}
    given |= {"color_fix": "none", "keep_colors_under_alpha": "true"}
    given |= {"start_step": "0", "tiling": "overlap", "tileable": "false"}
    assert set(given) == set(OPTION_NAMES) - {"checkpoint_every"}
    with serve() as client:
        described = client.get("/v1/openapi.json").json()["paths"]["/v1/jobs"]["post"]["parameters"]
        assert set(given) <= {one["name"] for one in described}
        job = client.post("/v1/jobs", params=given, content=picture())
        assert job.status_code == 202 and job.json()["options"]["keep_colors_under_alpha"] is True
        assert client.get("/v1/engines").json()[0]["takes_fidelity"] in (True, False)


def test_a_size_that_the_format_cannot_hold_is_refused_before_the_work(serve):
    with serve() as client:
        answer = client.post("/v1/jobs?format=webp", content=picture(8, 4200))
    assert answer.status_code == 400 and "WEBP can hold" in answer.json()["detail"]


def form(*parts: bytes) -> bytes:
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"


FILE = b'Content-Disposition: form-data; name="image"; filename="../../etc/passwd"\r\n\r\n' + picture()
FIELD = b'Content-Disposition: form-data; name="%s"\r\n\r\n%s'
FORMS = {
    "a name that is a path": (form(FILE, FIELD % (b"steps", b"1")), 200),
    "two files": (form(FILE, FILE), 400),
    "a huge field": (form(FIELD % (b"steps", b"1" * 100_000), FILE), 400),
    "many fields": (form(*[FIELD % (b"steps", b"1")] * 50, FILE), 400),
    "a huge header": (form(b"X: " + b"a" * 100_000 + b"\r\n" + FILE), 400),
    "many headers": (form(b"X: a\r\n" * 1000 + FILE), 400),
    "no name": (form(b"Content-Disposition: form-data\r\n\r\nabc"), 400),
    "an unknown field": (form(FIELD % (b"stepz", b"1"), FILE), 400),
    "a field named image": (form(FIELD % (b"image", b"abc")), 400),
    "no end": (form(FILE)[:-8], 400),
}


@pytest.mark.parametrize(("content", "status"), FORMS.values(), ids=FORMS)
def test_forms(serve, content, status):
    with serve() as client:
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = client.post("/v1/upscale", content=content, headers=headers)
    assert answer.status_code == status, answer.text
