"""The candidate of `code_exec`: runs the response's program in its sandbox, and answers what the checker asks of it.

    {"id": n, "do": "get" | "call" | "attr" | "set" | "iter" | "next" | "len" | "item" | "true", "of": ..., "args": [...]}
    -> {"id": n, "ok": value}, with "args" after the call where "back" asks for them, or {"id": n, "err": [type name, text]}

The program shares this process and may do anything to it; so nothing here is trusted, and nothing here knows what is expected.
Sent as compiled code (see `sandbox.py`): standard library and `code_values` alone.
"""

from __future__ import annotations

import _ast  # ast itself would cost 5 ms a start
import builtins
import os
import sys
import types
from collections.abc import Callable
from typing import Any

from llmrl.rewards.code_values import decode, encode, receive, send, text_of


def main(job: dict[str, Any], fds: dict[str, int]) -> int | None:
    """Plays the role that the job names; the exit code of the process."""
    if job["role"] == "main":
        return _run_main(job)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    _serve(job, fds["peer"])
    os._exit(0)


def _compiled(job: dict[str, Any]) -> types.CodeType:
    """The first of the job's sources that compiles and defines what it must. Raises the error of the first."""
    first: BaseException | None = None
    for source in job["sources"]:
        try:
            code = compile(source, "<program>", "exec", dont_inherit=True)
            tree = compile(source, "<program>", "exec", _ast.PyCF_ONLY_AST, True) if job["defines"] else None
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            first = first or error
            continue
        if tree is None or job["defines"] in _defined(tree):
            return code
        first = first or NameError(f"the program defines no {job['defines']!r}")
    raise first or SyntaxError("no program")


def _defined(tree: Any) -> set[str]:
    """Names that the module's own statements bind, those under `if` and `try` included; what stands inside functions and classes is not."""
    found: set[str] = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, _ast.FunctionDef | _ast.AsyncFunctionDef | _ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, _ast.alias):
            found.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, _ast.Name) and isinstance(node.ctx, _ast.Store):
            found.add(node.id)
        for name in node._fields:
            part = getattr(node, name, None)
            todo += [n for n in (part if isinstance(part, list) else [part]) if isinstance(n, _ast.AST)]
    return found


def _module(name: str) -> dict[str, Any]:
    """The namespace of a new module; dataclasses and typing look it up in sys.modules. Without `site`, exit() and quit() are missing."""
    import _sitebuiltins

    for word in ("exit", "quit"):
        setattr(builtins, word, _sitebuiltins.Quitter(word, "Ctrl-D"))
    sys.modules[name] = types.ModuleType(name)
    return vars(sys.modules[name])


def _run_main(job: dict[str, Any]) -> int | None:
    try:
        exec(_compiled(job), _module("__main__"))  # in the sandbox: running it is what this process is for
    except SystemExit:
        raise
    except BaseException as error:
        import traceback

        sys.stdout.flush()
        trace = error.__traceback__ and error.__traceback__.tb_next  # not our own frame
        sys.stderr.write("".join(traceback.format_exception(type(error), error, trace, limit=-3)))
        return 1
    return 0


def _serve(job: dict[str, Any], peer: int) -> None:
    """Loads the program, then answers the checker until it hangs up."""
    objects: list[Any] = []
    numbers: dict[int, int] = {}

    def other(value: Any) -> Any:
        if id(value) not in numbers:
            numbers[id(value)] = len(objects)
            objects.append(value)  # kept: an id belongs to one object only as long as that lives
        return {"h": numbers[id(value)]}

    def mine(data: Any) -> Any:
        return objects[data["h"]] if "h" in data else getattr(builtins, data["g"])

    try:
        scope = _module("program")
        if job["prefix"]:
            _try(job["prefix"], scope)
        exec(_compiled(job), scope)  # in the sandbox: running it is what this process is for
        for source in job["setup"]:
            exec(compile(source, "<setup>", "exec", dont_inherit=True), scope)  # in the sandbox: running it is what this process is for
        send(peer, {"id": 0, "ok": None})
    except BaseException as error:  # SystemExit too: a program that exits while it is loaded has no functions to call
        send(peer, {"id": 0, "err": [type(error).__name__, text_of(error)]})
        return
    while True:
        request = receive(peer)
        try:
            reply = _answer(request, scope, other, mine)
            send(peer, {"id": request["id"], **reply})
        except BaseException as error:
            send(peer, {"id": request["id"], "err": [type(error).__name__, text_of(error)]})


def _try(source: str, scope: dict[str, Any]) -> None:
    try:
        exec(compile(source, "<prompt>", "exec", dont_inherit=True), scope)  # in the sandbox: running it is what this process is for
    except Exception:  # what the prompt gives is a help only: the response's program may stand alone
        return


def _answer(request: dict[str, Any], scope: dict[str, Any], other: Callable[[Any], Any], mine: Callable[[Any], Any]) -> dict[str, Any]:
    if request["do"] == "get":
        if request["of"] not in scope:
            raise NameError(f"the program defines no {request['of']!r}")
        return {"ok": encode(scope[request["of"]], other)}
    of, args = decode(request["of"], mine), decode(request["args"], mine)
    kwargs = {k: decode(v, mine) for k, v in request.get("kwargs", {}).items()}
    match request["do"]:
        case "call":
            reply = {"ok": encode(of(*args, **kwargs), other)}
            return reply | {"args": encode(args, other)} if request["back"] else reply
        case "attr":
            value = getattr(of, args[0])
        case "set":
            value = setattr(of, args[0], args[1])
        case "iter":
            value = iter(of)
        case "next":
            try:
                value = (True, next(of))
            except StopIteration:
                value = (False, None)
        case "len":
            value = len(of)
        case "item":
            value = of[args[0]]
        case _:
            value = bool(of)
    return {"ok": encode(value, other)}
