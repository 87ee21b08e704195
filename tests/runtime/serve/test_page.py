"""The page in headless Chromium, in desktop and phone size: drop, slider, download, errors, keyboard."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from pictures import picture, pixels_of
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
SIZES = {"desktop": (1280, 900), "phone": (390, 800)}
SHOTS = os.environ.get("MOESR_SCREENSHOTS")  # a directory for screenshots of all states


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as library:
        made = library.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(params=SIZES)
def page(request, browser) -> Iterator[playwright.Page]:
    width, height = SIZES[request.param]
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=request.param == "phone", accept_downloads=True
    )
    made = context.new_page()
    made.problems = []
    made.on("pageerror", lambda error: made.problems.append(str(error)))
    made.on(
        "console", lambda m: made.problems.append(m.text) if "Content Security Policy" in m.text else None
    )
    made.size = request.param
    yield made
    assert not made.problems
    context.close()


def shot(page: playwright.Page, name: str) -> None:
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{page.size}-{name}.png", full_page=True)


def until(page: playwright.Page, expression: str) -> None:
    """Wait until an expression is true; the page's policy forbids playwright's own function for this."""
    limit = time.monotonic() + 60
    while not page.evaluate(expression):
        assert time.monotonic() < limit, expression
        page.wait_for_timeout(50)


def drop(page: playwright.Page, data: bytes, name: str, kind: str) -> None:
    """Drop a file onto the page."""
    transfer = page.evaluate_handle(
        """([text, name, kind]) => {
            const data = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([data], name, { type: kind }));
            return transfer;
        }""",
        [base64.b64encode(data).decode(), name, kind],
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": transfer})


def test_from_a_dropped_image_to_the_download(page, process, tiny_upscaler, tmp_path):
    server, data = process(), picture(60, 80)
    page.goto(server.url)
    page.wait_for_selector("#engine option", state="attached")
    shot(page, "empty")
    assert page.is_disabled("#start")
    drop(page, data, "holiday.png", "image/png")
    assert "holiday.png" in page.inner_text("#drop-title")
    until(page, "document.getElementById('start').textContent === 'Enlarge to 320 × 240'")
    page.fill("#steps", "40")
    shot(page, "chosen")
    page.click("#start")
    page.wait_for_selector("#progress:not([hidden])")
    shot(page, "progress")
    page.wait_for_selector("#result:not([hidden])", timeout=60_000)
    until(page, "document.getElementById('after').naturalWidth === 320")
    shot(page, "result")
    assert "320 × 240 pixels" in page.inner_text("#facts")

    before = float(page.get_attribute("#handle", "aria-valuenow"))
    page.locator("#handle").scroll_into_view_if_needed()
    box = page.locator("#handle").bounding_box()
    x, y = box["x"] + box["width"] / 2, max(box["y"], 0) + 40
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 80, y, steps=8)
    page.mouse.up()
    moved = float(page.get_attribute("#handle", "aria-valuenow"))
    assert moved < before - 3
    page.focus("#handle")
    page.keyboard.press("End")
    assert page.get_attribute("#handle", "aria-valuenow") == "100"
    page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#handle", "aria-valuenow") == "98"
    page.keyboard.press("+")
    assert page.inner_text("#zoom-value") == "150 %"
    page.keyboard.press("Shift+Tab")
    until(page, "document.activeElement.id === 'compare'")  # by arrow keys it scrolls
    page.click("#zoom-out")
    assert page.inner_text("#zoom-value") == "100 %"

    page.click("#zoom-in")
    page.click("#zoom-fit")
    assert page.inner_text("#zoom-value") == "100 %"
    if page.size == "phone":
        touch(page, "#handle", -60)
        assert 60 < float(page.get_attribute("#handle", "aria-valuenow")) < 98

    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "holiday_x4.png"
    waiting.value.save_as(tmp_path / "got.png")
    want = tiny_upscaler(Image.fromarray(pixels_of(data)), steps=40)
    np.testing.assert_array_equal(pixels_of((tmp_path / "got.png").read_bytes()), np.asarray(want))
    overflow = page.evaluate("document.documentElement.scrollWidth > innerWidth")
    assert not overflow, "the page is wider than the window"


def touch(page: playwright.Page, selector: str, distance: int) -> None:
    """Drag an element sideways by a finger."""
    page.locator(selector).scroll_into_view_if_needed()
    box = page.locator(f"{selector} .knob").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    device = page.context.new_cdp_session(page)

    def send(kind: str, *points: tuple[float, float]) -> None:
        touched = [{"x": one[0], "y": one[1]} for one in points]
        device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touched})

    send("touchStart", (x, y))
    for step in range(1, 6):
        send("touchMove", (x + distance * step / 5, y))
    send("touchEnd")


def test_a_pasted_picture_and_formats_that_a_browser_cannot_show(page, strict_process):
    page.goto(strict_process.url)
    page.wait_for_selector("#engine option", state="attached")
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "teal").save(out, "TIFF")
    page.evaluate(
        """(text) => {
            const data = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([data], "scan.tif", { type: "image/tiff" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer }));
        }""",
        base64.b64encode(out.getvalue()).decode(),
    )
    until(page, "document.getElementById('drop-title').textContent === 'scan.tif'")
    page.fill("#steps", "1")
    page.click("#start")
    page.wait_for_selector("#unseen:not([hidden])")
    assert page.is_visible("#after") and page.is_hidden("#handle")
    page.select_option("#format", "tiff")
    page.click("#start")
    until(page, "document.getElementById('facts').textContent.includes('64 × 64')")
    until(page, "document.getElementById('unseen').textContent.includes('of this format')")
    shot(page, "unseen")
    assert page.is_hidden("#after")
    with page.expect_download() as waiting:
        page.click("#download")
    assert waiting.value.suggested_filename == "scan_x4.tif"


def test_errors_are_explained(page, process):
    server = process()
    page.goto(server.url)
    page.wait_for_selector("#engine option", state="attached")
    drop(page, b"hello", "notes.txt", "text/plain")
    assert "is not a picture" in page.inner_text("#error")
    drop(page, b"hello", "broken.png", "image/png")
    page.click("#start")
    page.wait_for_selector("#error:not([hidden])")
    assert "not an image of a known kind" in page.inner_text("#error")
    shot(page, "error")
    server.stop()
    page.click("#start")
    until(page, "document.getElementById('error').textContent.includes('does not answer')")


def test_keyboard_token_and_canceling(page, process, tmp_path):
    (tmp_path / "token").write_text("secret\n")
    server = process("--token-file", str(tmp_path / "token"))
    page.goto(server.url)
    page.wait_for_selector("#token-row:not([hidden])")
    shot(page, "token")
    page.focus("#token")
    page.keyboard.type("secret")
    page.keyboard.press("Tab")
    page.wait_for_selector("#engine option", state="attached")
    assert page.is_hidden("#error")
    drop(page, picture(300, 300), "large.png", "image/png")
    page.focus("#steps")
    page.keyboard.press("Control+A")
    page.keyboard.type("1000")
    page.keyboard.press("Enter")
    page.wait_for_selector("#progress:not([hidden])")
    until(page, "document.getElementById('bar').value > 0")
    until(page, "!draft.hidden && draft.complete")  # a selector waits for frames too
    assert page.evaluate("[draft.naturalWidth, draft.naturalHeight]") == [300, 300]
    shot(page, "preview")
    page.focus("#cancel")
    page.keyboard.press("Enter")
    page.wait_for_selector("#progress", state="hidden")
    headers = {"Authorization": "Bearer secret"}
    page.wait_for_timeout(500)
    assert "moesr_cancelled_total 1.0" in server.client.get("/metrics", headers=headers).text


@pytest.mark.parametrize("page", ["desktop"], indirect=True)
def test_progress_continues_after_a_restart_of_the_server(page, process):
    server = process()
    page.goto(server.url)
    page.wait_for_selector("#engine option", state="attached")
    drop(page, picture(60, 60), "a.png", "image/png")
    page.fill("#steps", "1000")
    page.click("#start")
    until(page, "document.getElementById('bar').value > 0")
    server.stop(signal.SIGKILL)
    until(page, "document.getElementById('stage').textContent.includes('connection is lost')")
    shot(page, "lost")
    process("--port", str(server.address[1]))
    page.wait_for_selector("#result:not([hidden])", timeout=60_000)
