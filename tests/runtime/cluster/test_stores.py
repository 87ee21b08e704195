"""Stores of Google and Microsoft, reached through the same URLs as in a run, on servers of this machine.

rclone's S3 server also understands the requests to Google's store, whose XML interface is that of S3. The
emulator of Azure, `azurite-blob` of the npm package azurite, has to be on PATH.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest
from benchlib.local_store import free_port, s3_server
from cluster_fixtures import need_store
from cluster_rig import picture

from moesr.runtime.cluster import places
from moesr.runtime.cluster.places import RETRIES, Bucket, place_of
from moesr.runtime.errors import InputError

obstore = pytest.importorskip("obstore", reason="obstore is not installed")

EMULATOR = "devstoreaccount1"
EMULATOR_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account and key that every emulator of Azure has, as Microsoft documents them."""


@pytest.fixture(autouse=True)
def no_open_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_stores", {})


@pytest.mark.parametrize(
    ("url", "kind"), [("s3://b/p/q", "S3Store"), ("gs://b/p/q", "GCSStore"), ("az://b/p/q", "AzureStore")]
)
def test_store_of_a_url(url, kind, monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "name")
    store = Bucket(url)._store
    assert type(store).__name__ == kind and store.prefix == "p/q" and "b" in store.config.values()
    assert {name: store.retry_config[name] for name in ("max_retries", "retry_timeout")} == {
        name: RETRIES[name] for name in ("max_retries", "retry_timeout")
    }


@pytest.fixture
def google(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of a bucket of Google's store."""
    need_store()
    (tmp_path / "store/bucket").mkdir(parents=True)
    with s3_server(tmp_path / "store", anonymous=True) as address:
        account = {"gcs_base_url": address, "disable_oauth": True}
        empty = dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account | empty))
        yield "gs://bucket"


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of a container of the emulator of Azure."""
    program = shutil.which("azurite-blob")
    if not program:
        pytest.skip("azurite-blob is not on PATH")
    port = free_port()
    command = [program, "--blobPort", str(port), "--location", str(tmp_path), "--skipApiVersionCheck"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        endpoint = f"http://127.0.0.1:{port}/{EMULATOR}"
        create_container(endpoint, "container")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", EMULATOR)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", EMULATOR_KEY)
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", endpoint)
        monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
        yield "az://container"
    finally:
        server.terminate()
        server.wait()


def create_container(endpoint: str, name: str, patience_s: float = 60.0) -> None:
    """Create a container with a signed request, once the server answers."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "".join(f"{key}:{value}\n" for key, value in sorted(headers.items()))
    text = f"PUT{chr(10) * 12}{signed}/{EMULATOR}/{EMULATOR}/{name}\nrestype:container"
    digest = hmac.digest(base64.b64decode(EMULATOR_KEY), text.encode(), hashlib.sha256)
    headers["Authorization"] = f"SharedKey {EMULATOR}:{base64.b64encode(digest).decode()}"
    request = urllib.request.Request(f"{endpoint}/{name}?restype=container", method="PUT", headers=headers)
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        with contextlib.suppress(ConnectionError, urllib.error.URLError), urllib.request.urlopen(request):
            return
        time.sleep(0.1)
    raise TimeoutError(f"the emulator of Azure does not answer at {endpoint}")


def check_store(url: str, folder: Path) -> None:
    """Check all that a run asks of a store, with keys below a prefix."""
    place, other = place_of(f"{url}/pre/fix"), place_of(url)
    image, large, odd = picture(folder / "a.png"), folder / "large", "b #50% ä+.png"
    large.write_bytes(bytes(12 << 20))  # is sent in parts
    assert list(place.entries(recursive=True)) == [] and place.find("a.png") is None
    for key in (odd, "a.png", "deep/c.png"):
        place.deliver(image, key)
    place.deliver(large, "large")
    assert [key for key, _ in place.entries(recursive=True)] == ["a.png", odd, "deep/c.png", "large"]
    assert [key for key, _ in place.entries(recursive=False)] == ["a.png", odd, "large"]
    assert all(abs(seconds - time.time()) < 600 for _, seconds in place.entries(recursive=True))
    assert next(key for key, _ in other.entries(recursive=True)) == "pre/fix/a.png"

    copies = folder / "copies"
    copies.mkdir()
    path, version = place.fetch("deep/c.png", copies)
    assert path.read_bytes() == image.read_bytes() and place.version("deep/c.png") == version
    assert place.fetch("large", copies)[0].read_bytes() == large.read_bytes()
    found = place.find("a.png")
    assert found and found.record is None and abs(found.seconds - time.time()) < 600
    place.deliver(picture(folder / "new.png"), "deep/c.png")
    assert place.version("deep/c.png") != version
    with pytest.raises(InputError, match=r"/pre/fix/none\.png: cannot be read"):
        place.fetch("none.png", copies)


def test_google(google, tmp_path):
    check_store(google, tmp_path)


@pytest.mark.slow
def test_azure(azure, tmp_path):
    check_store(azure, tmp_path)
