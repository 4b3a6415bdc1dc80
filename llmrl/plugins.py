"""References to plug-ins: text in a recipe becomes a factory, its keyword signature the schema of its keys. The only import magic.

A reference is a bare name (`grpo`: looked up in the package `home`), `pkg.mod:obj`, or `./file.py:obj` (relative to `base`, the
recipe's folder). `trl:REF` wraps a TRL-style reward function: `llmrl.rewards.trl:trl(ref=REF, base=base, ...)`.
A factory that has a keyword `base: Path` is handed `base`; that keyword is not a recipe key.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from llmrl.records import InputError

REQUIRED = inspect.Parameter.empty
"""Stands for "no default" in what `signature_of` returns."""
_TRL = "trl:"


# ---------------------------------------------------------------- reference -> factory


def resolve(ref: str, *, home: str, base: Path) -> Callable[..., Any]:
    """The factory that `ref` names. Raises InputError: nothing there (with the nearest name), or its file fails to import."""
    if ref.startswith(_TRL):
        return functools.partial(resolve("llmrl.rewards.trl:trl", home=home, base=base), ref=ref.removeprefix(_TRL))
    if ":" not in ref and not _is_file(ref):
        return _from_home(ref, home)
    module_ref, _, name = ref.rpartition(":") if ":" in ref else (ref, "", "")
    module = _load_file(ref, _path_of(ref, base)) if _is_file(module_ref) else _import(ref, module_ref)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if name and callable(found):
        return found
    what = f'has no "{name}"' if found is None else f'holds "{name}", which is no function'
    there = sorted(n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__ and n[0] != "_")
    what = what if name else "names no function in it"
    raise InputError(f'plug-in "{ref}": {module_ref} {what}; write "{module_ref}:NAME"{_hint(name, there)}')


def source_file(ref: str, *, home: str, base: Path) -> Path:
    """The file that holds the code of `ref`; for `trl:REF` the file of REF."""
    ref = ref.removeprefix(_TRL)
    if _is_file(ref.rpartition(":")[0] or ref):
        return _path_of(ref, base)
    found = inspect.unwrap(resolve(ref, home=home, base=base))
    while isinstance(found, functools.partial):
        found = found.func
    file = getattr(sys.modules.get(getattr(found, "__module__", "")), "__file__", None)
    if file is None:
        raise InputError(f'plug-in "{ref}": it has no source file, so a run cannot record what it ran; wrap it in a function of your own')
    return Path(file).resolve()


def source_hash(ref: str, *, home: str, base: Path) -> str:
    """sha256 (hex) of the plug-in's source file: kept in the run manifest, so that an edited plug-in shows."""
    return hashlib.sha256(source_file(ref, home=home, base=base).read_bytes()).hexdigest()


def available(home: str, *, any_signature: bool = False) -> dict[str, list[str]]:
    """name -> modules of `home` that define a factory of that name: public, top level, keyword arguments only. Imports none of them.

    any_signature: helpers with positional arguments too.
    """
    found: dict[str, list[str]] = {}
    for module, file in _modules(home):
        for node in ast.parse(file.read_bytes(), str(file)).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            if any_signature or not (node.args.args or node.args.posonlyargs or node.args.vararg):
                found.setdefault(node.name, []).append(module)
    return found


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None when none is alike."""
    names = list(names)
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
    parts = set(name.lower().split("_")) - {""}
    return close[0] if close else next((n for n in names if parts & set(n.split("_"))), None)


def _hint(name: str, names: Iterable[str]) -> str:
    names = list(names)
    close = nearest(name, names)
    return (f'; nearest: "{close}"' if close else "") + (f"; there are: {', '.join(names)}" if names else "; there are none")


def _is_file(ref: str) -> bool:
    return ref.startswith(("./", "../", "/", "~")) or ref.endswith(".py")


def _path_of(ref: str, base: Path) -> Path:
    left, _, right = ref.rpartition(":")
    return (base / Path(left or right).expanduser()).resolve()


def _modules(home: str) -> list[tuple[str, Path]]:
    """(module, file) of `home`: a package, a module, or those modules of a package that a pattern fits ("llmrl.*_engine")."""
    if "*" in home:
        return [(name, file) for name, file in _modules(home.rpartition(".")[0]) if fnmatch.fnmatchcase(name, home)]
    spec = importlib.util.find_spec(home)
    if spec is None or spec.origin is None:
        raise InputError(f"no package {home}: llmrl is not installed whole; install it again")
    own = (home, Path(spec.origin))
    if spec.submodule_search_locations is None:
        return [own]
    inside = pkgutil.iter_modules(list(spec.submodule_search_locations))
    files = ((f"{home}.{m.name}", Path(getattr(m.module_finder, "path", "")) / f"{m.name}.py") for m in inside if not m.ispkg)
    return [own, *((name, file) for name, file in files if file.is_file())]


def _from_home(name: str, home: str) -> Callable[..., Any]:
    if name.isidentifier() and f"{home}.{name}" in (module for module, _ in _modules(home)):
        found = getattr(_import(name, f"{home}.{name}"), name, None)
        if callable(found):
            return found
    factories = available(home)
    there = factories if name in factories else available(home, any_signature=True)
    if name not in there:
        mend = 'own code is written "./file.py:NAME" or "package.module:NAME"'
        raise InputError(f'plug-in "{name}": {home} has none of that name{_hint(name, sorted(factories))} ({mend})')
    if len(there[name]) > 1:
        raise InputError(f'plug-in "{name}": in several modules; write one of {", ".join(f"{m}:{name}" for m in there[name])}')
    return getattr(_import(name, there[name][0]), name)


def _import(ref: str, module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as exc:
        if exc.name is None or not f"{module}.".startswith(f"{exc.name}."):
            raise _import_error(ref, exc, None) from exc
        mend = 'install its package, or write "./file.py:NAME" for a file beside the recipe'
        raise InputError(f'plug-in "{ref}": no module named "{exc.name}"; {mend}') from exc
    except (Exception, SystemExit) as exc:
        raise _import_error(ref, exc, None) from exc


class _FreshLoader(SourceFileLoader):
    """Compiles from the source each time: a cached .pyc is matched by whole seconds and size, too coarse for a file under edit."""

    def get_code(self, fullname: str) -> types.CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _load_file(ref: str, path: Path) -> types.ModuleType:
    if not path.is_file():
        beside = sorted(f"{p.name}" for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise InputError(f'plug-in "{ref}": no file {path}{_hint(path.name, beside)} (paths are relative to the recipe\'s folder)')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"llmrl_file_{hashlib.sha256(str(path).encode()).hexdigest()[:16]}"
    if name in sys.modules and getattr(sys.modules[name], "__llmrl_sha256__", None) == digest:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path, loader=_FreshLoader(name, str(path)))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution: dataclasses and typing look their module up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        del sys.modules[name]
        raise _import_error(ref, exc, path) from exc
    vars(module)["__llmrl_sha256__"] = digest
    return module


def _import_error(ref: str, exc: BaseException, path: Path | None) -> InputError:
    """Names the line of the plug-in's own file; without a file of its own, the innermost line."""
    frames = [(f.filename, f.lineno) for f in traceback.extract_tb(exc.__traceback__) if "importlib" not in f.filename]
    at = [f for f in frames if path is None or Path(f[0]) == path] or frames
    if isinstance(exc, SyntaxError) and exc.filename:
        at = [(exc.filename, exc.lineno)]
    mend = "; install that package" if isinstance(exc, ModuleNotFoundError) else ""
    where = f"{at[-1][0]}, line {at[-1][1]}" if at else str(path)
    return InputError(f'plug-in "{ref}" fails when imported, at {where}: {type(exc).__name__}: {exc}{mend}')


# ---------------------------------------------------------------- keys -> call


def signature_of(factory: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """name -> (annotation, default) of every key a recipe may give; the default is REQUIRED where there is none."""
    return {name: (note, default) for name, (note, default, kind) in _parameters(factory).items() if kind != "base" and kind != "rest"}


def use(ref: str, kwargs: Mapping[str, Any], *, home: str, base: Path, where: str) -> Any:
    """Resolve `ref`, check `kwargs` against its signature, call it. Raises InputError, each line of it starting with `where`.

    A ValueError or ImportError of the factory itself is passed on as InputError.
    """
    try:
        factory = resolve(ref, home=home, base=base)
    except InputError as exc:
        raise InputError(f"{where}: {exc}") from exc
    checked, problems = check(factory, kwargs, name=ref)
    if problems:
        raise InputError("\n".join(f"{where}: {message}" for _, message in problems))
    if _parameters(factory).get("base", (None, None, ""))[2] == "base":
        checked["base"] = base
    try:
        return factory(**checked)
    except (ValueError, ImportError) as exc:
        raise InputError(f"{where}: {ref}({', '.join(f'{k}={v!r}' for k, v in kwargs.items())}) refuses: {exc}") from exc


def check(factory: Callable[..., Any], kwargs: Mapping[str, Any], *, name: str) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """(`kwargs` converted, problems as (key, message)). `name` is what the messages call the factory.

    Strict, but for an int where a float is wanted and for what TOML cannot write: an array for a tuple or set, a string for a path.
    """
    known = signature_of(factory)
    rest = next((note for note, _, kind in _parameters(factory).values() if kind == "rest"), None)
    checked: dict[str, Any] = {}
    problems: list[tuple[str, str]] = []
    for key, value in kwargs.items():
        if key not in known and rest is None:
            problems.append((key, f'unknown key "{key}" for {name}{_hint(key, known)}'))
            continue
        note = known[key][0] if key in known else rest
        try:
            checked[key] = convert(note, value)
        except ValidationError as exc:
            got = f"got {value!r} ({type(value).__name__}), expected {inspect.formatannotation(note)}"
            problems.append((key, f'key "{key}" of {name}: {got}: {exc.errors()[0]["msg"]}'))
    missing = [key for key, (_, default) in known.items() if default is REQUIRED and key not in kwargs]
    for key in missing:
        expected = f"expected {inspect.formatannotation(known[key][0])}"
        problems.append((key, f'missing key "{key}" for {name}, {expected}{_mistaken(missing) if key == missing[-1] else ""}'))
    return checked, problems


def convert(annotation: Any, value: Any) -> Any:
    """`value` as `annotation`, strictly. Raises pydantic.ValidationError."""
    adapter = _adapter(annotation)
    if _is_plain(value):  # JSON strictness is TOML's: an array may be a tuple, but "8" is no int and 1.0 no int either
        return adapter.validate_json(json.dumps(value), strict=True)
    return adapter.validate_python(value, strict=True)


def _adapter(annotation: Any) -> TypeAdapter[Any]:
    if getattr(annotation, "_is_protocol", False):  # isinstance cannot see a signature
        annotation = Any
    try:
        return TypeAdapter(annotation)
    except PydanticUserError:
        pass
    try:
        return TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except SchemaError:  # a protocol inside, as in `Verifier | None`
        return TypeAdapter(Any)


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _mistaken(missing: list[str]) -> str:
    if missing == ["prompt", "response"]:
        return " (this looks like a verifier; name a factory: a function that takes the recipe's keys and returns the verifier)"
    if "completions" in missing:
        return ' (this looks like a TRL reward function; write "trl:" before the reference)'
    return ""


def _parameters(factory: Callable[..., Any]) -> dict[str, tuple[Any, Any, str]]:
    """name -> (annotation, default, kind); kind is "key", "base" (handed over by `use`) or "rest" (**kwargs)."""
    bound = factory.keywords if isinstance(factory, functools.partial) else {}
    inner = inspect.unwrap(factory.func if isinstance(factory, functools.partial) else factory)
    scope = getattr(inner, "__globals__", None) or vars(sys.modules.get(inner.__module__, types.ModuleType("none")))
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError as exc:
        raise InputError(f"{factory!r} tells no signature, so its keys cannot be checked; wrap it in a function of your own") from exc
    found = {}
    for name, p in parameters.items():
        if name in bound or p.kind is p.VAR_POSITIONAL:
            continue
        note = _annotation(p.annotation, scope)
        kind = "rest" if p.kind is p.VAR_KEYWORD else "base" if name == "base" and note is Path else "key"
        found[name] = (note, p.default, kind)
    return found


def _annotation(note: Any, scope: dict[str, Any]) -> Any:
    """The type behind an annotation; Any where there is none, or where it is only imported for type checkers."""
    if note is inspect.Parameter.empty:
        return Any
    if not isinstance(note, str):
        return note
    carrier = types.FunctionType((lambda: None).__code__, scope)
    carrier.__annotations__ = {"it": note}
    try:
        return typing.get_type_hints(carrier, include_extras=True)["it"]
    except (NameError, AttributeError, TypeError):
        return Any
