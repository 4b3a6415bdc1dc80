"""Loads a recipe: TOML file + dotted overrides -> a checked, frozen `Recipe`, with the origin of every value.

A file path that starts with `./` or `../` is relative to the recipe's folder (in an override: to the working directory);
`run.dir` is relative to the working directory. Every problem found is listed in one InputError: file, line, dotted key, mend.

`extends = "other.toml"` (first key, relative to this file) begins with another recipe: keys given here replace its keys, and a section given here
with another `use` replaces its whole section, whose keywords were meant for another plug-in.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from llmrl import plugins
from llmrl.recipe import (
    Batch,
    Checkpoint,
    Checks,
    Data,
    EnginePlugin,
    EnvironmentPlugin,
    Eval,
    Model,
    Optim,
    Plugin,
    Recipe,
    Rollout,
    RulePlugin,
    Run,
    Scoring,
    Tiny,
    WarmStart,
)
from llmrl.records import InputError

__all__ = [
    "HOMES",
    "Batch",
    "Checkpoint",
    "Checks",
    "Data",
    "EnginePlugin",
    "EnvironmentPlugin",
    "Eval",
    "LoadedRecipe",
    "Model",
    "Optim",
    "Plugin",
    "Recipe",
    "Rollout",
    "RulePlugin",
    "Run",
    "Scoring",
    "Tiny",
    "WarmStart",
    "check_plugins",
    "leaves",
    "load_recipe",
    "load_sections",
]

Origin = Literal["default", "file", "override"]
Line = tuple[Path, int]
M = TypeVar("M", bound=BaseModel)

HOMES = {"engine": "llmrl.*_engine", "rule": "llmrl.rules", "verifier": "llmrl.rewards", "environment": "llmrl.environments"}
"""Where the bare names of the plug-in sections are looked up."""
_PATHS = ("model.path", "model.chat_template", "data.path", "eval.data.path", "warm_start.data.path")


@dataclass(frozen=True)
class LoadedRecipe:
    recipe: Recipe
    origins: dict[str, Origin]
    """Dotted key of every resolved value -> where it is from. Defaults of plug-in factories are not in it: see `resolved`."""
    path: Path
    base: Path
    """The recipe's folder: what `./` means in it."""
    lines: dict[str, Line]
    """Dotted key -> the file it stands in, and its line there."""

    def where(self, key: str) -> str:
        """The start of an error message about `key`, e.g. "recipes/a.toml, line 7: rule"."""
        return _where(self.path, self.lines, {k for k, o in self.origins.items() if o == "override"}, key)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> LoadedRecipe:
    """Read, override, check. Raises one InputError with a line for every problem. Plug-ins are not imported: see `check_plugins`."""
    return LoadedRecipe(*load_sections(Recipe, path, overrides, _PATHS, _cross_checks))


def load_sections(
    kind: type[M], path: str | Path, overrides: Iterable[str], paths: Iterable[str], cross: Callable[[M], list[tuple[str, str]]] = lambda recipe: []
) -> tuple[M, dict[str, Origin], Path, Path, dict[str, Line]]:
    """What `LoadedRecipe` holds, of any recipe model with a section [run]: checked as `load_recipe` says.

    paths: dotted keys whose values are file paths where they look like one. cross: (key, message) of every problem between sections.
    """
    path = Path(path)
    base = path.resolve().parent
    tree, lines = _tree(path, paths)
    origins: dict[str, Origin] = {key: "file" for key, _ in leaves(tree)}
    overridden: set[str] = set()
    problems: list[str] = []
    for override in overrides:
        try:
            key, value = _override(tree, override, paths)
        except InputError as exc:
            problems.append(str(exc))
            continue
        overridden.add(key)
        origins = {k: o for k, o in origins.items() if not _within(k, {key})}
        origins |= {k: "override" for k, _ in leaves({key: value})} if value is not None else {}
    if isinstance(run := tree.setdefault("run", {}), dict):
        run.setdefault("dir", f"runs/{path.stem}")
    found = list(_missing_files(tree, paths))
    try:
        # JSON strictness is TOML's: an array may become a tuple and 1 a float, but "8" is no int
        recipe = kind.model_validate_json(json.dumps(tree, default=str), strict=True)
        found += cross(recipe)
    except ValidationError as exc:
        recipe = None
        found += [_explain(dict(e), overridden, kind) for e in exc.errors()]
    problems += [f"{_where(path, lines, overridden, key)}: {message}" for key, message in found]
    if recipe is None or problems:
        raise InputError("\n".join(problems))
    return recipe, {k: origins.get(k, "default") for k, _ in leaves(recipe.model_dump())}, path, base, lines


def check_plugins(loaded: LoadedRecipe) -> None:
    """Resolve the plug-ins and check their keys; nothing is built. Raises one InputError with a line for every problem.

    A rule whose factory has the attribute `min_group` says how many samples a prompt it needs; without it, 2.
    """
    problems = []
    for section, home in HOMES.items():
        plugin = getattr(loaded.recipe, section)
        if plugin is None:
            continue
        try:
            factory = plugins.resolve(plugin.use, home=home, base=loaded.base)
        except InputError as exc:
            problems.append(f"{loaded.where(f'{section}.use')}: {exc}")
            continue
        _, found = plugins.check(factory, plugin.kwargs, name=plugin.use)
        problems += [f"{loaded.where(f'{section}.{key}')}: {message}" for key, message in found]
        reserved = set(type(plugin).model_fields) & set(plugins.signature_of(factory))
        problems += [f'{loaded.where(f"{section}.use")}: {plugin.use} has a keyword "{k}", a key of [{section}] itself; rename it' for k in sorted(reserved)]
        least = getattr(factory, "min_group", 2) if section == "rule" else 1
        if loaded.recipe.rollout.group < least:
            message = f"{plugin.use} compares the samples of a prompt: group must be {least} or more, not {loaded.recipe.rollout.group}"
            problems.append(f"{loaded.where('rollout.group')}: {message}")
    problems += _composed(loaded)
    if problems:
        raise InputError("\n".join(problems))


def _composed(loaded: LoadedRecipe) -> Iterator[str]:
    """Problems of what [rule] plugs in beside `use`."""
    from llmrl.compose import RULES, parts

    try:
        found = parts(loaded.recipe.rule)
    except InputError as exc:
        yield f"{loaded.where('rule.credit')}: {exc}"
        return
    for key, part, home in found:
        where = f"{loaded.where('rule.' + key.split('[')[0])} ({key})"
        try:
            factory = plugins.resolve(part.use, home=home, base=loaded.base)
        except InputError as exc:
            yield f"{where}: {exc}"
            continue
        yield from (f"{where}: {message}" for _, message in plugins.check(factory, part.kwargs, name=part.use)[1])
        least = getattr(factory, "min_group", 2) if home == RULES else 1
        if loaded.recipe.rollout.group < least:
            yield f"{where}: {part.use} compares the samples of a prompt: rollout.group must be {least} or more, not {loaded.recipe.rollout.group}"


def _read(path: Path) -> str:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        close = plugins.nearest(path.name, there)
        raise InputError(f"{path}: no such recipe" + (f'; nearest: "{path.with_name(close)}"' if close else ""))
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as exc:
        raise InputError(f"{path}: not UTF-8 text, as TOML must be: {exc}") from exc


def _tree(path: Path, paths: Iterable[str], below: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Line]]:
    """The file as a table, file paths in it absolute, over the one that it extends; and where each key stands."""
    text = _read(path)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InputError(f"{path}: not valid TOML: {exc}") from exc
    lines: dict[str, Line] = {key: (path, line) for key, line in _lines(text).items()}
    _anchor(tree, path.resolve().parent, paths if not below else (*paths, *(f"{section}.use" for section in HOMES)))
    parent = tree.pop("extends", None)
    if parent is None:
        return tree, lines
    if not isinstance(parent, str):
        raise InputError(f'{path}, line {lines["extends"][1]}: extends: got {parent!r}, expected the path of a recipe, e.g. "../quickstart.toml"')
    chain = (*below, path.resolve())
    file = path.parent / parent
    if file.resolve() in chain:
        raise InputError(f"{path}: extends {parent}, which extends it in turn: {' -> '.join(p.name for p in (*chain, file.resolve()))}")
    under, theirs = _tree(file, paths, chain)
    _merge(under, tree)
    return under, {**theirs, **lines}


def _merge(under: dict[str, Any], over: dict[str, Any]) -> None:
    """Puts `over` on `under`, in place."""
    for key, value in over.items():
        there = under.get(key)
        if not isinstance(value, dict) or not isinstance(there, dict) or value.get("use", there.get("use")) != there.get("use"):
            under[key] = value
        else:
            _merge(there, value)


def _override(tree: dict[str, Any], override: str, paths: Iterable[str]) -> tuple[str, Any]:
    """Put `a.b=value` into the tree; returns key and value. A value that is no TOML is a string: quotes rarely survive a shell.

    `a.b=` takes the key, or the whole section, out of the file: back to the default.
    """
    key, equals, text = override.partition("=")
    *sections, name = key.strip().split(".")
    if not equals or not all([*sections, name]):
        raise InputError(f"override {override!r}: expected KEY=VALUE, e.g. optim.lr=1e-5")
    at, own = tree, {}
    part = own
    for depth, section in enumerate(sections):
        at, part = at.setdefault(section, {}), part.setdefault(section, {})
        if not isinstance(at, dict):
            raise InputError(f"override {override!r}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    if not text.strip():
        if name not in at:
            raise InputError(f"override {override!r}: takes {key.strip()} out of the file, which has no such key")
        del at[name]
        return key.strip(), None
    try:
        parsed = tomllib.loads(f"it = {text}")
        part[name] = parsed["it"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        part[name] = text
    _anchor(own, Path.cwd(), (*paths, *(f"{section}.use" for section in HOMES)))
    at[name] = part[name]
    return ".".join([*sections, name]), part[name]


def _parent(tree: Any, dotted: str) -> tuple[dict[str, Any], str]:
    """The table that holds the key, empty where there is none, and the key's last part."""
    *sections, name = dotted.split(".")
    for section in sections:
        tree = tree.get(section) if isinstance(tree, dict) else None
    return (tree if isinstance(tree, dict) else {}), name


def _split_ref(value: str) -> tuple[str, str]:
    """ "./gen.py:make" -> ("./gen.py", ":make"); a plain path -> (path, "")."""
    found = re.fullmatch(r"(.+\.py)(:[\w.]+)", value)
    return (found[1], found[2]) if found else (value, "")


def _anchor(tree: dict[str, Any], base: Path, keys: Iterable[str]) -> None:
    """Make the file paths among these keys absolute, in place. Other strings are names: a Hub id, "tiny", a plug-in."""
    for key in keys:
        table, name = _parent(tree, key)
        value = table.get(name)
        prefix = "trl:" if isinstance(value, str) and value.startswith("trl:") else ""
        if isinstance(value, str) and (value.startswith((f"{prefix}./", f"{prefix}../", f"{prefix}~")) or name == "chat_template"):
            file, obj = _split_ref(value.removeprefix(prefix))
            table[name] = f"{prefix}{(base / Path(file).expanduser()).resolve()}{obj}"


def _missing_files(tree: dict[str, Any], paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    for key in paths:
        table, name = _parent(tree, key)
        value = table.get(name)
        if not isinstance(value, str) or not value.startswith("/") or "*" in value:
            continue
        file = Path(_split_ref(value)[0])
        if not file.exists():
            close = plugins.nearest(file.name, sorted(p.name for p in file.parent.iterdir())) if file.parent.is_dir() else None
            yield key, f"no file {file}" + (f'; nearest: "{close}"' if close else "")


def _cross_checks(recipe: Recipe) -> list[tuple[str, str]]:
    found = []
    data, tiny = recipe.data, recipe.model.tiny
    if recipe.eval.data is None and data.holdout == 0:
        found.append(("data.holdout", "no rows to evaluate on; set data.holdout to a number of rows, or give [eval.data]"))
    if data.limit is not None and data.holdout >= data.limit:
        found.append(("data.holdout", f"{data.holdout} of {data.limit} rows leave none to train on; lower it or raise data.limit"))
    if recipe.batch.minibatches > recipe.rollout.prompts:
        message = f"{recipe.batch.minibatches} minibatches of {recipe.rollout.prompts} prompts; it can be rollout.prompts at most"
        found.append(("batch.minibatches", message))
    for key, optim, steps in [("", recipe.optim, recipe.steps)] + ([("warm_start.", w.optim, w.steps)] if (w := recipe.warm_start) else []):
        if optim.warmup_steps > steps:
            found.append((f"{key}optim.warmup_steps", f"{optim.warmup_steps} warm-up steps but {key}steps is {steps}; lower it"))
    if tiny is not None and recipe.model.path != "tiny":
        found.append(("model.tiny", f'goes with model.path = "tiny" only, and model.path is "{recipe.model.path}"; remove one'))
    elif tiny is not None and (tiny.hidden % tiny.heads or (tiny.hidden // tiny.heads) % 2):
        found.append(("model.tiny.hidden", f"hidden {tiny.hidden} must be an even multiple of heads {tiny.heads}"))
    elif tiny is not None and tiny.heads % (tiny.kv_heads or 1):
        found.append(("model.tiny.kv_heads", f"heads {tiny.heads} must be a multiple of kv_heads {tiny.kv_heads}"))
    return found


# ---------------------------------------------------------------- messages


def _where(path: Path, lines: Mapping[str, Line], overridden: Iterable[str], key: str) -> str:
    if _within(key, overridden):
        return f"override {key}"
    parts = key.split(".")
    near = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    found = next((lines[k] for k in near if k in lines), None)
    return f"{path}: {key}" if found is None else f"{found[0]}, line {found[1]}: {key}"


def _explain(error: dict[str, Any], overridden: set[str], root: type[BaseModel]) -> tuple[str, str]:
    """(dotted key, message) of one pydantic error."""
    loc = [part for part in error["loc"] if part != "[key]"]
    key, kind = ".".join(map(str, loc)), error["type"]
    siblings = _fields(_model_at(loc[:-1], root))
    if kind == "extra_forbidden":
        close = plugins.nearest(str(loc[-1]), siblings)
        return key, "unknown key" + (f'; nearest: "{close}"' if close else "") + f"; valid keys: {', '.join(siblings)}"
    if kind == "missing":
        inside = _model_at(loc, root)
        needs = [n for n, f in inside.model_fields.items() if f.is_required()] if inside else []
        mend = f"add a section [{key}] with {', '.join(needs)}" if needs else f"add {loc[-1]} = ..."
        field = siblings.get(str(loc[-1]))
        return key, f"missing; {mend}" + (f" ({field.description})" if field and field.description and not needs else "")
    if kind in ("model_type", "model_attributes_type") or (kind == "dict_type" and _model_at(loc, root)):
        return key, f"got {error['input']!r}, expected a section [{key}]"
    got = error["input"]
    message = f"got {got!r} ({type(got).__name__}): {error['msg'].removeprefix('Value error, ')}"
    if kind == "string_type" and _within(key, overridden):
        message += f"; to give a string write {key}='\"{got}\"'"
    return key, message


def _model_at(loc: Iterable[Any], root: type[BaseModel]) -> type[BaseModel] | None:
    model: type[BaseModel] | None = root
    for part in loc:
        field = model.model_fields.get(str(part)) if model else None
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []
        model = next((k for k in kinds if inspect.isclass(k) and issubclass(k, BaseModel)), None)
    return model


def _fields(model: type[BaseModel] | None) -> dict[str, Any]:
    return dict(model.model_fields) if model else {}


def _within(key: str, keys: Iterable[str]) -> bool:
    """Is `key` one of `keys`, or below one of them?"""
    return any(key == k or key.startswith(f"{k}.") for k in keys)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a nested table."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _lines(text: str) -> dict[str, int]:
    """Dotted key -> line, by a scan for headers and keys at the start of a line. tomllib keeps no positions."""
    found: dict[str, int] = {}
    section, quote = "", None
    for number, line in enumerate(text.splitlines(), 1):
        inside = quote
        for mark in re.findall(r'"""|\'\'\'', line):
            quote = mark if quote is None else None if mark == quote else quote
        if inside:
            continue
        if header := re.match(r"\s*\[\[?\s*([^\]#]+?)\s*\]", line):
            section = re.sub(r"[\s\"']", "", header[1])
            found.setdefault(section, number)
        elif key := re.match(r"\s*([\w\-.\"']+(?:\s*\.\s*[\w\-\"']+)*)\s*=", line):
            name = re.sub(r"[\s\"']", "", key[1])
            found.setdefault(f"{section}.{name}" if section else name, number)
    return found
