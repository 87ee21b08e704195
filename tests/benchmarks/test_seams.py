"""benchmarks/seams.py: the measure finds seams that are there and no others, and the page is whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import seams
from engines import build_engine

from moesr.runtime.engine.manifest_file import read_manifest
from moesr.runtime.loop.tile_layout import TileLayout

PERIOD = 4


def scene(kind: str) -> np.ndarray:
    """An image without seams, uint16 [160, 160, 3]."""
    rng = np.random.default_rng(4)
    if kind == "noisy":
        return rng.integers(20000, 45000, (160, 160, 3), np.uint16)
    y, x = np.mgrid[:160, :160] / 160
    waves = 0.2 * np.sin(9 * x + 4 * y) + 0.1 * np.cos(13 * y) * (kind == "natural")
    plane = np.full((160, 160), 0.5) if kind == "flat" else 0.5 + waves
    return np.repeat(np.rint(plane * 65535)[..., None], 3, 2).astype(np.uint16)


@pytest.mark.parametrize(("kind", "least"), [("flat", 100.0), ("natural", 1.5), ("noisy", 1.3)])
def test_steps_at_borders_are_found(kind: str, least: float):
    image = scene(kind)
    clean = seams.seam(image, 1, [40, 80], PERIOD)
    assert all(0.7 < value < 1.2 for value in clean)
    image[:, 40:] += 12000 if kind == "noisy" else 1000
    first, second = seams.seam(image, 1, [40, 80], PERIOD)
    assert first > least and second == pytest.approx(clean[1])
    assert max(seams.seam(image, 0, [40, 80], PERIOD)) < 1.2
    assert seams.across_the_wrap(image) > least


def test_borders_are_edges_and_middles_of_overlaps(tmp_path: Path):
    layout = TileLayout(read_manifest(build_engine(tmp_path)), 16, 28)  # tiles of 16 at 0 and 12 across
    assert seams.borders(layout.sampling, layout, 0) == set()
    assert seams.borders(layout.sampling, layout, 1) == {48, 56, 64}
    assert seams.measure(scene("flat")[:64, :112], layout.sampling, layout) == 1.0


def test_the_page_has_a_row_for_every_tiling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(seams, "RESULT_PX", 200)
    monkeypatch.setattr(seams, "MEGAPIXELS", (0.25, 1))
    engine = build_engine(tmp_path / "engine")
    given = ["--engines", str(engine), "--steps", "2", "--rounds", "1", "-o", str(tmp_path / "out")]
    assert seams.main(given) == 0
    page = (tmp_path / "out/seams.md").read_text("utf-8")
    assert page.strip() == capsys.readouterr().out.strip()
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| ") and "---" not in line]
    assert len(rows) == 1 + 6 + 1 + 2
    for row in rows[1:7]:
        assert all(0.5 < float(cell) < 1.5 for cell in row[7:10])
