"""The ladder as a page: the time of each rung, its distance from the peak rate, and its loss of quality."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Any

from benchlib import metrics
from benchlib.image_pairs import degrade, load_originals

from ladder.configurations import EAGER, Rung
from ladder.worker import EXPERT
from moesr.runtime.engine.graph_io import DECODER

SHALLOW = "shallow_0"
PROFILE_ROWS = 12
GIGA = 1e9
DEGRADATION = "x4-bicubic"


def options(rung: Rung) -> dict[str, Any]:
    """Return the options of an Upscaler's call for a rung, besides the number of steps."""
    told: dict[str, Any] = {"sampler": rung.sampler} if rung.sampler != "ddpm" else {}
    return told | ({"reuse": rung.reuse} if rung.reuse > 1 else {})


def quality(directory: Path, rung: Rung, threads: int) -> float:
    """Return the mean PSNR of an engine on the held-out photographs, sampled as the rung says."""
    from moesr.runtime import Upscaler

    found = []
    with Upscaler(directory, backend=rung.backend, precision=rung.precision, threads=threads) as up:
        for name, hr in load_originals("demo").items():
            lr = degrade(hr, DEGRADATION, name)
            sr = up(lr, steps=rung.steps, seed=42, **options(rung))
            found.append(metrics.scores(sr, hr, up.manifest.scale)["psnr"])
    return mean(found)


def markdown(result: dict[str, Any]) -> str:
    """Return the page: machine, settings, ladder, details and profiles."""
    s, load = result["settings"], result["load_average"]
    rates = ", ".join(f"{name} {rate / GIGA:.0f}" for name, rate in result["limits"].items())
    lines = [
        "# Latency",
        "",
        result["origin"],
        "",
        f"UNet width {s['width']}, decoder channels {s['channels']}, one tile of {s['tile']} px, "
        f"{s['threads']} threads, medians of {s['repeats']} round{'s' * (s['repeats'] > 1)} in turns"
        + (f", load average {load:.1f} at the start." if load is not None else "."),
        f"Images are composed of steps and a decode. Limits of arithmetic, measured: {rates} GFLOP/s. "
        "In int8 are all layers that can be, whatever that costs: `moesr-export --int8` leaves those in "
        "float32 that a model is sensitive in. Random weights let latents grow from step to step, so few of "
        "them fit int8's ranges: its errors here are no trained model's.",
        "",
        *_ladder(result["rungs"]),
        "",
        *_details(result),
    ]
    for name, why in result["skipped"].items():
        lines += ["", f"Not measured: {name}: {why}."]
    lines += ["", *_targets(result)]
    for name, proofs in result["parity"].items():
        told = ", ".join(f"{role} {error:.1e}" for role, error in proofs.items())
        lines += ["", f"Parity of {name} against the networks, relative L2 error: {told}."]
    for engine, roles in result["where"].items():
        for role, groups in roles.items():
            for group, entries in groups.items():
                lines += ["", *_share(f"{engine}, {role}, by {group[:-1]}", entries)]
    return "\n".join(lines)


def _ladder(rungs: list[dict[str, Any]]) -> list[str]:
    """Return the table with the time, memory and quality of an image, one row per rung."""
    base = _eager(rungs)["image 20"]
    psnr = any("psnr" in r for r in rungs)
    head = ["rung", "steps", "image (s)", "against eager, 20 steps", "peak memory (GB)", "error of a step"]
    head += ["error of a decode", *(["PSNR, demo-x4 (dB)"] if psnr else [])]
    lines = [_line(head), _line(["---"] * len(head))]
    for r in rungs:
        cells = [r["name"], str(r["steps"]), f"{r['image']:.3g}", f"{base / r['image']:.2f}"]
        cells += [f"{r['peak_bytes'] / GIGA:.2f}", f"{r['step error']:.1e}", f"{r['decode error']:.1e}"]
        lines.append(_line(cells + ([f"{r['psnr']:.2f}" if "psnr" in r else ""] if psnr else [])))
    return lines


def _details(result: dict[str, Any]) -> list[str]:
    """Return the table with the parts of an image and their fractions of the peak rate."""
    head = ["seconds", "first load", "load", "first image", "step", "shallow step", "decode", "20 steps"]
    head += ["50 steps", "of the limit: step", "decode"]
    lines = [_line(head), _line(["---"] * len(head))]
    for r in result["rungs"]:
        keys = ("first load", "load", "first image", "step", "shallow", "decode", "image 20", "image 50")
        cells = [f"{r[key]:.3g}" if key in r else "" for key in keys]
        macs = result["macs"].get(r["engine"]) or result["macs"]["plain"]
        limit = result["limits"][r["arithmetic"]]
        for what, role in (("step", EXPERT), ("decode", DECODER)):
            cells.append(f"{200 * macs[role] / r[what] / limit:.0f} %")
        lines.append(_line([r["name"], *cells]))
    return lines


def _targets(result: dict[str, Any]) -> list[str]:
    """Compare the speed-ups over eager PyTorch with the targets and with the largest possible ones."""
    base, lines = _eager(result["rungs"])["image 20"], []
    for r in result["rungs"]:
        if r["target"]:
            ratio, most = base / r["image 20"], base / _least_seconds(r, result)
            verdict = "reached" if ratio >= r["target"] else "not reached"
            lines += [
                f"- {r['name']}: {r['target']:.1f} times eager PyTorch, {verdict} ({ratio:.2f}). "
                f"Its products alone, all at the limit, would make it {most:.1f}."
            ]
    return ["Targets, for 20 steps:", "", *lines] if lines else []


def _least_seconds(r: dict[str, Any], result: dict[str, Any]) -> float:
    """Return the least seconds of an image of 20 steps: only products, all at the peak rate."""
    macs = result["macs"].get(r["engine"]) or result["macs"]["plain"]
    full = Rung(**{field.name: r[field.name] for field in fields(Rung)}).full(20)
    steps = full * macs[EXPERT] + (20 - full) * macs.get(SHALLOW, macs[EXPERT])
    return 2 * (steps + macs[DECODER]) / result["limits"][r["arithmetic"]]


def _eager(rungs: list[dict[str, Any]]) -> dict[str, Any]:
    return next(r for r in rungs if r["name"] == EAGER.name)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _share(title: str, entries: dict[str, float]) -> list[str]:
    total = sum(entries.values())
    rows = list(entries.items())[:PROFILE_ROWS]
    rest = total - sum(v for _, v in rows)
    rows += [("all others", rest)] if len(entries) > PROFILE_ROWS else []
    head = [f"| engine's time: {title} | ms | share |", "| --- | --- | --- |"]
    return [*head, *(f"| {name} | {ms:.0f} | {100 * ms / total:.0f} % |" for name, ms in rows)]
