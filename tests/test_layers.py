"""Imports point one way, and what needs no torch loads none."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
CORE = REPO / "llmrl"
PLUGINS = {"llmrl.records", "llmrl.plugins"}
"""What any layer may import: the contract, and the one way to reach a plug-in."""
ALLOWED = {
    "llmrl.environments": {*PLUGINS, "llmrl.environments", "llmrl.environment", "llmrl.tools"},
    "llmrl.rewards": {*PLUGINS, "llmrl.rewards", "llmrl.scoring"},  # scoring: selfcheck proves a verifier in real worker processes
    "llmrl.evaluation": {*PLUGINS, "llmrl.evaluation", "llmrl.engine", "llmrl.rewards"},
    "llmrl.rules": {*PLUGINS, "llmrl.rules", "llmrl.credit", "llmrl.losses", "llmrl.segment", "llmrl.rollout", "llmrl.templates"}
    | {"llmrl.transport", "llmrl.lm_transport"},  # what vgf does to samples; it works on token ids and a reward model, and knows no rule
}


def module_of(file: Path) -> str:
    """llmrl/x.py -> llmrl.x; the linked folders count under their import names."""
    name = ".".join(file.relative_to(REPO).with_suffix("").parts)
    return name.removesuffix(".__init__")


FOLDERS = (CORE, CORE / "rules", CORE / "environments", CORE / "rewards", CORE / "evaluation")
FILES = {module_of(f): f for folder in FOLDERS for f in sorted(folder.glob("*.py"))}


def is_typing_only(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(body: list[ast.stmt], *, inside_functions: bool) -> Iterator[ast.stmt]:
    """Every statement but those under `if TYPE_CHECKING:`."""
    for node in body:
        if is_typing_only(node):
            yield from statements(node.orelse, inside_functions=inside_functions)  # type: ignore[attr-defined]
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions:
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, field, []), inside_functions=inside_functions)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, inside_functions=inside_functions)


def imports(module: str, *, inside_functions: bool = True) -> set[str]:
    """The modules that `module` imports, as full names."""
    found = set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in statements(ast.parse(FILES[module].read_text()).body, inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{source}.{a.name}" if f"{source}.{a.name}" in FILES else source for a in node.names}
    return found


def ours(module: str, *, inside_functions: bool = True) -> set[str]:
    return {name for name in imports(module, inside_functions=inside_functions) if name.split(".")[0] == "llmrl"} - {"llmrl", module}


def within(name: str, layers: set[str]) -> bool:
    return any(name == layer or name.startswith(f"{layer}.") for layer in layers)


@pytest.mark.parametrize("layer", ALLOWED)
def test_plug_in_layers_import_only_what_the_design_allows(layer):
    wrong = {(m, n) for m in FILES if within(m, {layer}) for n in ours(m) if not within(n, ALLOWED[layer])}
    assert not wrong


def test_the_core_reaches_plug_ins_through_use_only():
    layers = set(ALLOWED)
    core = [m for m in FILES if not within(m, layers)]
    assert len(core) > 5
    wrong = {(m, n) for m in core for n in ours(m) if within(n, layers) and n != "llmrl.rules.base"}  # base: the Rule record itself
    assert not wrong


def test_imports_make_no_circle():
    graph = {m: ours(m, inside_functions=False) & set(FILES) for m in FILES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_records_stand_alone():
    assert not ours("llmrl.records")


TORCHLESS = "records recipe config plugins data scoring verify environment tools environments.calculator environments.guessing"


@pytest.mark.parametrize("names", [TORCHLESS, "rewards", "evaluation.traces"])
def test_no_torch(names):
    """In a fresh process: what verifier workers, data checks and `llmrl show` load comes without torch."""
    modules = [f"llmrl.{name}" for name in names.split()]
    if names == "rewards":
        modules = [m for m in FILES if within(m, {"llmrl.rewards"})]
    code = f"import importlib, sys\nfor m in {modules}:\n    importlib.import_module(m)\n    assert 'torch' not in sys.modules, m"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_house_is_flat_and_named():
    for name in ("utils", "common", "helpers", "misc"):
        assert not any(m.rpartition(".")[2] == name for m in FILES)
    assert not [f for f in CORE.rglob("*/*/*.py") if "__pycache__" not in f.parts]


def test_every_package_is_in_the_distribution():
    packages = set(tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert packages == {m for m, f in FILES.items() if f.name == "__init__.py"}
    for name in ("rewards", "evaluation"):
        assert (CORE / name).is_symlink() and (CORE / name).resolve() == REPO / name
