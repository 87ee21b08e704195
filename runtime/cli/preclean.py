"""Cleaning severely degraded images before they are super-resolved (StableSR, appendix C).

A super-resolution network such as Real-ESRGAN+ removes noise and blur. Its result is halved by bicubic
resampling, so that its artifacts are not enlarged, and then given to the engine. The network is an ONNX file
that maps RGB in 0..1, [1, 3, h, w], to [1, 3, s h, s w]; its scale s is found by running it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesr.runtime.errors import EngineError, MemoryLimitError, NonFiniteError
from moesr.runtime.images.planes import join, split
from moesr.runtime.images.resize import imresize, reflect
from moesr.runtime.system.files import examine, kind_of, sha256_of
from moesr.runtime.system.memory import ran_out_of_memory

TILE_PX, MULTIPLE_PX = 192, 32  # of the input: the largest tile, and the divisor of its sides
MARGIN_PX = 16  # border of a tile that is not used; beyond the image's edges the image is mirrored
PROBE_PX = 64  # side of the grey image for the first run of the network
FARTHEST = 4.0  # for grey, a network for pixels in 0..1 gives smaller values than this
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_EXPECTED = "expected a super-resolution network: RGB in 0..1, [1, 3, h, w] -> [1, 3, s h, s w], s from 2 on"


@dataclass(frozen=True)
class _Span:
    """The part of the image that a tile produces, along one axis. It begins `MARGIN_PX` inside the tile."""

    start: int
    stop: int


class PreCleaner:
    """A network that makes a cleaner image of `scale / 2` times the size."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        """Open an ONNX file; EngineError if it cannot be run or is not a super-resolution network."""
        self.path = path
        self._session = _open(path, threads)
        self._name, self._type, self._fixed = _declared(path, self._session)
        self.scale = self._probe()
        self.sha256 = sha256_of(path)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Clean a uint8 or uint16 array HxW or HxWx{1,2,3,4}; type and channels stay, alpha is only resized.

        Raises InputError for another array, NonFiniteError or EngineError if the network fails on it, and
        MemoryLimitError if memory runs out.
        """
        planes = split(image)
        rgb = self._clean(planes.rgb)
        alpha = None if planes.alpha is None else imresize(planes.alpha, *rgb.shape[:2])
        return join(rgb, alpha, planes)

    def _clean(self, rgb: np.ndarray) -> np.ndarray:
        """Clean [H, W, 3] and return [s H / 2, s W / 2, 3], with odd sizes rounded up."""
        height, width = rgb.shape[:2]
        tile = self._fixed or (_side(height), _side(width))
        rows, columns = (list(_spans(size, side)) for size, side in zip((height, width), tile, strict=True))
        top = np.iinfo(rgb.dtype).max
        size = [-(-n * self.scale // 2) for n in (height, width)]
        out = np.empty((*size, 3), rgb.dtype)
        for row in rows:
            for column in columns:
                part = rgb[np.ix_(_shown(row, tile[0], height), _shown(column, tile[1], width))]
                halved = self._halved(part.astype(np.float32) / np.float32(top))
                source, place = zip(*(self._places(span) for span in (row, column)), strict=True)
                out[place] = np.rint(np.clip(halved[source], 0.0, 1.0) * top)
        return out

    def _places(self, span: _Span) -> tuple[slice, slice]:
        """Return the part of a halved tile that is used, and its place in the halved image."""
        scale = self.scale
        first, length = MARGIN_PX * scale // 2, -(-(span.stop - span.start) * scale // 2)
        place = span.start * scale // 2
        return slice(first, first + length), slice(place, place + length)

    def _halved(self, tile: np.ndarray) -> np.ndarray:
        """Return the halved result of the network, [s h / 2, s w / 2, 3], for float32 [h, w, 3] in 0..1."""
        result = self._run(tile)
        if not np.isfinite(result).all():
            raise NonFiniteError(
                f"{self.path}: gives NaN or infinite values for this image; use another network"
            )
        odd = [(0, side % 2) for side in result.shape[:2]]
        even = np.pad(result, (*odd, (0, 0)), mode="edge")
        return imresize(even, even.shape[0] // 2, even.shape[1] // 2)

    def _run(self, tile: np.ndarray) -> np.ndarray:
        fed = np.ascontiguousarray(tile.transpose(2, 0, 1)[None], self._type)
        try:
            result = self._session.run(None, {self._name: fed})[0]
        except Exception as error:  # the library's errors have no common base class
            raise _explain(self.path, error) from error
        return np.asarray(result, np.float32)[0].transpose(1, 2, 0)

    def _probe(self) -> int:
        """Return the scale, from a run on grey; EngineError if this is not a super-resolution network."""
        height, width = self._fixed or (PROBE_PX, PROBE_PX)
        grey = np.full((height, width, 3), 0.5, np.float32)
        try:
            result = self._run(grey)
        except (ValueError, IndexError) as error:
            raise EngineError(
                f"{self.path}: its result does not have the shape of an image; {_EXPECTED}"
            ) from error
        scale = result.shape[0] // height
        if result.shape != (scale * height, scale * width, 3) or scale < 2:
            made, given = ("x".join(map(str, array.shape)) for array in (result, grey))
            raise EngineError(f"{self.path}: makes {made} from {given} (h x w x channels); {_EXPECTED}")
        if not np.abs(result).max() < FARTHEST:
            raise EngineError(f"{self.path}: gives {np.abs(result).max():g} for grey 0.5; {_EXPECTED}")
        return scale


def _side(size: int) -> int:
    """Return the side of the tiles for an image of this size."""
    return min(TILE_PX, -(-(size + 2 * MARGIN_PX) // MULTIPLE_PX) * MULTIPLE_PX)


def _spans(size: int, tile: int) -> Iterator[_Span]:
    """Return the tiles along one axis; all begin at even positions, so that their results can be halved."""
    stride = (tile - 2 * MARGIN_PX) // 2 * 2
    for start in range(0, size, stride):
        yield _Span(start, min(start + stride, size))


def _shown(span: _Span, tile: int, size: int) -> np.ndarray:
    """Return the positions in a line of `size` pixels that a tile shows, mirrored beyond its ends."""
    return reflect(np.arange(span.start - MARGIN_PX, span.start - MARGIN_PX + tile), size)


def _open(path: Path, threads: int | None) -> Any:
    from moesr.runtime.backends import ort

    ort.probe()  # the error says what to install
    import onnxruntime

    status = examine(path, EngineError)
    if status is None or kind_of(status) != "file":
        problem = f"is a {kind_of(status)}" if status else "no such file"
        raise EngineError(f"{path}: {problem}; {_EXPECTED}, as an ONNX file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads or 0, 4
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors have no common base class
        raise _explain(path, error) from error


def _declared(path: Path, session: Any) -> tuple[str, type, tuple[int, int] | None]:
    """Return name, type and fixed sides (or None) of the only input; EngineError if it takes no image."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(outputs) != 1:
        raise EngineError(f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs; {_EXPECTED}")
    shape = [n if isinstance(n, int) else None for n in inputs[0].shape]
    kind = _TYPES.get(inputs[0].type)
    if kind is None or len(shape) != 4 or shape[0] not in (1, None) or shape[1] not in (3, None):
        given = "x".join("?" if n is None else str(n) for n in shape)
        raise EngineError(f"{path}: takes {inputs[0].type} {given}; {_EXPECTED}")
    height, width = shape[2:]
    if height is None and width is None:
        return inputs[0].name, kind, None
    fixed = height or width or 0, width or height or 0
    if min(fixed) <= 2 * MARGIN_PX + 1:
        raise EngineError(f"{path}: takes tiles of {fixed[1]}x{fixed[0]} only; {_EXPECTED}, of any size")
    return inputs[0].name, kind, fixed


def _explain(path: Path, error: Exception) -> EngineError | MemoryLimitError:
    text = " ".join(str(error).split())
    if ran_out_of_memory(error, path):
        return MemoryLimitError(f"{path}: out of memory ({text:.200}); close other programs")
    return EngineError(f"{path}: cannot be run by onnxruntime ({text:.300}); {_EXPECTED}, as an ONNX file")
