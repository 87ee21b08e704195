"""Small changes that damage a JSON document: values of other types, sizes and forms."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema

NUMBERS = (-1, 0, 10**400, *(10**n for n in (3, 6, 10, 14, 19)))
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *(0.5, -0.5, 1e31, float("inf"), float("nan"), True, None),
    *("", "..", "a/../b", "a\nb", "x" * 5000, [], [-1], {"a": {}}),
)


def mutations(document: Any, every: int = 1) -> Iterator[tuple[str, Any]]:
    """Yield copies of a document with one value replaced or one entry removed, and the path of the change.

    Only the first entry of a list and only the first two of several similar objects are changed. Of all
    changes, one in `every` is made, and neighboring paths get different ones.
    """
    absent = object()
    assert math.gcd(len(VALUES) + 1, every) == 1, "some changes would never be made"
    for path, value in itertools.islice(
        itertools.product(_paths(document, ()), (*VALUES, absent)), 0, None, every
    ):
        where, changed = ".".join(map(str, path)), copy.deepcopy(document)
        parent = _at(changed, path[:-1])
        if value is absent:
            del parent[path[-1]]
            yield f"without {where}", changed
            continue
        parent[path[-1]] = value
        yield f"{where} = {value!r:.40}" if not isinstance(value, int) else where, changed


def check_reader(
    document: Any, schema: Any, read: Callable[[Any], object], *refusals: type[Exception], every: int = 1
) -> int:
    """Assert that the reader refuses everything that the schema refuses; return how many changes it refused.

    `every` is that of `mutations`. The reader must raise one of `refusals` and no other exception. It may
    refuse more than the schema does.
    """
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(document)
    read(document)
    refused = 0
    for where, changed in mutations(document, every):
        try:
            read(changed)
        except refusals:
            refused += 1
            continue
        assert validator.is_valid(changed), f"the reader accepts what the schema refuses: {where}"
    return refused


def _paths(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict):
        items = list(value.items())
        alike = len(items) > 3 and all(isinstance(v, dict) for v in value.values())
        for key, inner in items[:2] if alike else items:
            yield from _paths(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from _paths(value[0], (*path, 0))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for step in path:
        value = value[step]
    return value
