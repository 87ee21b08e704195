"""A copy of an engine whose decoder gets zeros in place of the latent, to measure what the diffusion adds."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from moesr.runtime.engine.graph_io import DECODER
from moesr.runtime.engine.graph_spec import Arrangement
from moesr.runtime.engine.manifest_file import read_manifest, write_manifest
from moesr.runtime.errors import UsageError
from moesr.runtime.system.files import sha256_of

LATENT = "z"  # the decoder's input


def blank_latent(engine: Path, directory: Path) -> Path:
    """Write such a copy of an engine directory into the existing `directory` and return `directory`.

    Raises UsageError if the engine has no decoder or a partitioned one.
    """
    manifest = read_manifest(engine)
    if DECODER not in manifest.graphs:
        raise UsageError(f"{engine}: has no decoder whose latent could be left out")
    decoder = manifest.graphs[DECODER]
    for file in manifest.files:
        shutil.copyfile(engine / file.file, directory / file.file)
    blanked = {a.file: _blank(directory / a.file) for a in decoder.arrangements}

    def renewed(part: Arrangement) -> dict[str, str]:
        return {"sha256": blanked[part.file]}

    variants = {name: dataclasses.replace(v, **renewed(v)) for name, v in decoder.variants.items()}
    graphs = manifest.graphs | {DECODER: dataclasses.replace(decoder, variants=variants, **renewed(decoder))}
    write_manifest(dataclasses.replace(manifest, graphs=graphs), directory)
    return directory


def _blank(path: Path) -> str:
    """Change the file of a decoder so that it multiplies its latent by zero; returns the file's new hash."""
    import onnx
    from onnx import helper, numpy_helper

    if path.suffix != ".onnx":
        raise UsageError(f"{path}: is partitioned; measure an engine exported for the CPU")
    model = onnx.load(path, load_external_data=False)
    kind = next(i.type.tensor_type.elem_type for i in model.graph.input if i.name == LATENT)
    for node in model.graph.node:
        node.input[:] = [f"{LATENT}_blank" if name == LATENT else name for name in node.input]
    zero = np.zeros((), helper.tensor_dtype_to_np_dtype(kind))
    model.graph.initializer.append(numpy_helper.from_array(zero, f"{LATENT}_nothing"))
    times = helper.make_node("Mul", [LATENT, f"{LATENT}_nothing"], [f"{LATENT}_blank"])
    model.graph.node.insert(0, times)
    onnx.save(model, path)
    return sha256_of(path)
