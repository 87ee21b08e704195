"""`moesr-run --compare`: a page that shows input, bicubic enlargement and result side by side, with a slider.

The page is one HTML file that contains its images and loads nothing else.
"""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from moesr.runtime.errors import OutputError
from moesr.runtime.images import writing
from moesr.runtime.images.provenance import Provenance
from moesr.runtime.images.reading import LoadedImage
from moesr.runtime.images.resize import imresize
from moesr.runtime.system.files import reason, write_atomically

LOSSLESS_PX = 4_000_000
"""Larger images, by their number of pixels, are JPEG files of quality 92 in the page to limit its size."""

ENDING = "_compare.html"


def write(path: Path, image: LoadedImage, result: LoadedImage, record: Provenance) -> None:
    """Write the page for a result; OutputError if it cannot be written."""
    height, width = result.pixels.shape[:2]
    bicubic = imresize(image.pixels, height, width)
    pictures = {"input": image.pixels, "bicubic": bicubic, "result": result.pixels}
    values = {
        "TITLE": html.escape(record.source),
        "WIDTH": str(width),
        "HEIGHT": str(height),
        "RECORD": html.escape(json.dumps({"engine": record.engine, **record.settings})),
        **{name.upper(): _data_uri(pixels) for name, pixels in pictures.items()},
    }
    page = _PAGE
    for name, value in values.items():
        page = page.replace(f"%{name}%", value)
    try:
        with write_atomically(path) as stream:
            stream.write(page.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {reason(error)}") from error


def _data_uri(pixels: np.ndarray) -> str:
    """Return an image of 8 bits per channel as a data URI."""
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / np.float32(257.0)).astype(np.uint8)
    picture = writing.to_pil(pixels)
    large = picture.width * picture.height > LOSSLESS_PX
    if large and picture.mode in ("LA", "RGBA"):
        base = Image.new("RGB", picture.size, "white")
        base.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
        picture = base
    stream = io.BytesIO()
    if large:
        picture.save(stream, "JPEG", quality=92)
    else:
        picture.save(stream, "PNG")
    kind = "jpeg" if large else "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>%TITLE%</title>
<style>
  body { margin: 0; font: 14px system-ui, sans-serif; background: #222; color: #eee; }
  header { padding: 8px 12px; display: flex; gap: 16px; flex-wrap: wrap; align-items: center; }
  small { color: #aaa; }
  input[type=range] { flex: 1; min-width: 200px; }
  .pair { position: relative; width: %WIDTH%px; max-width: 100%; aspect-ratio: %WIDTH% / %HEIGHT%; }
  .pair img { position: absolute; inset: 0; width: 100%; height: 100%; }
  .pair.full { max-width: none; }
  .row { display: grid; grid-template-columns: repeat(3, 1fr); gap: 8px; padding: 8px; }
  .row img { width: 100%; }
  figure { margin: 0; }
  .pixels { image-rendering: pixelated; }
</style>
<header>
  <b>%TITLE%</b>
  <label>left: <select id="left">
    <option value="bicubic">bicubic</option><option value="input">input</option>
  </select></label>
  <input id="split" type="range" min="0" max="100" value="50" step="0.1" aria-label="position of the border">
  <label><input id="full" type="checkbox"> full size</label>
  <small>%WIDTH% x %HEIGHT% pixels; %RECORD%</small>
</header>
<div class="pair" id="pair">
  <img id="over" src="%RESULT%" alt="result">
  <img id="under" src="%BICUBIC%" alt="bicubic">
</div>
<div class="row">
  <figure><img class="pixels" id="a" src="%INPUT%" alt="input"><figcaption>input</figcaption></figure>
  <figure><img id="b" alt="bicubic"><figcaption>bicubic</figcaption></figure>
  <figure><img id="c" alt="result"><figcaption>result</figcaption></figure>
</div>
<script>
  const get = name => document.getElementById(name), under = get("under"), pair = get("pair");
  const bicubic = under.src;
  get("b").src = bicubic;
  get("c").src = get("over").src;
  const move = () => { under.style.clipPath = `inset(0 ${100 - get("split").value}% 0 0)`; };
  get("split").oninput = move;
  get("left").onchange = event => {
    const input = event.target.value === "input";
    under.src = input ? get("a").src : bicubic;
    under.classList.toggle("pixels", input);
  };
  get("full").onchange = event => pair.classList.toggle("full", event.target.checked);
  pair.onpointermove = event => {
    if (event.buttons) {
      const box = pair.getBoundingClientRect();
      get("split").value = 100 * (event.clientX - box.left) / box.width;
      move();
    }
  };
  pair.ondragstart = () => false;
  move();
</script>
</html>
"""
