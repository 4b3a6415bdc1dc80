"""A calculator as a tool: the simplest environment there is, and a pattern for tools of your own."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from fractions import Fraction

from llmrl.environment import Make
from llmrl.tools import ToolError, Tools

_MOST = 200
"""Characters of an expression, at most."""
_OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b, ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: Fraction(a // b), ast.Mod: lambda a, b: a % b,
}  # fmt: skip


def calculator(*, marks: tuple[str, str] | None = None) -> Make:
    """Episodes with one tool, calculate(expression). The recipe's verifier judges the last reply, the turn without a call.

    marks: for models with a small alphabet, e.g. ["(", ")"]: "(3*7)" is a call and "21" the answer to it; a call that cannot be read is answered "#".
    """
    return lambda: Tools([calculate], marks=marks)


def calculate(expression: str) -> str:
    """The value of an arithmetic expression with + - * / // % and brackets, exact; a fraction is rounded to 6 decimals."""
    if len(expression) > _MOST:
        raise ToolError(f"an expression has {_MOST} characters at most")
    if not re.fullmatch(r"[\d\s+\-*/%().]+", expression):
        raise ToolError("only numbers, + - * / // % and brackets can be calculated")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError, ValueError) as error:
        raise ToolError(f"{expression!r} is no arithmetic expression") from error
    value = _value(tree.body)
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6f}".rstrip("0")


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return -_value(node.operand) if isinstance(node.op, ast.USub) else _value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ToolError("only numbers, + - * / // % and brackets can be calculated")
