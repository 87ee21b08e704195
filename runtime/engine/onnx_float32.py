"""Derives float32 graphs from ONNX files in half precision or with 8-bit products, without the onnx library.

Every half-precision weight (float16 or bfloat16) is followed by a Cast to float32, and nodes that name half
precision as their result's type name float32 instead. Pairs of QuantizeLinear and DequantizeLinear around
activations are removed; 8-bit weights stay, each followed by its own DequantizeLinear. So every value between
the weights and the outputs is float32 and cannot overflow where half precision did.

The file is read and written in the wire format of Protocol Buffers, see `protobuf`. External
weights become part of the derived graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesr.runtime.engine.protobuf import BYTES, MAX_NESTING, VARINT, fields, varint
from moesr.runtime.errors import EngineError
from moesr.runtime.system.files import reason

MAX_BYTES = 2**31 - 1
"""Largest model that Protocol Buffers can hold in one piece."""

FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
_HALF = (_FLOAT16, _BFLOAT16)

Field = tuple[int, int, "int | bytes"]
"""Number, kind and value of a field; the value is an int if the kind is a varint, else its bytes."""


def derive(path: Path) -> bytes:
    """Return the float32 graph of an ONNX file; EngineError if the file cannot be read or is too large."""
    try:
        model = _message(path.read_bytes())
        data = _encoded([(n, k, _graph(_bytes(v), path.parent) if n == 7 else v) for n, k, v in model])
    except (ValueError, IndexError) as error:
        raise EngineError(f"{path}: no float32 graph can be derived from it ({error})") from error
    except OSError as error:
        raise EngineError(f"{path}: cannot be read ({reason(error)})") from error
    if len(data) > MAX_BYTES:
        raise EngineError(f"{path}: too large to derive a float32 graph from it; export one in float32")
    return data


@dataclass
class _Names:
    """Values of one graph, by name."""

    widened: dict[str, str]  # half-precision weights: the names after their Cast
    plain: dict[str, str]  # results of QuantizeLinear: the values before it


def _graph(data: bytes, folder: Path, outer: _Names | None = None, levels: int = MAX_NESTING) -> bytes:
    """Rewrite a GraphProto; `outer` holds the names of the graphs around it."""
    if not levels:
        raise ValueError(f"its graphs are nested more than {MAX_NESTING} deep")
    fields = _message(data)
    names = _Names(dict(outer.widened), dict(outer.plain)) if outer else _Names({}, {})
    nodes = [_message(_bytes(value)) for number, _, value in fields if number == 1]
    for node in nodes:
        if _text(node, 4) == "QuantizeLinear":
            names.plain[_texts(node, 2)[0]] = _texts(node, 1)[0]
    weights, casts = [], []
    for number, _, value in fields:
        if number == 5:
            tensor = _message(_bytes(value))
            weights.append(_encoded(_with_raw_data(tensor, folder)))
            if _number(tensor, 2) in _HALF:
                name = _text(tensor, 8)
                names.widened[name] = f"{name}/float32"
                casts.append(_cast(name, names.widened[name]))
    rewritten = [_node(node, names, folder, levels) for node in nodes]
    kept: list[Field] = [(1, BYTES, node) for node in (*casts, *rewritten)]
    kept += [(5, BYTES, weight) for weight in weights]
    for number, kind, value in fields:
        if number in (11, 12):
            kept.append((number, kind, _value_info(_bytes(value))))
        elif number not in (1, 5, 13):  # 13: types of values inside, which are inferred anew
            kept.append((number, kind, value))
    return _encoded(kept)


def _node(node: list[Field], names: _Names, folder: Path, levels: int) -> bytes:
    """Rewrite a NodeProto."""
    inputs = _texts(node, 1)
    if _text(node, 4) == "DequantizeLinear" and inputs[0] in names.plain:
        source = names.plain[inputs[0]]
        source = names.widened.get(source, source)
        kept = [field for field in node if field[0] in (2, 3)]
        return _encoded([(1, BYTES, source.encode()), *kept, (4, BYTES, b"Identity")])
    made: list[Field] = []
    for number, kind, value in node:
        if number == 1:
            name = _bytes(value).decode()
            value = names.widened.get(name, name).encode()
        elif number == 5:
            value = _attribute(_message(_bytes(value)), names, folder, levels)
        made.append((number, kind, value))
    return _encoded(made)


def _attribute(fields: list[Field], names: _Names, folder: Path, levels: int) -> bytes:
    """Rewrite an AttributeProto: types, tensors and graphs inside it."""
    names_type = _text(fields, 1) in ("to", "dtype", "output_dtype")
    made: list[Field] = []
    for number, kind, value in fields:
        if number == 3 and names_type and value in _HALF:
            value = FLOAT
        elif number in (5, 10):
            value = _wide_tensor(_message(_bytes(value)), folder)
        elif number in (6, 11):
            value = _graph(_bytes(value), folder, names, levels - 1)
        made.append((number, kind, value))
    return _encoded(made)


def _wide_tensor(tensor: list[Field], folder: Path) -> bytes:
    """A TensorProto whose values are float32 if they were half precision."""
    tensor = _with_raw_data(tensor, folder)
    kind = _number(tensor, 2)
    if kind not in _HALF:
        return _encoded(tensor)
    raw = next((_bytes(v) for n, _, v in tensor if n == 9), None)
    bits = np.frombuffer(raw, "<u2") if raw is not None else np.array(list(_packed(tensor)), np.uint16)
    wide = bits.view(np.float16).astype(np.float32) if kind == _FLOAT16 else _from_bfloat16(bits)
    kept = [field for field in tensor if field[0] not in (2, 5, 9)]
    return _encoded([*kept, (2, VARINT, FLOAT), (9, BYTES, wide.astype("<f4").tobytes())])


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _packed(tensor: list[Field]) -> Iterator[int]:
    """The values of the field int32_data, in which half precision may be stored as 16-bit patterns."""
    for number, kind, value in tensor:
        if number == 5 and kind == VARINT:
            yield int(value) & 0xFFFF
        elif number == 5:
            data, at = _bytes(value), 0
            while at < len(data):
                pattern, at = varint(data, at)
                yield pattern & 0xFFFF


def _with_raw_data(tensor: list[Field], folder: Path) -> list[Field]:
    """A TensorProto that holds its values itself, if they were in an external file of `folder`."""
    entries = [_message(_bytes(value)) for number, _, value in tensor if number == 13]
    told = {_text(entry, 1): _text(entry, 2) for entry in entries}
    if not told:
        return tensor
    name, start, length = told["location"], int(told.get("offset", 0)), int(told.get("length", -1))
    if Path(name).name != name:
        raise ValueError(f"its weights are in {name[:60]!r}, outside of its folder")
    with (folder / name).open("rb") as stream:
        stream.seek(start)
        raw = stream.read(length)
    return [*(field for field in tensor if field[0] not in (9, 13, 14)), (9, BYTES, raw)]


def _value_info(data: bytes) -> bytes:
    """A ValueInfoProto whose tensor is float32 if it was half precision."""

    def typed(number: int, value: int | bytes, path: tuple[int, ...]) -> int | bytes:
        if not path:
            return FLOAT if value in _HALF else value
        inner = _message(_bytes(value))
        return _encoded([(n, k, typed(n, v, path[1:]) if n == path[0] else v) for n, k, v in inner])

    return _bytes(typed(0, data, (2, 1, 1)))  # type, tensor_type, elem_type


def _cast(source: str, target: str) -> bytes:
    to = _encoded([(1, BYTES, b"to"), (3, VARINT, FLOAT), (20, VARINT, 2)])  # 2: an integer
    return _encoded(
        [(1, BYTES, source.encode()), (2, BYTES, target.encode()), (4, BYTES, b"Cast"), (5, BYTES, to)]
    )


def _message(data: bytes) -> list[Field]:
    """The fields of a message, in order."""
    found = fields(data, 0, len(data))
    return [(n, kind, varint(data, a)[0] if kind == VARINT else data[a:b]) for n, kind, a, b in found]


def _encoded(fields: list[Field]) -> bytes:
    """The bytes of a message."""
    parts = []
    for number, kind, value in fields:
        parts.append(_encoded_varint(number << 3 | kind))
        if isinstance(value, int):
            parts.append(_encoded_varint(value))
            continue
        if kind == BYTES:
            parts.append(_encoded_varint(len(value)))
        parts.append(value)
    return b"".join(parts)


def _encoded_varint(value: int) -> bytes:
    made = bytearray()
    while value > 0x7F:
        made.append(value & 0x7F | 0x80)
        value >>= 7
    made.append(value)
    return bytes(made)


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number was found where a message is expected")
    return value


def _texts(fields: list[Field], number: int) -> list[str]:
    return [_bytes(value).decode() for n, _, value in fields if n == number]


def _text(fields: list[Field], number: int) -> str:
    return next(iter(_texts(fields, number)), "")


def _number(fields: list[Field], number: int) -> int:
    return next((value for n, _, value in fields if n == number and isinstance(value, int)), 0)
