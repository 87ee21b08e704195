"""A decoder in parts on the simulated GPU: ONNX Runtime runs the plans, references replace the kernels."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import relative_l2
from cuda_simulation import RUN, SimulatedDriver, write_kernels
from fake_tensorrt import FakeEngine, fake_library
from graphs import decoder_inputs, random_decoder
from onnx import helper

from moesr.export.bfloat16 import without_bf16
from moesr.export.graphs.decoder import decoder_graph
from moesr.export.graphs.kernel_call import KernelCall
from moesr.export.lowering import lowering
from moesr.export.partition import partition
from moesr.export.partition.writer import write_parts
from moesr.kernels.plan import Case
from moesr.kernels.registry import LOOP, OPS
from moesr.runtime.backends.base import SessionOptions
from moesr.runtime.backends.tensorrt import backend, plan_store
from moesr.runtime.backends.tensorrt.library import Library
from moesr.runtime.devices import kernel_search
from moesr.runtime.devices.compiled_kernels import KernelFiles
from moesr.runtime.devices.cuda import CudaDevice
from moesr.runtime.devices.operator_plan import digest
from moesr.runtime.engine import partitioned_graph as parts_module
from moesr.runtime.engine.graph_spec import Boundary, TensorSpec
from moesr.runtime.engine.partitioned_graph import layout, read_parts
from moesr.runtime.errors import EngineError

TILE, BATCH = 32, 2
BFLOAT16 = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": BFLOAT16}
LIMITS = {"fp16": 2e-3, "bf16": 2e-2}  # relative L2; the results differ in their last bits
HALF = {"fp16": TYPES["float16"], "bf16": BFLOAT16}


class OnnxEngine(FakeEngine):
    """A plan that ONNX Runtime computes; a plan in bfloat16 is computed in float32."""

    def __init__(self, driver: SimulatedDriver, path: Path) -> None:
        model = onnx.load(path)
        data = without_bf16(model).SerializeToString()
        self._session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
        sides = [tuple(map(self._spec, values)) for values in (model.graph.input, model.graph.output)]
        super().__init__(driver, Boundary(*sides), lambda row: row["none"])

    @staticmethod
    def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        dims = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
        return TensorSpec(value.name, str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), dims)

    def get_tensor_dtype(self, name: str) -> str:
        names = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16"}
        return f"DataType.{names[self.specs[name].dtype]}"

    def compute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        taken = {name: self._array(name, shape, addresses).copy() for name, shape in shapes.items()}
        taken = {name: v.astype(np.float32) if v.dtype == BFLOAT16 else v for name, v in taken.items()}
        batch = next(iter(shapes.values()))[0]
        for name, value in zip(self.outputs, self._session.run(self.outputs, taken), strict=True):
            self._array(name, self.specs[name].shape(batch), addresses)[...] = value

    def _array(self, name: str, shape: tuple[int, ...], addresses: dict[str, int]) -> np.ndarray:
        view = self.driver.view(addresses[name], int(np.prod(shape)), TYPES[self.specs[name].dtype])
        if name.endswith(parts_module.NHWC):
            batch, channels, height, width = shape
            return view.reshape(batch, height, width, channels).transpose(0, 3, 1, 2)
        return view.reshape(shape)


class HalfDriver(SimulatedDriver):
    """A GPU whose kernels are compiled for one half-precision type."""

    half: Any = None


def tensor(driver: HalfDriver, address: int, *shape: int, dtype: Any = None) -> torch.Tensor:
    view = driver.view(address, int(np.prod(shape)), dtype or driver.half).reshape(shape)
    return torch.from_numpy(view.astype(np.float32))


def rows(driver, constants, grid, x, scale, shift, even, odd, spectrum, *hidden) -> None:
    """Run the first of three launches, which stores the arguments of the others in the spectrum."""
    assert scale and shift and constants["NORM"]
    driver.view(spectrum, 8, np.int64)[0] = x
    driver.view(even, 4)  # fails unless it is device memory


def columns(driver, constants, grid, spectrum, w1, b1, w2, b2, dft_1, dft_2, twiddle, *hidden) -> None:
    driver.view(spectrum, 8, np.int64)[1:8] = w1, b1, w2, b2, *(constants[n] for n in ("GROUPS", "SPAN", "C"))


def rows_inverse(
    driver, constants, grid, spectrum, even_inverse, odd_inverse, x, scale, shift, y, *hidden
) -> None:
    first, w1, b1, w2, b2, groups, span, padded = driver.view(spectrum, 8, np.int64).tolist()
    assert first == x
    shape = grid[2] // constants["CHANNELS"], constants["CHANNELS"], constants["H"], constants["W"]
    # all diagonal blocks of a group form one block-diagonal matrix
    weights = [tensor(driver, w, 2, groups, padded, padded)[:, :, :span, :span] for w in (w1, w2)]
    biases = [tensor(driver, b, 2, groups, padded, dtype=np.float32)[:, :, :span] for b in (b1, b2)]
    norm = {
        n: tensor(driver, at, *shape[:2], dtype=np.float32) for n, at in (("scale", scale), ("shift", shift))
    }
    filtered = OPS["aff_filter"].reference(
        x=tensor(driver, x, *shape), w1=weights[0], b1=biases[0], w2=weights[1], b2=biases[1], **norm
    )["y"]
    driver.view(y, filtered.numel(), driver.half)[:] = filtered.numpy().ravel()


def attention(driver, constants, grid, q, k, v, out, tokens, scale, *hidden) -> None:
    shape = grid[1], constants["WIDTH"], tokens
    given = {name: tensor(driver, at, *shape) for name, at in (("q", q), ("k", k), ("v", v))}
    attended = OPS["attention"].reference(**given, scale=scale, tokens_last=True)["out"]
    driver.view(out, attended.numel(), driver.half)[:] = attended.numpy().ravel()


def inverted_residual(
    driver, constants, grid, x, expand, b1, depthwise, b2, reduce, b3, scratch, y, batch, *hidden
) -> None:
    """Run the reference of the inverted residual block.

    The data is channels last, and the taps of the depthwise weights come first.
    """
    cin, inner, cout, height, width = (constants[n] for n in ("CIN", "INNER", "COUT", "H", "W"))
    assert constants["X_CHANNEL"] == constants["Y_CHANNEL"] == 1
    result = OPS["inverted_residual"].reference(
        x=tensor(driver, x, batch, height, width, cin),
        expand=tensor(driver, expand, inner, cin),
        expand_bias=tensor(driver, b1, inner, dtype=np.float32),
        depthwise=tensor(driver, depthwise, 9, inner).T.reshape(inner, 3, 3),
        depthwise_bias=tensor(driver, b2, inner, dtype=np.float32),
        reduce=tensor(driver, reduce, cout, inner),
        reduce_bias=tensor(driver, b3, cout, dtype=np.float32),
        channels_last=True,
    )["y"]
    driver.view(scratch, 2)  # fails unless it is device memory
    driver.view(y, result.numel(), driver.half)[:] = result.numpy().ravel()


@pytest.fixture(autouse=True)
def kernels_of_the_decoder(monkeypatch):
    for function in (rows, columns, rows_inverse, attention, inverted_residual):
        monkeypatch.setitem(RUN, function.__name__, function)
    monkeypatch.setitem(RUN, "columns_cached", columns)


@pytest.fixture(scope="module", params=HALF)
def precision(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(tmp_path_factory, precision) -> Path:
    """Return an engine directory with a decoder in parts and its kernels."""
    directory = tmp_path_factory.mktemp("engine")
    choices = dataclasses.replace(lowering("gpu", precision), kernels=True, residuals="kernels")
    built = decoder_graph(random_decoder(), TILE // 4, choices)
    parts = partition.cut(built)
    write_parts(directory, "decoder", built, parts)
    calls = [part for part in parts if isinstance(part, KernelCall)]
    ops = []
    for name in {call.op for call in calls}:
        shapes = {json.dumps(dict(call.shape)): call.shape for call in calls if call.op == name}
        cases = [Case("tiny", {"batch": 1, "heads": 1, **shape}, precision, 0.0) for shape in shapes.values()]
        ops.append(dataclasses.replace(OPS[name], deployed=tuple(cases)))
    write_kernels(directory / "kernels", ops=LOOP)
    write_kernels(directory / "kernels" / "decoder", ops=ops, dtype=precision)
    both = [json.loads((directory / d / "kernels.json").read_text()) for d in ("kernels", "kernels/decoder")]
    for kernel in both[1]["kernels"].values():
        for target in kernel["targets"].values():
            target["file"] = f"decoder/{target['file']}"
    for plan in both[1]["plans"]:
        for buffer in plan["buffers"]:
            if "file" in buffer:
                buffer["file"] = f"decoder/{buffer['file']}"
    both[0]["kernels"] |= both[1]["kernels"]
    both[0]["plans"] += both[1]["plans"]
    both[0]["sha256"] = digest(both[0])
    (directory / "kernels" / "kernels.json").write_text(json.dumps(both[0]))
    return directory


class Rig:
    """A session of the decoder that is bound to buffers of a simulated GPU."""

    def __init__(self, engine: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.driver = HalfDriver()
        self.driver.half = HALF[precision]
        self.device = CudaDevice(self.driver, KernelFiles.of(engine / "kernels", self.driver))
        self.path = engine / "decoder.parts.json"
        self.engines: dict[str, OnnxEngine] = {}

        def opened(library: Library, path: Path, key: plan_store.PlanKey, cache: Path | None) -> OnnxEngine:
            assert key.graph_sha256 == next(
                s.plan.sha256 for s in read_parts(self.path).steps if s.plan and s.plan.file == path.name
            )
            self.engines[path.name] = OnnxEngine(self.driver, path)
            return self.engines[path.name]

        monkeypatch.setattr(backend, "open_plan", opened)
        boundary = decoder_graph(random_decoder(), TILE // 4, lowering("gpu", precision)).boundary
        options = SessionOptions("cuda", max_batch=BATCH)
        self.session = backend.open_parts(fake_library(), self.path, boundary, 90, options)
        specs = (*boundary.inputs, *boundary.outputs)
        self.buffers = {spec.name: self.device.buffer(spec, BATCH) for spec in specs}
        self.session.bind(self.buffers, BATCH)

    def send(self, inputs: dict[str, np.ndarray]) -> None:
        for name, value in inputs.items():
            self.device._large.send_large(self.buffers[name].address, np.ascontiguousarray(value))

    def image(self, batch: int) -> np.ndarray:
        image = np.empty((batch, 3, TILE, TILE), np.float32)
        self.driver.copy_out(image, self.buffers["image"].address)
        return image


def test_session_equals_the_whole_decoder(engine, precision, monkeypatch):
    rig, network = Rig(engine, precision, monkeypatch), random_decoder()
    inputs = decoder_inputs(network, [0.3, 1.0], TILE)
    choices = dataclasses.replace(lowering("gpu", precision), kernels=True, residuals="kernels")
    want = partition.run(partition.cut(decoder_graph(network, TILE // 4, choices)), inputs, "image")
    for batch in (2, 1, 2):
        rig.send(inputs)
        rig.session.enqueue(batch)
        assert relative_l2(rig.image(batch), want[:batch]) < LIMITS[precision]
    taken = {context.memory for e in rig.engines.values() for context in e.contexts}
    rig.session.close()
    assert len(taken) >= 1
    with pytest.raises(EngineError, match="aborted or closed; open the engine again"):
        rig.session.enqueue(1)


def test_run_is_captured_and_replayed(engine, precision, monkeypatch):
    rig = Rig(engine, precision, monkeypatch)
    first, second = (decoder_inputs(random_decoder(), [f, 1.0], TILE) for f in (0.2, 0.9))
    rig.send(first)
    rig.session.enqueue(2)
    want = rig.image(2)
    rig.driver.begin_capture()
    rig.session.enqueue(2)
    graph = rig.driver.end_capture()
    images = []
    for inputs in (second, first):
        rig.send(inputs)
        rig.driver.replay(graph)
        images.append(rig.image(2))
    np.testing.assert_array_equal(images[1], want)
    assert relative_l2(images[0][0], want[0]) > 1e-4


def test_missing_kernel_names_the_cure(engine, precision, monkeypatch, tmp_path):
    rig = Rig(engine, precision, monkeypatch)
    monkeypatch.setattr(kernel_search, "find_kernels", lambda engine: [write_kernels(tmp_path)])
    with pytest.raises(
        EngineError,
        match=rf"no {precision} kernel of (attention|aff_filter|inverted_residual) with .*kernels\.build",
    ):
        rig.session.bind(rig.buffers, BATCH)


def test_live_values_do_not_overlap_in_memory(engine):
    parts = read_parts(engine / "decoder.parts.json")
    lives = parts.lives()
    sizes = {name: parts.nbytes(name, 3) for name in lives}
    places, total = layout(sizes, lives)
    for a in lives:
        assert places[a] % parts_module.ALIGNMENT == 0 and places[a] + sizes[a] <= total
        for b in lives:
            meet = lives[a][0] <= lives[b][1] and lives[b][0] <= lives[a][1]
            if a != b and meet:
                assert places[a] + sizes[a] <= places[b] or places[b] + sizes[b] <= places[a]
    assert total < 0.8 * sum(sizes.values())  # others share memory


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"schema": 1}, "schema 1, expected 2"),
        ({"inputs": ["z"]}, "no earlier step makes fidelity, lr|no (earlier )?step makes (fidelity|lr)"),
        ({"steps": 3}, "steps is 3, expected a list"),
    ],
)
def test_damaged_lists_are_refused(engine, tmp_path, damage, message):
    path = tmp_path / "decoder.parts.json"
    path.write_text(json.dumps(json.loads((engine / path.name).read_text()) | damage))
    with pytest.raises(EngineError, match=f"({message}).*; export the engine again"):
        read_parts(path)


def test_opening_again_pins_no_more_memory_and_loads_no_kernels(engine, precision, monkeypatch):
    rig = Rig(engine, precision, monkeypatch)
    pinned, loads = rig.driver.peak_pinned, list(rig.driver.loads)
    assert loads
    for _ in range(2):
        rig.session.bind(rig.buffers, BATCH)
    assert (rig.driver.peak_pinned, rig.driver.loads) == (pinned, loads)
