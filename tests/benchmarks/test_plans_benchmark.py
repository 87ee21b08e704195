"""benchmarks/plans.py at tiny sizes: its table of plans, memory between parts, and choices."""

from __future__ import annotations

from pathlib import Path

import plans
import pytest
from gpu_suite.setup import Setup

from moesr.runtime.backends.tensorrt.library import Library, load
from moesr.runtime.errors import EngineError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the building of plans by a quick function."""

    def build(library: Library, path: Path, capability: int, max_batch: int) -> bytes:
        assert capability == 86 and max_batch in (2, 3) and path.stat().st_size
        return bytes(1_500_000)

    monkeypatch.setattr(plans, "build_plan", build)
    monkeypatch.setattr(plans, "load", lambda flavour: Library(flavour, "9.9", None, None))


def test_page_lists_plans_memory_and_choices(quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = "--width", "16", "--channels", "16", "--tile", "32", "--capability", "86", "--max-batch", "2", "3"
    assert plans.main([*sizes, "-o", str(tmp_path / "plans.md")]) == 0
    text = (tmp_path / "plans.md").read_text()
    assert text == capsys.readouterr().out
    assert "tensorrt_rtx 9.9, compute capability 8.6, half precision, tiles of 32 px; UNet width 16" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[2].startswith("| expert, fp16 | up to 2 | ") and "| 1.5 |" in rows[2]
    assert rows[5].startswith("| expert, fp16 | up to 3 | ")
    parts = int(rows[4].split()[3])
    assert [row.split(" |")[0].split(", ")[1] for row in rows[8:14]] == ["bf16"] * 6
    assert parts > 10 and f"| {1.5 * parts:.1f} |" in rows[4]
    assert "of them lie channels last" in text
    blocks = [line for line in rows if " -> " in line]
    assert sum(int(line.split("|")[2]) for line in blocks) == 9
    assert all(line.endswith("| plans |") for line in blocks)


def test_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys):
    def missing(flavour: str) -> Library:
        raise EngineError(f"{flavour} does not load")

    monkeypatch.setattr(plans, "load", missing)
    assert plans.main(["-o", str(tmp_path / "plans.md")]) == EngineError.exit_code
    assert "plans: tensorrt_rtx does not load" in capsys.readouterr().err


@pytest.mark.slow
def test_full_width_plans_build(tmp_path: Path, record_property):
    """An untrained expert, the decoder and all its parts at the published sizes and 512 px."""
    try:
        library = load("tensorrt_rtx")
    except EngineError as error:
        pytest.skip(str(error))
    built: list[plans.Built] = []
    text = plans.page(Setup(), library, 89, [1], tmp_path, on_built=built.append)
    for plan in built:
        record_property(plan.name, f"{plan.plan_bytes} bytes in {plan.seconds:.1f} s")
    for half in (built[: len(built) // 2], built[len(built) // 2 :]):
        expert, decoder, *parts = half
        assert expert.plan_bytes > 2e8 and decoder.plan_bytes > 1e8 and len(parts) > 10
        assert sum(part.plan_bytes for part in parts) > 1e8
    assert "| 128 -> 128, 512x512 | 1 |" in text
