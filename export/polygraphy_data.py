"""Writes the inputs of every graph, and a data loader script, for debugging with Polygraphy.

    polygraphy run ENGINE/decoder.onnx --onnxrt --trt \\
        --data-loader-script ENGINE/polygraphy/data_loader.py:decoder

`polygraphy/` in the engine directory holds one NPZ file per graph: the inputs on which the export proved it.
It is not part of the engine, and the runtime does not read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

FOLDER = "polygraphy"
SCRIPT = "data_loader.py"

_HEAD = '''"""Inputs of the graphs beside this folder, for `polygraphy run --data-loader-script`.

Written by `moesr-export --polygraphy`. Functions: {names}.
"""

from pathlib import Path

import numpy as np


def _inputs(file):
    with np.load(Path(__file__).parent / file) as arrays:
        yield dict(arrays)
'''

_LOADER = '''

def {name}():
    """The inputs of {graph}."""
    return _inputs("{file}")
'''


def write_inputs(directory: Path, graph: str, inputs: Mapping[str, np.ndarray]) -> None:
    """Write the inputs of the graph file `graph` of an engine directory."""
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    arrays = dict(inputs)
    np.savez(folder / f"{graph.removesuffix('.onnx')}.npz", allow_pickle=False, **arrays)


def write_script(directory: Path) -> None:
    """Write the data loader script for all inputs that were written."""
    folder = directory / FOLDER
    files = sorted(folder.glob("*.npz"))
    names = [loader_name(path.stem) for path in files]
    text = _HEAD.format(names=", ".join(names))
    for name, path in zip(names, files, strict=True):
        text += _LOADER.format(name=name, graph=f"{path.stem}.onnx", file=path.name)
    (folder / SCRIPT).write_text(text)


def loader_name(graph: str) -> str:
    """Return the name of a graph's function in the script: "decoder.part_0.onnx" becomes "decoder_part_0"."""
    return graph.removesuffix(".onnx").replace(".", "_")
