"""The checker of `code_exec`: runs the row's tests in a sandbox of its own, with stand-ins for the program's functions.

Whatever the candidate says is data about its own values: it is decoded into plain builtin values, and every other object is a `Handle`,
equal to itself only. So no method that the program defines ever runs here. The verifier's process is told in JSON lines:
["ready"], ["program", why it cannot be run], ["test", passed, detail], ["broken", what is wrong with the row's own code], ["done"].
Sent as compiled code (see `sandbox.py`): standard library and `code_values` alone.
"""

from __future__ import annotations

import _ast  # ast itself would cost 5 ms a start
import builtins
import json
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from llmrl.rewards.code_values import TEXT_MAX, Foreign, Gone, decode, encode, receive, send, text_of


class ProgramError(Exception):
    """An exception of the program whose type is no builtin one."""


class Handle:
    """An object of the program; it equals itself only. What it can do is asked of the candidate and comes back as plain values or handles.

    `x in handle` goes through its items and compares here, and its methods are out of reach unless the row's tests are about objects:
    else f(1).startswith("expected") would tell an object in a string's place what is expected, and ask it for the verdict.
    """

    __slots__ = ("_number", "_remote")

    def __init__(self, remote: _Remote, number: int) -> None:
        object.__setattr__(self, "_remote", remote)
        object.__setattr__(self, "_number", number)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.call(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not self._remote.objects:  # copy, pickle and isinstance look for the former
            raise AttributeError(f"the test reads .{name} of an object of the program; tests about objects need objects = true")
        return self._remote.ask("attr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._remote.objects:
            raise AttributeError(f"the test sets .{name} of an object of the program; tests about objects need objects = true")
        self._remote.ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = self._remote.ask("iter", self)
        if isinstance(iterator, Handle):
            while (step := self._remote.ask("next", iterator))[0]:
                yield step[1]
        else:
            yield from iterator

    def __next__(self) -> Any:
        more, value = self._remote.ask("next", self)
        if not more:
            raise StopIteration
        return value

    def __len__(self) -> int:
        return self._remote.ask("len", self)

    def __getitem__(self, key: Any) -> Any:
        return self._remote.ask("item", self, key)

    def __bool__(self) -> bool:
        return self._remote.ask("true", self)

    def __repr__(self) -> str:
        return "<an object of the program>"


class _Remote:
    """The candidate, as the checker sees it."""

    def __init__(self, peer: int, objects: bool) -> None:
        self.peer, self.objects, self.count, self.lost = peer, objects, 0, ""
        self.handles: dict[int, Handle] = {}

    def hello(self) -> None:
        self._take(0)

    def get(self, name: str) -> Any:
        return self._decode(self._request({"do": "get", "of": name})["ok"])

    def ask(self, what: str, of: Handle, *args: Any) -> Any:
        return self._decode(self._request({"do": what, "of": self._encode(of), "args": self._encode(list(args))})["ok"])

    def call(self, of: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = {k: self._encode(v) for k, v in kwargs.items()}
        packed = {"of": self._encode(of), "args": self._encode(list(args)), "kwargs": named}
        reply = self._request({"do": "call", "back": self.objects, **packed})
        if "args" in reply and self.objects:
            after = self._decode(reply["args"])
            for old, new in zip(args, after if type(after) is list else [], strict=False):
                _overwrite(old, new)
        return self._decode(reply["ok"])

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        self.count += 1
        try:
            send(self.peer, {"id": self.count, **message})
        except OSError:
            self._lose("the program ended")
        return self._take(self.count)

    def _take(self, number: int) -> dict[str, Any]:
        """The answer to request `number`; re-raises the program's exception."""
        if self.lost:
            raise Gone(self.lost)
        try:
            reply = receive(self.peer)
            if type(reply) is not dict or reply.get("id") != number:
                raise ValueError("it answers another request")
            if "err" in reply:
                name, text = (str(part)[:TEXT_MAX] for part in reply["err"])
            elif "ok" in reply:
                return reply
            else:
                raise ValueError("neither value nor exception")
        except Gone as error:
            self._lose(str(error))
        except (ValueError, TypeError, RecursionError, MemoryError) as error:
            self._lose(f"what the program's process sent is no answer ({text_of(error)})")
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                error = kind(text)
            except TypeError:  # UnicodeDecodeError wants five arguments
                error = ProgramError(f"{name}: {text}")
            raise error
        raise ProgramError(f"{name}: {text}")

    def _lose(self, why: str) -> Any:
        self.lost = self.lost or why
        raise Gone(self.lost)

    def _encode(self, value: Any) -> Any:
        def other(value: Any) -> Any:
            if type(value) is Handle:
                return {"h": object.__getattribute__(value, "_number")}
            name = getattr(value, "__name__", "")
            if type(name) is str and getattr(builtins, name, None) is value:
                return {"g": name}
            raise Foreign(f"the test hands the program an object of type {type(value).__name__}; only plain data can cross")

        return encode(value, other)

    def _decode(self, data: Any) -> Any:
        def handle(data: Any) -> Handle:
            number = data["h"]
            if type(number) is not int:
                raise ValueError("no such object")
            return self.handles.setdefault(number, Handle(self, number))

        try:
            return decode(data, handle)
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError) as error:
            return self._lose(f"what the program's process sent is no value ({text_of(error)})")


def _overwrite(old: Any, new: Any) -> None:
    """Gives a list, dict or set of the test's what the call has made of it. Where tests are not about that, a program could empty the
    input of `assert f(xs) == sorted(xs)`, and its own output."""
    if type(old) is not type(new):
        return
    if type(old) is list:
        old[:] = new
    elif type(old) in (dict, set):
        old.clear()
        old.update(new)


def main(job: dict[str, Any], fds: dict[str, int]) -> int:
    """Reads the row's code, waits for the program, runs test after test; the exit code of the process."""

    def say(*message: Any) -> None:
        os.write(fds["report"], json.dumps(message).encode() + b"\n")

    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)  # nobody reads what tests print
    scope: dict[str, Any] = {"__name__": "tests"}
    remote = _Remote(fds["peer"], job["objects"])
    try:
        _define(job, scope)
        tests = _compiled(job["tests"], scope)
    except BaseException as error:
        say("broken", f"{type(error).__name__}: {text_of(error)}")
        return 0
    try:
        remote.hello()
    except Exception as error:
        say("program", text_of(error) if isinstance(error, Gone | ProgramError) else f"{type(error).__name__}: {text_of(error)}")
        return 0
    say("ready")
    for test, code in tests:
        try:
            passed, why = _one(test, code, scope, remote), "it does not hold"
        except Foreign as error:
            say("broken", text_of(error))
            return 0
        except BaseException as error:
            passed, why = False, (f"{type(error).__name__}: {text_of(error)}" if text_of(error) else type(error).__name__)
        if remote.lost:  # a test that expects an exception must not take the program's end for one
            passed, why = False, remote.lost
        say("test", bool(passed), "" if passed else f"{why} in {test.get('code', test.get('call', ''))[:200]}")
        if not passed and job["first_failure_ends"]:
            break
    say("done")
    return 0


def _define(job: dict[str, Any], scope: dict[str, Any]) -> None:
    """Runs the row's own code that comes before any call of the program."""
    for part in job["define"]:
        try:
            exec(compile(part["code"], "<tests>", "exec", dont_inherit=True), scope)  # in the sandbox: running it is what this process is for
        except BaseException:
            if part["needed"]:
                raise
    if job["needs"] and not callable(scope.get(job["needs"])):
        raise NameError(f"the test code defines no {job['needs']}(candidate)")


def _compiled(tests: list[dict[str, Any]], scope: dict[str, Any]) -> list[tuple[dict[str, Any], types.CodeType | None]]:
    """The tests with their code, and with the names that stand for the program's functions and values."""
    trees: list[Any] = [compile(t["code"], "<test>", "exec", _ast.PyCF_ONLY_AST, True) if "code" in t else None for t in tests]
    loaded = [None if tree is None or "names" in t else _loaded(tree, scope) for t, tree in zip(tests, trees, strict=True)]
    if loaded and all(names is not None and not names[0] for names in loaded):
        # All that these tests name is builtin, so one of those must be what is tested: the first that each of them calls.
        loaded = [names and (names[1][:1], []) for names in loaded]
    found = []
    for test, tree, names in zip(tests, trees, loaded, strict=True):
        test = test if names is None else test | {"names": names[0]}
        found.append((test, None if tree is None else compile(tree, "<test>", "exec", dont_inherit=True)))
    return found


def _loaded(tree: Any, scope: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(names of the program's, names of builtins that are called, first one first). Modules of the standard library are imported: they,
    and builtins, are always the checker's own, whatever the program makes of them."""
    names, called, bound, modules = [], [], set(), set()
    todo = [tree]
    while todo:
        node = todo.pop(0)
        if isinstance(node, _ast.Name):
            (names.append if isinstance(node.ctx, _ast.Load) else bound.add)(node.id)
        elif isinstance(node, _ast.arg):
            bound.add(node.arg)
        elif isinstance(node, _ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, _ast.FunctionDef | _ast.ClassDef | _ast.ExceptHandler):
            bound.add(node.name)
        elif isinstance(node, _ast.Call) and isinstance(node.func, _ast.Name):
            called.append(node.func.id)
        elif isinstance(node, _ast.Attribute) and isinstance(node.value, _ast.Name):
            modules.add(node.value.id)
        for field in node._fields:
            part = getattr(node, field, None)
            todo += [n for n in (part if isinstance(part, list) else [part]) if isinstance(n, _ast.AST)]
    free = [n for n in dict.fromkeys(names) if n not in bound and n not in scope]
    for name in modules.intersection(free, sys.stdlib_module_names):
        scope[name] = __import__(name)
    return [n for n in free if n not in scope and not hasattr(builtins, n)], [n for n in called if hasattr(builtins, n)]


def _one(test: dict[str, Any], code: types.CodeType | None, scope: dict[str, Any], remote: _Remote) -> bool:
    if code is not None:
        scope |= {name: remote.get(name) for name in test["names"]}
        exec(code, scope)  # in the sandbox: running it is what this process is for
        return True
    kwargs = {k: decode(v, lambda _: None) for k, v in test["kwargs"].items()}
    args, wanted = (decode(test[key], lambda _: None) for key in ("args", "returns"))
    found = remote.call(remote.get(test["call"]), tuple(args), kwargs)
    return bool(_as_json(found) == _as_json(wanted))


def _as_json(value: Any) -> Any:
    """Tuples as lists: a row that comes from JSON cannot tell them apart."""
    if type(value) in (list, tuple):
        return [_as_json(v) for v in value]
    return {k: _as_json(v) for k, v in value.items()} if type(value) is dict else value
