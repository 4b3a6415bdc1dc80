import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import pytest
from pydantic import Field

from llmrl import plugins
from llmrl.records import InputError

REPO = Path(__file__).parents[1]

UNITS = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
if TYPE_CHECKING:
    from nowhere import Unknown

@dataclass
class Settings:
    low: float = 0.0
    high: float = 1.0

def units(*, tolerance: float = 1e-6, digits: int | None = None, mode: Literal["strict", "loose"] = "strict",
          span: tuple[float, float] = (0.0, 1.0), settings: Settings | None = None, other: Unknown = None):
    return dict(tolerance=tolerance, digits=digits, mode=mode, span=span, settings=settings)

def needs(*, gold: str, weight: float): return gold, weight
def placed(*, base: Path, name: str = "x"): return base / name
def number(*, base: int = 10): return base
def picky(*, low: float = 0.1):
    if low < 0: raise ValueError("low must be >= 0")
    return low
def anything(*, first: int = 1, **rest: float): return first, rest
def verifier(prompt, response): ...
def trl_reward(prompts, completions, **columns): ...
class Box:
    def __init__(self, *, size: int = 1): self.size = size
    @staticmethod
    def make(*, size: int = 2): return size
constant = 3
"""


@pytest.fixture
def use(tmp_path):
    (tmp_path / "units.py").write_text(UNITS)

    def call(ref: str, home: str = "llmrl.rewards", **kwargs: Any) -> Any:
        return plugins.use(ref, kwargs, home=home, base=tmp_path, where="a.toml [verifier]")

    return call


def refused(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kwargs)
    return str(caught.value)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package with three modules, as llmrl/rules is one: a family, a module of its factory's name, and one that must stay unimported."""
    package = tmp_path / "site" / "house"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "family.py").write_text(
        "def eldest(*, n: int = 1): return 'eldest', n\ndef youngest(*, n: int = 2): return 'youngest', n\ndef twin(): return 1\n"
        "def helper(x): return x\ndef _private(): ...\n"
    )
    (package / "alone.py").write_text("def alone(n: int = 3): return 'alone', n\ndef twin(): return 2\n")
    (package / "broken.py").write_text("raise RuntimeError('imported for nothing')\ndef never(): ...\n")
    monkeypatch.syspath_prepend(package.parent)
    yield "house"
    for name in [n for n in sys.modules if n == "house" or n.startswith("house.")]:
        del sys.modules[name]


def test_a_bare_name_is_a_module_of_that_name_or_a_function_in_any_module(use, house):
    assert use("alone", home=house) == ("alone", 3)
    assert use("youngest", home=house, n=5) == ("youngest", 5)
    assert "house.broken" not in sys.modules  # found by reading, not by importing


def test_a_bare_name_that_is_not_there_or_there_twice(use, house):
    message = refused(use, "yongest", home=house)
    assert message.startswith('a.toml [verifier]: plug-in "yongest": house has none of that name; nearest: "youngest"')
    assert "there are: eldest, never, twin, youngest" in message and "helper" not in message
    assert "./file.py:NAME" in message
    message = refused(use, "twin", home=house)
    assert "house.alone:twin" in message and "house.family:twin" in message


def test_a_module_can_be_home_itself(use, house):
    assert use("eldest", home="house.family") == ("eldest", 1)
    assert 'nearest: "eldest"' in refused(use, "eldst", home="house.family")


def test_a_pattern_can_be_home(use, house):
    assert use("twin", home="house.fam*") == 1  # the other twin is outside
    assert "there are: eldest, twin, youngest" in refused(use, "alone", home="house.fam*")


def test_a_module_that_raises_is_named_with_its_line(use, house):
    message = refused(use, "never", home=house)
    assert "broken.py, line 1: RuntimeError: imported for nothing" in message


def test_module_references(use, house):
    assert use("house.family:eldest", n=4) == ("eldest", 4)
    assert 'house.family has no "eldes"' in (message := refused(use, "house.family:eldes")) and 'nearest: "eldest"' in message
    assert 'no module named "nowhere"' in (message := refused(use, "nowhere.at.all:f")) and "./file.py:NAME" in message
    assert 'no module named "house.famly"' in refused(use, "house.famly:eldest")


def test_file_references(use, tmp_path):
    assert use("./units.py:units", tolerance=0.5)["tolerance"] == 0.5
    assert use(f"{tmp_path}/units.py:number") == 10
    assert use("./units.py:Box", size=4).size == 4
    assert use("./units.py:Box.make", size=5) == 5
    assert str(tmp_path) not in sys.path
    assert not (tmp_path / "__pycache__").exists()


def test_a_file_or_name_that_is_not_there(use, tmp_path):
    message = refused(use, "./unit.py:units")
    assert f"no file {tmp_path}/unit.py" in message and 'nearest: "units.py"' in message
    assert 'has no "unit"; write "./units.py:NAME"; nearest: "units"' in refused(use, "./units.py:unit")
    assert "names no function in it" in (message := refused(use, "./units.py")) and "units, needs, placed" not in message
    assert "there are: Box, Settings, anything, needs" in message
    assert '"constant", which is no function' in refused(use, "./units.py:constant")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\n\nx = 1 / 0\n", "bad.py, line 3: ZeroDivisionError: division by zero"),
        ("def f(:\n    pass\n", "bad.py, line 1: SyntaxError"),
        ("import not_there_at_all\n", "bad.py, line 1: ModuleNotFoundError: No module named 'not_there_at_all'; install that package"),
        ("import json\nV = json.loads('{')\n", "bad.py, line 2: JSONDecodeError"),  # the plug-in's line, not json's
        ("import sys\nsys.exit(3)\n", "bad.py, line 2: SystemExit: 3"),
    ],
)
def test_a_file_that_raises_at_import(use, tmp_path, text, expected):
    (tmp_path / "bad.py").write_text(text)
    message = refused(use, "./bad.py:f")
    assert message.startswith('a.toml [verifier]: plug-in "./bad.py:f" fails when imported, at ') and expected in message
    (tmp_path / "bad.py").write_text("def f(): return 7\n")
    assert use("./bad.py:f") == 7  # nothing of the failure stays behind


def test_a_file_is_loaded_once_and_again_when_it_changes(use, tmp_path):
    (tmp_path / "state.py").write_text("seen = []\ndef f(): seen.append(1); return len(seen)\n")
    assert [use("./state.py:f"), use(f"{tmp_path}/state.py:f")] == [1, 2]
    (tmp_path / "state.py").write_text("seen = []\ndef f(): seen.append(2); return sum(seen)\n")  # same size, same second
    assert use("./state.py:f") == 2


def test_two_files_of_one_name_do_not_meet(use, tmp_path):
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"def f(): return {value}\n")
    assert [use("./a/same.py:f"), use("./b/same.py:f")] == [1, 2]


def test_the_same_reference_works_in_a_fresh_process(use, tmp_path):
    code = (
        "import sys; from pathlib import Path; from llmrl import plugins\n"
        f"base = Path({str(tmp_path)!r})\n"
        "print(plugins.use('./units.py:units', {'digits': 3}, home='llmrl.rewards', base=base, where='x')['digits'])\n"
        "print(plugins.resolve('./units.py:units', home='x', base=base).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    own = plugins.resolve("./units.py:units", home="x", base=tmp_path).__module__
    assert done.stdout.split() == ["3", own]


def test_unknown_keys_name_the_nearest(use):
    message = refused(use, "./units.py:units", tolerence=1e-3, mode="strict")
    assert message.startswith('a.toml [verifier]: unknown key "tolerence" for ./units.py:units; nearest: "tolerance"')
    assert "there are: tolerance, digits, mode, span, settings, other" in message


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("digits", "3", "got '3' (str), expected int | None: Input should be a valid integer"),
        ("digits", True, "got True (bool), expected int | None"),
        ("digits", 3.0, "got 3.0 (float), expected int | None"),
        ("tolerance", "1e-3", "got '1e-3' (str), expected float: Input should be a valid number"),
        ("tolerance", False, "got False (bool), expected float"),
        ("mode", "strickt", "expected Literal['strict', 'loose']: Input should be 'strict' or 'loose'"),
        ("span", [1.0], "got [1.0] (list), expected tuple[float, float]"),
    ],
)
def test_wrong_types_name_key_got_and_expected(use, key, value, expected):
    message = refused(use, "./units.py:units", **{key: value})
    assert message.startswith(f'a.toml [verifier]: key "{key}" of ./units.py:units: ') and expected in message


def test_what_toml_can_write_is_converted(use):
    made = use("./units.py:units", tolerance=1, span=[0, 2], settings={"low": -1})
    assert made["tolerance"] == 1.0 and isinstance(made["tolerance"], float)
    assert made["span"] == (0.0, 2.0) and made["settings"].low == -1.0
    assert use("./units.py:units", other=object)["digits"] is None  # its annotation exists for type checkers only
    assert use("./units.py:anything", first=2, second=3) == (2, {"second": 3.0})
    assert '"second"' in refused(use, "./units.py:anything", second="x")


def test_every_problem_is_listed(use):
    lines = refused(use, "./units.py:needs", wieght=1.0, gold=3).split("\n")
    assert len(lines) == 3 and all(line.startswith("a.toml [verifier]: ") for line in lines)
    assert 'nearest: "weight"' in lines[0] and 'key "gold"' in lines[1]
    assert 'missing key "weight" for ./units.py:needs, expected float' in lines[2]


def test_a_verifier_or_reward_function_given_as_a_factory(use):
    assert "looks like a verifier; name a factory" in refused(use, "./units.py:verifier")
    assert 'write "trl:" before the reference' in refused(use, "./units.py:trl_reward")


def test_a_keyword_base_of_type_path_is_the_recipes_folder(use, tmp_path):
    assert use("./units.py:placed", name="y") == tmp_path / "y"
    assert list(plugins.signature_of(plugins.resolve("./units.py:placed", home="x", base=tmp_path))) == ["name"]
    assert 'unknown key "base"' in refused(use, "./units.py:placed", base="z")
    assert use("./units.py:number", base=16) == 16  # another type: an ordinary key


def test_a_value_error_of_the_factory_is_a_refused_input(use):
    assert refused(use, "./units.py:picky", low=-1) == "a.toml [verifier]: ./units.py:picky(low=-1) refuses: low must be >= 0"


def test_trl_prefix_is_a_factory_call(tmp_path, monkeypatch):
    def trl(*, ref: str, base: Path, weight: float = 1.0) -> tuple[str, Path, float]:
        return ref, base, weight

    plain = plugins.resolve

    def resolve(ref: str, **kw: Any) -> Any:
        return trl if ref == "llmrl.rewards.trl:trl" else plain(ref, **kw)

    monkeypatch.setattr(plugins, "resolve", resolve)
    factory = plain("trl:./r.py:f", home="llmrl.rewards", base=tmp_path)
    assert plugins.signature_of(factory) == {"weight": (float, 1.0)}
    monkeypatch.setattr(plugins, "resolve", lambda ref, **kw: factory)
    assert plugins.use("trl:./r.py:f", {"weight": 2}, home="llmrl.rewards", base=tmp_path, where="x") == ("./r.py:f", tmp_path, 2.0)


def test_signature_of():
    class Judge(Protocol):
        def __call__(self, text: str) -> float: ...

    def factory(*, must: int, low: Annotated[float, Field(gt=0)] = 0.2, how: Literal["a"] = "a", judge: Judge | None = None, bare=1): ...

    found = plugins.signature_of(factory)
    assert found["must"] == (int, plugins.REQUIRED) and found["bare"] == (Any, 1)
    assert [default for _, default in found.values()][1:] == [0.2, "a", None, 1]
    _, problems = plugins.check(factory, {"must": 1, "low": -0.5, "judge": None}, name="factory")
    assert [key for key, _ in problems] == ["low"] and "greater than 0" in problems[0][1]


def test_source_hash_is_of_the_file(use, tmp_path):
    import hashlib

    expected = hashlib.sha256((tmp_path / "units.py").read_bytes()).hexdigest()
    assert plugins.source_hash("./units.py:units", home="x", base=tmp_path) == expected
    assert plugins.source_hash("trl:./units.py:trl_reward", home="x", base=tmp_path) == expected
    here = hashlib.sha256((REPO / "llmrl" / "plugins.py").read_bytes()).hexdigest()
    assert plugins.source_hash("llmrl.plugins:nearest", home="x", base=tmp_path) == here
    assert "no source file" in refused(plugins.source_hash, "builtins:abs", home="x", base=tmp_path)


def test_builtin_factories_can_be_read():
    """Every rule and verifier that ships is found by name and has a signature of keywords."""
    for home in ("llmrl.rules", "llmrl.rewards", "llmrl.*_engine"):
        for name, modules in plugins.available(home).items():
            if len(modules) == 1:
                factory = plugins.resolve(name, home=home, base=REPO)
                assert callable(factory) and factory.__name__ == name
                assert isinstance(plugins.signature_of(factory), dict)
