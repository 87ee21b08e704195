"""Evaluation of the integer expressions of kernels.json: numbers, names, + - * //, cdiv, min and max."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

MAX_LENGTH = 200
"""The largest length of an expression in characters, which also limits its nesting."""

MAX_VALUE = 2**62
"""The largest magnitude of a value."""

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}
_FUNCTIONS: dict[str, Callable[..., int]] = {"cdiv": lambda a, b: -(-a // b), "min": min, "max": max}


def evaluate(expression: str | int, names: Mapping[str, int | float]) -> int:
    """Return the value of an expression, with the values of its names from `names`.

    ValueError is raised if it is not such an expression, a name is missing, it divides by zero, or a value
    exceeds MAX_VALUE.
    """
    text = str(expression) if isinstance(expression, str) or abs(expression) <= MAX_VALUE else ""
    if not 0 < len(text) <= MAX_LENGTH:
        raise ValueError(f"an expression has 1 to {MAX_LENGTH} characters, got {len(text)}")
    try:
        return _value(ast.parse(text, mode="eval").body, names)
    except (SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"cannot evaluate {text!r} ({error})") from error


def _value(node: ast.expr, names: Mapping[str, int | float]) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        found = node.value
    elif isinstance(node, ast.Name) and node.id in names:
        found = int(names[node.id])
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        found = _OPERATORS[type(node.op)](_value(node.left, names), _value(node.right, names))
    elif (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _FUNCTIONS
        and len(node.args) == 2
        and not node.keywords
    ):
        found = _FUNCTIONS[node.func.id](*(_value(argument, names) for argument in node.args))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        found = -_value(node.operand, names)
    else:
        raise ValueError(
            f"cannot evaluate {ast.unparse(node)!r} with {', '.join(sorted(names)) or 'no names'}"
        )
    if abs(found) > MAX_VALUE:
        raise ValueError(f"a value of {ast.unparse(node)!r} is too large")
    return found
