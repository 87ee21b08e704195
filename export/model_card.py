"""The model card of an engine: the README.md of its repository on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from moesr.runtime.engine.manifest import AutoencoderManifest, Manifest
from moesr.runtime.system.memory import readable

CARD_NAME = "README.md"

HEAD = """---
library_name: moesr
pipeline_tag: image-to-image
tags:
- super-resolution
- onnx
# license: the owner of the weights names one here, such as apache-2.0
---
"""
BEGIN, END = "<!-- begin of the part that moesr-export writes -->", "<!-- end of this part -->"


def model_card(manifest: Manifest, directory: Path, repository: str, earlier: str | None = None) -> str:
    """Return the card of an engine for `owner/name`.

    Only the part between two marks is replaced in an `earlier` card, so that its owner's words and license
    stay.
    """
    part = f"{BEGIN}\n{_facts(manifest, directory, repository)}{END}\n"
    if earlier is None:
        return f"{HEAD}\n{part}"
    before, begin, rest = earlier.partition(BEGIN)
    _, end, after = rest.partition(f"{END}\n")
    if not (begin and end):
        return f"{earlier.rstrip()}\n\n{part}"
    return before + part + after


def _facts(manifest: Manifest, directory: Path, repository: str) -> str:
    """Return the facts of the manifest in plain words, and the commands that use the engine."""
    rows = "".join(f"| {label} | {text} |\n" for label, text in _rows(manifest, directory).items())
    if isinstance(manifest, AutoencoderManifest):
        title, command = _plain(manifest.name), "moesr-decode latents.pt"
        purpose = "This engine decodes latents of a text-to-image model."
    else:
        title, command = f"{_plain(manifest.name)}, x{manifest.scale}", "moesr-run photo.jpg"
        purpose = (
            f"This engine makes images {manifest.scale} times as wide and {manifest.scale} times as high, by "
            "latent diffusion."
        )
    return (
        f"# {title}\n\n"
        f"{purpose} It runs with moesr, without PyTorch:\n\n"
        "```sh\n"
        "pip install 'moesr[cpu,hub]'\n"
        f"{command} --engine hf://{repository}\n"
        "```\n\n"
        f"| | |\n| --- | --- |\n{rows}\n"
    )


def _rows(m: Manifest, directory: Path) -> dict[str, str]:
    """Return the facts by label."""
    size = sum((directory / file.file).stat().st_size for file in m.files)
    arrangements = [each for graph in m.graphs.values() for each in graph.arrangements]
    precisions = ", ".join(dict.fromkeys(each.precision for each in arrangements))
    proofs = [each.parity for each in arrangements if each.parity]
    experts = "one expert" if len(m.experts) == 1 else f"{len(m.experts)} experts, one per range of noise"
    if isinstance(m, AutoencoderManifest):
        counts = (f"{role} {graph.params:,} parameters" for role, graph in m.graphs.items())
        rows = {"model": f"{_plain(m.name)}: {', '.join(counts)}", "scaling factor": f"{m.latent_scale:g}"}
    else:
        rows = {
            "model": f"{_plain(m.name)}: {experts}, {sum(g.params for g in m.graphs.values()):,} parameters",
            "scale": f"{m.scale} output pixels per input pixel, along one side",
            "sampling": f"{m.steps} steps of {m.sampler} by default",
        }
    rows |= {
        "precision": precisions,
        "size": f"{len(m.files)} files, {readable(size)}; tiles of {m.tile} x {m.tile} output pixels",
    }
    if proofs:
        worst = max(proofs, key=lambda parity: parity.relative_l2 / (parity.threshold or 1))
        rows["parity"] = (
            f"largest relative error of a graph against its PyTorch network: {worst.relative_l2:.1e}, "
            f"at most {worst.threshold:.0e} is allowed"
        )
    if m.prompts:
        rows["prompts"] = ", away from ".join(map(_plain, m.prompts))
    rows["made with"] = _plain(", ".join(f"{name} {version}" for name, version in m.versions.items()))
    rows["checkpoint"] = f"SHA-256 {m.checkpoint_sha256}"
    return rows


def _plain(text: str) -> str:
    """Return text in which no character has a meaning in Markdown or HTML."""
    return "".join(f"&#{ord(c)};" if c in "\\`*_{}[]<>()#|!&~" else c for c in text)
