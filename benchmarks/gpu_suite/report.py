"""The page of benchmarks/gpu.py: machine, targets, all figures, checks, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Found = dict[str, dict[str, Any]]

FLOOR_FACTOR, LONG_MS, SHORT_MS, BUSY = 3.0, 300.0, 50.0, 0.5
"""Targets: step time over its floor; ms of an image of 200 and of 20 steps; fraction of the matrix rate."""


def markdown(found: Found) -> str:
    """Return the page."""
    facts = found["machine"]["facts"]
    packages = ", ".join(f"{name} {version}" for name, version in facts.get("packages", {}).items())
    lines = [
        f"# {facts['gpu']}",
        "",
        f"`python benchmarks/gpu.py`: compute capability {facts['capability']}, driver for CUDA "
        f"{facts['cuda']}, {facts['memory_gb']:.0f} GB; {facts.get('host', '')}; {packages}.",
        "",
        *_targets(found),
        *_figures(found),
        *_checks(found),
        *_missing(found),
    ]
    return "\n".join(lines) + "\n"


def rows_of(found: Found) -> Iterator[dict[str, Any]]:
    """Yield every measured value of all sections."""
    for part in found.values():
        yield from part["rows"]


def _targets(found: Found) -> Iterator[str]:
    """Yield the table of targets and the runtime's best values."""
    ours = [row for row in rows_of(found) if row["who"].startswith("runtime")]
    if not ours:
        return
    yield "| target | wanted | best of the runtime |"
    yield "| --- | --- | --- |"
    for what, batch, wanted in (("image of 200 steps", 1, LONG_MS), ("image of 20 steps", 1, SHORT_MS)):
        values = [(r["value"], r["who"]) for r in ours if r["what"] == what and r["batch"] == batch]
        yield f"| {what} | {wanted:.0f} ms | {_best(values, 'ms')} |"
    shares = [r for r in ours if r["what"] == "step" and r["share"]]
    floors = [(1 / r["share"], r["who"]) for r in shares if r["batch"] == 1]
    yield f"| a step over its floor, batch 1 | {FLOOR_FACTOR:.0f} x | {_best(floors, 'x')} |"
    most = max((r["batch"] for r in shares), default=1)
    busy = [(-100 * r["share"], r["who"]) for r in shares if r["batch"] == most]
    yield f"| share of the matrix rate, batch {most} | {100 * BUSY:.0f} % | {_best(busy, '%')} |"
    yield ""


def _best(values: list[tuple[float, str]], unit: str) -> str:
    if not values:
        return "not measured"
    value, who = min(values)
    return f"{abs(value):.3g} {unit} ({who})"


def _figures(found: Found) -> Iterator[str]:
    rows = list(rows_of(found))
    if not rows:
        return
    yield "| by | what | images at once | value | of its limit |"
    yield "| --- | --- | --- | --- | --- |"
    for r in rows:
        share = f"{100 * r['share']:.0f} % of the {r['limit']}" if r["share"] else ""
        yield f"| {r['who']} | {r['what']} | {r['batch']} | {r['value']:.4g} {r['unit']} | {share} |"
    yield ""


def _checks(found: Found) -> Iterator[str]:
    checks = [check for part in found.values() for check in part["checks"]]
    failed = [check for check in checks if not check["held"]]
    yield f"Checks: {len(checks) - len(failed)} of {len(checks)} held."
    yield ""
    for check in failed:
        yield f"- NOT held: {check['what']}, error {check['error']:.1e}, at most {check['tolerance']:.0e}"
    yield from [""] if failed else []


def _missing(found: Found) -> Iterator[str]:
    lines = []
    for name, part in found.items():
        lines += [f"- {name}: absent: {part['absent']}"] if part["absent"] else []
        lines += [f"- {name}: failed: {part['failed']}"] if part["failed"] else []
        lines += [f"- {name}: {note}" for note in part["notes"]]
    if lines:
        yield "Not measured, and notes:"
        yield ""
        yield from lines
        yield ""
    seconds = sum(part["seconds"] for part in found.values())
    yield f"All of it took {seconds:.0f} s."
