r"""What counts as a final answer by size: bounds on an expression, found before anything evaluates it.

A final answer is short, shallow and small. 9^{9^9} is read in microseconds but would fill the memory when a comparison evaluates
it; the LaTeX grammar needs time exponential in the depth of brackets. So a text is checked before it is parsed (`of_text`) and the
unevaluated tree before it is compared (`of_expression`). Both name the limit that is passed, or give None. The limits lie far above
the answers of GSM8K, MATH, AIME, AMC and OlympiadBench, whose extremes are 3 nested brackets, a tree of depth 7 and 72 nodes.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import sympy
from sympy import Basic, MatrixBase
from sympy.core.relational import Relational

MAX_CHARS = 2000
"""Of a gold, and of an answer where max_answer_chars is higher: the grammar needs time beyond proportion."""
MAX_NESTING = 8
"""Brackets and braces inside each other."""
MAX_ELEMENTS = 80
"""Of a list, set, tuple or matrix."""
MAX_DEPTH = 24
"""Levels of the expression tree: 2/2/2/... and 3!!!!... nest without brackets."""
MAX_NODES = 300
MAX_BITS = 50_000
"""log2 of numerator times denominator of any exact number that evaluation would make: 15,000 decimal digits."""
MAX_TERMS = 300
"""Monomials after expansion, and the degree of a polynomial."""
MAX_FUNCTIONS = 8
"""Functions of a variable, such as \\sin(2x), a factorial or binomial counted twice: simplifying tries their identities in all combinations."""
MAX_FUNCTION_TERMS = 24
"""MAX_TERMS where there are such functions."""
MAX_ROOTS = 12
MAX_SETS = 12
"""Sets joined by union, intersection and difference."""
MAX_RUN = 1000
"""Terms of a finite sum or product."""
MAX_DET_ROWS = 4

_BRACKETS = re.compile(r"\\[lr](?:floor|ceil|vert|Vert|angle)(?![a-z])|[{(\[})\]]")
_STACKED = re.compile(r"(?:\^\s*\\?\w+\s*){9}")
_LONG_EXPONENT = re.compile(r"\d[eE][-+]?\d{4,}|(?:\^|\*\*)[\s{(-]*\d{6,}")
_PROCESS = re.compile(r"\\(?:i*int|oint|lim)(?![a-zA-Z])")
# These the reader evaluates while it reads, so their arguments must be small as text.
_EAGER = re.compile(r"\\[dt]?binom|\\choose|\\Gamma|\\gamma\s*(?:\\left)?\(|gcd|lcm|\)_\{?[A-Za-z0-9]")
_BIG_ARGUMENT = re.compile(r"\d{6}|[\^!]")
_GROWS = re.compile(r"!|\^\s*\{?\s*(?:\d{3}|[^{}]*\^)")
_BINOMIAL = re.compile(r"\\[dt]?binom\s*(?:\{([^{}]*)\}|\w)\s*(?:\{([^{}]*)\}|\w)")
_JOIN = re.compile(r"\\(?:cup|cap|setminus|backslash|bigcup|bigcap)(?![a-z])")
_MATRIX_FUNCTION = re.compile(
    r"\\operatorname\s*\{?\s*(?:eye|zeros|ones|diag|hstack|vstack|orth\w*|rank|tr|trace|rref|nullspace|norm|cols|rows|eig\w*|diagonalize|svd|SVD)\b"
)


def of_text(text: str) -> str | None:
    """The limit that the text passes, as a phrase; None where it may be parsed. Linear in its length."""
    depth = deepest = 0
    for mark in _BRACKETS.findall(text):
        if mark in "{([" or mark.startswith(r"\l"):
            depth += 1
            deepest = max(deepest, depth)
        else:
            depth -= 1
    if deepest > MAX_NESTING or text.count("|") > 2 * MAX_NESTING or _STACKED.search(text):
        return f"brackets or powers nested more than {MAX_NESTING} deep"
    if len(re.findall("[,;&]", text)) > MAX_ELEMENTS:
        return f"more than {MAX_ELEMENTS} elements"
    if _LONG_EXPONENT.search(text):
        return "an exponent of more than 5 digits, or 3 after a decimal e"
    if _PROCESS.search(text):
        return "an integral or a limit, which is no value"
    if _EAGER.search(text):
        rest = _BINOMIAL.sub(lambda m: "" if _small_binomial(m[1] or "", m[2] or "") else m[0] + "^", text)
        if _EAGER.search(rest) and _BIG_ARGUMENT.search(rest):
            return "a binomial, gamma, gcd or lcm of powers, factorials or numbers above 99999"
    if len(_JOIN.findall(text)) >= MAX_SETS:
        return f"more than {MAX_SETS} joined sets"
    if _MATRIX_FUNCTION.search(text):
        return "a matrix function, which is no value"
    if ("vmatrix" in text or r"\det" in text) and text.count(r"\\") >= MAX_DET_ROWS:
        return f"a determinant of more than {MAX_DET_ROWS} rows"
    return None


def _small_binomial(upper: str, lower: str) -> bool:
    """Integers below 10^5, or letters with integers below 100: a symbolic one is multiplied out."""
    whole = upper.strip().isdigit() and lower.strip().isdigit()
    return not re.search(r"\d{6}|[\^!]" if whole else r"\d{3}|[\^!]", f"{upper} {lower}")


def parts(text: str) -> list[str]:
    """The components of a tuple or interval with powers or factorials: reading an interval compares its ends, so they are checked first."""
    if "," not in text or not _GROWS.search(text):
        return []
    found, depth, start = [], 0, 0
    for mark in re.finditer(r"[{(\[})\],;]|\\cup", text):
        cut = mark[0] in ",;" or mark[0] == r"\cup"
        depth -= mark[0] in "})]"
        if depth == 0 or (depth == 1 and cut):
            found.append(text[start : mark.start()])
            start = mark.end()
        depth += mark[0] in "{(["
    return [p for p in (*found, text[start:]) if _GROWS.search(p)]


def of_expression(expression: Basic | MatrixBase) -> str | None:
    """The limit that evaluating, expanding or comparing the expression would pass, as a phrase; None where it is small."""
    try:
        _Walk().bound(expression, 0, {})
    except _PassedError as passed:
        return str(passed)
    except (OverflowError, ValueError, RecursionError):  # float arithmetic on the bounds themselves ran out of range
        return f"a number of more than {MAX_BITS} bits"
    return None


def form_only(expression: Basic | MatrixBase) -> str | None:
    """Names what in the expression is compared by its form because evaluating it may take for ever; None where there is nothing."""
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, sympy.Derivative | sympy.Integral):
            return f"an unevaluated {type(node).__name__.lower()}"
        if isinstance(node, sympy.Sum | sympy.Product) and not all(x.is_number and x.is_finite for bounds in node.limits for x in bounds[1:]):
            return f"a {type(node).__name__.lower()} without finite bounds"
    return None


def is_solvable(expression: Basic | MatrixBase) -> bool:
    """Equations and inequalities between small polynomials, such as 1/2 <= x < 8 and x^2 + y^2 = 4: sympy solves them at once."""
    nodes = list(sympy.preorder_traversal(expression))
    powers = [n for n in nodes if isinstance(n, sympy.Pow)]
    kinds = Relational | sympy.And | sympy.Add | sympy.Mul | sympy.Pow | sympy.Number | sympy.Symbol
    plain = all(isinstance(n, kinds) for n in nodes if n.args or n.is_Symbol)
    low = all(isinstance(n.exp, sympy.Integer) and abs(int(n.exp)) <= 4 for n in powers)
    return plain and low and len(nodes) <= 60 and any(isinstance(n, Relational) for n in nodes)


class _PassedError(Exception):
    """A limit is passed; its text says which."""


class _Bound(NamedTuple):
    """Upper bounds on the value of a node: log2 |value|, log2(numerator * denominator), monomials when expanded, degree."""

    mag: float = 2.0
    size: float = 4.0
    terms: float = 1.0
    degree: float = 0.0


class _Walk:
    """One pass over a tree, the leaves first; raises _PassedError at the first node that is too large."""

    def __init__(self) -> None:
        self.nodes = self.functions = self.roots = self.sets = 0

    def bound(self, node: Basic | MatrixBase, depth: int, given: dict[Basic, _Bound]) -> _Bound:
        self.nodes += 1
        if depth > MAX_DEPTH:
            raise _PassedError(f"an expression more than {MAX_DEPTH} levels deep")
        if self.nodes > MAX_NODES:
            raise _PassedError(f"more than {MAX_NODES} parts")
        found = self._bound(node, depth, given)
        if found.size > MAX_BITS:
            raise _PassedError(f"a number of more than {MAX_BITS} bits")
        most = MAX_FUNCTION_TERMS if self.functions else MAX_TERMS
        if found.terms > most or found.degree > most:
            raise _PassedError(f"more than {most} terms, or a degree above it, when expanded")
        return found

    def _bound(self, node: Basic | MatrixBase, depth: int, given: dict[Basic, _Bound]) -> _Bound:
        if isinstance(node, sympy.Rational):
            p, q = abs(int(node.p)).bit_length(), int(node.q).bit_length()
            return _Bound(float(p - q + 1), float(p + q))
        if isinstance(node, sympy.Float):
            _, _, exponent, bits = node._mpf_
            return _Bound(float(exponent + bits), float(abs(exponent) + bits))
        if isinstance(node, sympy.Symbol):
            return given.get(node, _Bound(0.0, 1.0, 1.0, 1.0))
        if isinstance(node, sympy.Sum | sympy.Product):
            return self._run(node, depth, given)
        if isinstance(node, MatrixBase):
            return _joined([self.bound(x, depth + 1, given) for x in node.flat()])
        parts = [self.bound(x, depth + 1, given) for x in node.args]
        if not parts:
            return _Bound()
        if isinstance(node, sympy.Add | sympy.MatAdd):
            return _added(parts)
        if isinstance(node, sympy.Mul | sympy.MatMul):
            mag, size = sum(p.mag for p in parts), sum(p.size for p in parts)
            return _Bound(mag, size, math.prod(p.terms for p in parts), sum(p.degree for p in parts))
        if isinstance(node, sympy.Pow | sympy.MatPow | sympy.exp):
            return self._power(node, parts)
        if isinstance(node, sympy.Set):
            self.sets += not isinstance(node, sympy.FiniteSet | sympy.Interval) and len(parts)
            if self.sets > MAX_SETS:
                raise _PassedError(f"more than {MAX_SETS} joined sets")
        elif isinstance(node, sympy.Function):
            return self._function(node, parts)
        return _joined(parts)

    def _power(self, node: Basic, parts: list[_Bound]) -> _Bound:
        base, exponent = (sympy.E, node.args[0]) if isinstance(node, sympy.exp) else node.args
        b, e = (_Bound(), parts[0]) if isinstance(node, sympy.exp) else parts
        times = float(abs(exponent)) if isinstance(exponent, sympy.Rational) else 2.0 ** min(e.mag, 1000.0)
        of_matrix = isinstance(base, MatrixBase) or base.has(MatrixBase)
        if of_matrix and (not isinstance(exponent, sympy.Integer) or times > (4 if base.free_symbols else MAX_RUN)):
            raise _PassedError("a root, or a high or symbolic power of a matrix")
        whole = isinstance(exponent, sympy.Integer) and exponent >= 0
        if isinstance(exponent, sympy.Rational) and not isinstance(exponent, sympy.Integer):
            self.roots += 1
            if self.roots > MAX_ROOTS:
                raise _PassedError(f"more than {MAX_ROOTS} roots")
        mag = times * (max(b.mag, 0.0) if whole else b.size)
        size = max(times, 1.0) * b.size
        if e.degree:  # 2^{n + 1000} is expanded; values are bounded for variables up to 1, near where they are compared
            return _Bound(times * max(b.mag, 1.0), size, 1.0, 1.0)
        if b.degree == 0 and b.terms == 1:
            return _Bound(mag, size)
        # a base of t monomials to the n-th power has C(n + t - 1, t - 1) of them
        count = math.exp(math.lgamma(times + b.terms) - math.lgamma(b.terms) - math.lgamma(times + 1)) if times >= 2 else b.terms
        return _Bound(mag, size, max(1.0, count), max(times, 1.0) * b.degree)

    def _function(self, node: Basic, parts: list[_Bound]) -> _Bound:
        joined = _joined(parts)
        combinatorial = isinstance(node, sympy.factorial | sympy.factorial2 | sympy.binomial | sympy.gamma)
        if joined.degree:
            self.functions += 2 if combinatorial else 1
            if self.functions > MAX_FUNCTIONS:
                raise _PassedError(f"more than {MAX_FUNCTIONS} functions of variables")
        if combinatorial:
            count = 2.0 ** min(max(p.mag for p in parts), 1000.0)
            size = count * math.log2(count + 2)
            return _Bound(size, size, 1.0, joined.degree and joined.degree + count)
        if isinstance(node, sympy.floor | sympy.ceiling | sympy.Abs | sympy.Mod | sympy.Max | sympy.Min):
            return _Bound(joined.mag, max(joined.size, joined.mag), 1.0, joined.degree)
        return _Bound(max(2.0, math.log2(max(2.0, joined.mag)) + 2), 8.0, 1.0, joined.degree and 1.0)

    def _run(self, node: Basic, depth: int, given: dict[Basic, _Bound]) -> _Bound:
        body, *limits = node.args
        count = 1.0
        for variable, *ends in limits:  # type: ignore[misc]
            mag = max((self.bound(end, depth + 1, given).mag for end in ends), default=1.0)
            given = {**given, variable: _Bound(mag, max(mag, 1.0))}
            count *= 2.0 ** min(mag, 1000.0)
        if count > MAX_RUN * 2 and not form_only(node):
            raise _PassedError(f"a sum or product of more than {MAX_RUN} terms")
        inner = self.bound(body, depth + 1, given)
        if form_only(node):  # never evaluated
            return inner
        return _Bound(count * max(inner.mag, 1.0), count * inner.size, inner.terms * (count if inner.degree else 1), inner.degree)


def _added(parts: list[_Bound]) -> _Bound:
    exact = all(p.degree == 0 and p.terms == 1 for p in parts)
    size = sum(p.size for p in parts) + len(parts)
    terms = sum(p.terms for p in parts)
    return _Bound(max(p.mag for p in parts) + math.log2(len(parts)), size, 1.0 if exact and size < 64 else terms, max(p.degree for p in parts))


def _joined(parts: list[_Bound]) -> _Bound:
    if not parts:
        return _Bound()
    return _Bound(max(p.mag for p in parts), max(p.size for p in parts), max(p.terms for p in parts), max(p.degree for p in parts))
