"""Symbolic comparison of two LaTeX answers, and the killable processes it runs in.

A worker must start quickly and keep little memory: this module imports neither torch nor rlvr.types, and lives outside
``rlvr.rewards`` because that package's ``__init__`` does. math-verify parses (its latex2sympy2_extended) and must call
two expressions equal; that is then checked here, numerically and relative to the size of the numbers, because it also
takes all tiny magnitudes for equal and rounds to six decimals.
"""

from __future__ import annotations

import atexit
import logging
import os
import random
import signal
import sys
import threading
from multiprocessing import get_context
from typing import Any

from pebble import ProcessPool

MEMORY_BYTES = 2 << 30  # address space a worker may add to what it has after its imports
START_S = 120.0  # limit on starting a pool; generous, for slow disks
POINTS = 4  # places where two expressions in variables must agree
DIGITS = 1200  # cancellation is followed so far before a difference counts as zero

_pools: dict[int, ProcessPool] = {}
_lock = threading.Lock()


class Unreadable(ValueError):
    """The parser does not understand this text."""


# --- in the parent ---------------------------------------------------------------------------------------------------


def pool(workers: int) -> ProcessPool:
    """This process's pool of that many workers, started if needed; safe from any thread and after a fork.

    Raises RuntimeError when no worker comes up.
    """
    with _lock:
        current = _pools.get(workers)
        if current is not None and current.active:
            return current
        if current is not None:  # broken by a worker that died while idle
            current.stop()
            current.join()
        # The workers ignore SIGINT (Ctrl-C reaches the whole group); a dead parent closes their pipe, which ends them.
        current = ProcessPool(max_workers=workers, initializer=start, context=get_context("spawn"))
        error = current.schedule(ready).exception(timeout=START_S)
        if error is not None:
            raise RuntimeError(f"the maths workers did not start: {error!r}") from error
        _pools[workers] = current
        return current


def close() -> None:
    """Stop every worker of this process; the next use starts new ones."""
    with _lock:
        for current in _pools.values():
            current.stop()
            current.join()
        _pools.clear()


def _forget() -> None:
    """After a fork the threads that serve the pools do not exist: start afresh, with a lock nobody holds."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


atexit.register(close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# --- in the worker ---------------------------------------------------------------------------------------------------


def start() -> None:
    """Import the parser before any clock runs, then bound the memory."""
    import math_verify  # noqa: F401  (the import is the point)

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own alarms are off, as they must be
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))


def ready() -> bool:
    return True


def compare(pairs: list[tuple[str, str]]) -> list[tuple[bool, str]]:
    """For each (answer, gold): are they the same, and why. Anything but an unreadable text raises."""
    results = []
    for answer, gold in pairs:
        try:
            results.append(_same(answer, gold))
        except Unreadable as error:
            results.append((False, str(error)))
    return results


def read(text: str, is_real: bool) -> Any:
    """``text`` as a sympy object, as a whole or not at all; decimals become exact fractions."""
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Basic, FiniteSet, Float, I, Rational

    exact = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    try:
        value = latex2sympy(text, is_real=is_real, normalization_config=None, conversion_config=exact)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the parser's syntax errors are plain Exceptions, unsupported commands AttributeErrors
        raise Unreadable(f"not understood: {text[:60]!r} ({type(error).__name__})") from error
    if isinstance(value, Basic):
        value = value.xreplace({number: Rational(str(number)) for number in value.atoms(Float)})
        if isinstance(value, FiniteSet) and len(value) == 1:  # braces that only group are read as a set
            (value,) = value.args
        if not is_real:  # the parser leaves a symbol called i
            value = value.xreplace({symbol: I for symbol in value.free_symbols if symbol.name == "i"})
    return value


def _same(answer: str, gold: str) -> tuple[bool, str]:
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex
    from sympy import And, Expr, MatrixBase, Set
    from sympy.core.relational import Relational

    is_real = not should_treat_as_complex(f"{answer} {gold}")
    g, a = read(gold, is_real), read(answer, is_real)
    if isinstance(a, Expr) and isinstance(g, Expr):
        # No limit here: math-verify's is an alarm, which only a main thread may set; the pool has its own.
        return verify(g, a, timeout_seconds=None) and same_expr(a, g), "compared as expressions"
    if isinstance(a, (Relational, And)) and isinstance(g, (Relational, And)):
        return same_relations(_relations(a), _relations(g)), "compared as relations"
    if isinstance(a, MatrixBase) and isinstance(g, MatrixBase):
        equal = a.shape == g.shape and all(same_expr(x, y) for x, y in zip(a.flat(), g.flat(), strict=True))
        return equal, "compared as matrices"
    if isinstance(a, Set) and isinstance(g, Set):
        return bool(a == g), "compared as sets"
    return False, f"{type(a).__name__} against {type(g).__name__}"


def same_expr(a: Any, g: Any) -> bool:
    """Do two expressions agree wherever looked? Exact where there is nothing to substitute.

    Free symbols get rational values of both signs. Steps and absolute values may agree at a few places by chance, so
    those must also simplify to zero; so must what cannot be evaluated (an unknown f(x)).
    """
    from sympy import Abs, Mod, Piecewise, ceiling, floor, nan, oo, sign, simplify, zoo

    if any(x.has(nan, zoo) for x in (a, g)):
        return False
    if any(x.has(oo, -oo) for x in (a, g)):
        return bool(a.doit() == g.doit())
    for values in _points(a, g):
        zero = _is_zero(_at(a, values) - _at(g, values))
        if zero is False:
            return False
        if zero is None:
            return simplify(a - g) == 0
    if (a.free_symbols or g.free_symbols) and any(x.has(floor, ceiling, Mod, Abs, sign, Piecewise) for x in (a, g)):
        return simplify(a - g) == 0
    return True


def _points(*expressions: Any) -> list[dict[str, Any]]:
    """Values by name (the same name may be two sympy symbols): all positive, all negative, then mixed."""
    from sympy import Rational

    names = sorted({symbol.name for x in expressions for symbol in x.free_symbols})
    rng = random.Random("rlvr")
    draws = [[Rational(rng.randint(20, 400), 101) for _ in names] for _ in range(POINTS if names else 1)]
    signs = [[1 if i == 0 else -1 if i == 1 else rng.choice((-1, 1)) for _ in names] for i in range(len(draws))]
    return [{n: s * v for n, v, s in zip(names, d, t, strict=True)} for d, t in zip(draws, signs, strict=True)]


def _at(x: Any, values: dict[str, Any]) -> Any:
    return x.subs({symbol: values[symbol.name] for symbol in x.free_symbols}).doit()


def _is_zero(difference: Any) -> bool | None:
    """Whether a constant is zero, following cancellation to DIGITS digits; None where sympy cannot evaluate it."""
    from sympy import nan, zoo

    value = difference.evalf(15, maxn=DIGITS)
    if not value.is_number or value.has(nan, zoo):
        return None
    parts = value.as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in parts):
        return None
    # evalf marks a number of which no digit survived the cancellation with precision 1.
    return all(part == 0 or (part.is_Float and part._prec == 1) for part in parts)


def _relations(x: Any) -> list[tuple[str, Any]]:
    """The links of a chain as (kind, difference): ``difference`` = 0, != 0, < 0 or <= 0."""
    from sympy import And

    links = []
    for link in x._unsorted_args if isinstance(x, And) else [x]:
        kind = link.rel_op
        flip = kind in (">", ">=")
        links.append((kind.replace(">", "<"), link.rhs - link.lhs if flip else link.lhs - link.rhs))
    return links


def same_relations(a: list[tuple[str, Any]], g: list[tuple[str, Any]]) -> bool:
    """Same links in the same order or, as in 1 < x < 2 and 2 > x > 1, all reversed; each up to a constant factor."""
    if len(a) != len(g):
        return False
    return any(all(_same_link(x, y) for x, y in zip(order, g, strict=True)) for order in (a, a[::-1]))


def _same_link(a: tuple[str, Any], g: tuple[str, Any]) -> bool:
    names = [{symbol.name for symbol in x.free_symbols} for _, x in (a, g)]
    if a[0] != g[0] or names[0] != names[1] or not names[0]:
        return False
    values = _points(a[1], g[1])[0]
    bottom = _at(g[1], values)
    if _is_zero(bottom) is not False:
        return False
    factor = _at(a[1], values) / bottom
    if _is_zero(factor) is not False or ("<" in a[0] and not factor.is_positive):
        return False
    return same_expr(a[1], factor * g[1])
