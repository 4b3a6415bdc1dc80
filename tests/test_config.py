import json
from pathlib import Path

import pytest

from llmrl import config
from llmrl.config import load_recipe
from llmrl.records import InputError
from llmrl.show import show

GOOD = """
seed = 3
steps = 90

[model]
path = "tiny"

[data]
path = "./rows.jsonl"
holdout = 20

[rollout]
group = 4
temperature = 1          # an int where a float is wanted

[verifier]
use = "./units.py:units"
tolerance = 1e-3
parts = [{ use = "exact", weight = 0.5 }]
"""


@pytest.fixture
def write(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "units.py").write_text("def units(*, tolerance: float = 1e-6, parts: list[dict] = [], digits: int = 7): ...\n")
    (tmp_path / "rules.py").write_text(
        "def ranked(*, low: float = 0.2, high: float = 0.28): ...\ndef lonely(*, scale: float = 1.0): ...\nlonely.min_group = 1\n"
    )

    def make(text: str = GOOD, name: str = "arith.toml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return make


def refused(path, overrides=(), call=load_recipe) -> list[str]:
    with pytest.raises(InputError) as caught:
        call(path, overrides)
    return str(caught.value).split("\n")


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0]


def test_values_defaults_and_origins(write, tmp_path):
    loaded = load_recipe(write(), ["optim.lr=2e-5", "rollout.group=16"])
    r = loaded.recipe
    assert (r.seed, r.steps, r.rollout.group, r.rollout.temperature, r.optim.lr) == (3, 90, 16, 1.0, 2e-5)
    assert r.data.path == str(tmp_path / "rows.jsonl")
    assert r.verifier.kwargs == {"tolerance": 1e-3, "parts": [{"use": "exact", "weight": 0.5}]}
    assert (r.engine.use, r.rule.use, r.run.dir, r.warm_start) == ("hf", "grpo", "runs/arith", None)
    assert r.model.tiny is not None and (r.model.tiny.hidden, r.model.tiny.layers, r.model.tiny.ffn) == (128, 3, 336)
    assert (r.optim.betas, r.batch.tokens, r.checkpoint.keep, r.scoring.timeout_s) == ((0.9, 0.99), 4096, 2, 10.0)
    o = loaded.origins
    assert (o["seed"], o["optim.lr"], o["rollout.group"], o["rollout.prompts"]) == ("file", "override", "override", "default")
    assert (o["verifier.tolerance"], o["run.dir"], o["model.tiny.hidden"]) == ("file", "default", "default")
    assert loaded.base == tmp_path
    assert loaded.where("verifier") == f"{loaded.path}, line 16: verifier"
    assert loaded.where("rollout.group") == "override rollout.group"


def test_the_resolved_recipe_loads_to_itself(write):
    r = load_recipe(write(), ["warm_start.steps=5", "eval.data={path='tiny'}"]).recipe
    assert config.Recipe.model_validate_json(r.model_dump_json(), strict=True) == r
    with pytest.raises(Exception, match="frozen"):
        r.steps = 4


def test_unknown_keys_name_file_line_key_and_nearest(write):
    path = write(GOOD.replace("group = 4", "gruop = 4"))
    line = only(refused(path))
    assert line.startswith(f'{path}, line 13: rollout.gruop: unknown key; nearest: "group"; valid keys: prompts, group, ')
    line = only(refused(write(GOOD + "\n[optimiser]\nlr = 1.0\n")))
    assert 'line 21: optimiser: unknown key; nearest: "optim"' in line and "checkpoint, checks" in line
    line = only(refused(write(GOOD.replace("holdout = 20", 'holdout = 20\ncolumns = { promt = "q" }'))))
    assert "line 11: data.columns.promt:" in line and "'prompt', 'answer', 'id', 'solution' or 'messages'" in line


def test_wrong_types_name_what_was_given_and_what_is_expected(write):
    path = write(GOOD.replace("steps = 90", 'steps = "90"'))
    assert only(refused(path)) == f"{path}, line 3: steps: got '90' (str): Input should be a valid integer"
    path = write(GOOD.replace("group = 4", "group = 4.0"))
    assert "line 13: rollout.group: got 4.0 (float): Input should be a valid integer" in only(refused(path))
    path = write(GOOD.replace("[rollout]\ngroup = 4", "[rollout]\nstop = [1]"))
    assert "line 13: rollout.stop.0: got 1 (int): Input should be a valid string" in only(refused(path))
    path = write(GOOD.replace('path = "tiny"', 'path = "tiny"\ndtype = "fp16"'))
    assert "line 7: model.dtype: got 'fp16' (str): Input should be 'float32' or 'bfloat16'" in only(refused(path))
    path = write("rollout = 3\n" + GOOD.replace("[rollout]\ngroup = 4\ntemperature = 1 ", "#"))
    assert only(refused(path)) == f"{path}, line 1: rollout: got 3, expected a section [rollout]"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "greater than 0"),
        ("rollout.group=0", "greater than 0"),
        ("rollout.temperature=0", "greater than 0"),
        ("rollout.temperature=nan", "finite number"),
        ("rollout.top_p=1.5", "less than or equal to 1"),
        ("rollout.min_p=1.0", "less than 1"),
        ("scoring.max_failure_rate=1.1", "less than or equal to 1"),
        ("optim.betas=[0.9, 1.0]", "less than 1"),
        ("optim.lr=0", "greater than 0"),
        ("data.holdout=-1", "greater than or equal to 0"),
        ("run.trackers=['mlflow']", "'tensorboard' or 'wandb'"),
        ("model.tiny.alphabet=aba", "distinct characters; twice in it: ['a']"),
        ("data.on_bad=ignore", "'refuse' or 'drop'"),
    ],
)
def test_limits(write, override, message):
    line = only(refused(write(), [override]))
    assert line.startswith(f"override {override.split('=')[0]}") and message in line


def test_missing_keys_and_sections_say_what_to_add(write):
    path = write("steps = 1\n[model]\ndtype = 'float32'\n[data]\npath = 'x'\nholdout = 1\n")
    lines = refused(path)
    assert lines[0].startswith(f"{path}, line 2: model.path: missing; add path = ... (A transformers folder")
    assert lines[1] == f"{path}: verifier: missing; add a section [verifier] with use"
    assert len(lines) == 2
    assert "steps: missing; add steps = ... (RL steps.)" in only(refused(write(GOOD.replace("steps = 90", ""))))


def test_every_problem_is_listed_at_once(write):
    path = write(GOOD.replace("seed = 3", "sed = 3").replace("group = 4", "group = 'four'").replace("./rows.jsonl", "./rowz.jsonl"))
    lines = refused(path, ["optim.rl=1", "nonsense"])
    assert len(lines) == 5
    text = "\n".join(lines)
    for part in ('line 2: sed: unknown key; nearest: "seed"', "line 13: rollout.group:", "line 9: data.path: no file"):
        assert part in text
    assert 'override optim.rl: unknown key; nearest: "lr"' in text
    assert "override 'nonsense': expected KEY=VALUE" in text


def test_missing_recipe_bad_toml_bad_text(write, tmp_path):
    path = write()
    assert only(refused(tmp_path / "arit.toml")) == f'{tmp_path}/arit.toml: no such recipe; nearest: "{path}"'
    assert only(refused(tmp_path / "no" / "x.toml")) == f"{tmp_path}/no/x.toml: no such recipe"
    bad = write("steps = 1\nseed =\n", "bad.toml")
    assert only(refused(bad)).startswith(f"{bad}: not valid TOML: Invalid value (at line 2, column 7)")
    (tmp_path / "latin.toml").write_bytes("# caf\u00e9\n".encode("latin-1"))
    assert "not UTF-8" in only(refused(tmp_path / "latin.toml"))


def test_files_are_relative_to_the_recipe_and_must_exist(write, tmp_path, monkeypatch):
    path = write(GOOD.replace("./rows.jsonl", "./rowz.jsonl"))
    assert only(refused(path)) == f'{path}, line 9: data.path: no file {tmp_path}/rowz.jsonl; nearest: "rows.jsonl"'
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mine.jsonl").write_text("")
    monkeypatch.chdir(other)
    loaded = load_recipe(path, ["data.path=./mine.jsonl"])  # the shell's folder; the missing file of the recipe is not looked for
    assert loaded.recipe.data.path == str(other / "mine.jsonl")
    loaded = load_recipe(write(), ["verifier.use=../units.py:units", "data.path=org/name", "model.path=org/model"])
    assert loaded.recipe.verifier.use == f"{tmp_path}/units.py:units"
    assert (loaded.recipe.data.path, loaded.recipe.model.path, loaded.recipe.model.tiny) == ("org/name", "org/model", None)
    assert load_recipe(write(), ["verifier.use=trl:../r.py:f"]).recipe.verifier.use == f"trl:{tmp_path}/r.py:f"
    loaded = load_recipe(write(GOOD.replace("./rows.jsonl", "./units.py:rows")))
    assert loaded.recipe.data.path == f"{tmp_path}/units.py:rows"
    path = write(GOOD.replace('path = "tiny"', 'path = "tiny"\nchat_template = "chat.jinja"'))
    assert only(refused(path)) == f"{path}, line 7: model.chat_template: no file {tmp_path}/chat.jinja"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("rollout.stop=['a', \"\\n\"]", ("a", "\n")),
        ("rollout.stop=[]", ()),
        ("data.template={prompt}=", "{prompt}="),
        ("data.template='7'", "7"),
        ("data.shuffle=false", False),
        ("optim.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("model.tiny.alphabet=0123 ", "0123 "),
        ("checks.max_logp_gap=1", 1.0),
    ],
)
def test_override_values_are_toml_or_text(write, text, value):
    key = text.partition("=")[0]
    loaded = load_recipe(write(), [text])
    found = loaded.recipe
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value and loaded.origins[key] == "override"


def test_overrides_of_sections_and_of_what_is_none(write):
    loaded = load_recipe(write(), ["warm_start.steps=5", "warm_start.optim.lr=1e-3", "rollout={prompts=2}", "rule.use=./rules.py:ranked"])
    assert loaded.recipe.warm_start is not None and loaded.recipe.warm_start.optim.lr == 1e-3
    assert loaded.recipe.rollout.group == 8 and loaded.origins["rollout.group"] == "default"  # the table replaces that of the file
    assert loaded.origins["rollout.prompts"] == "override" and loaded.origins["warm_start.examples"] == "default"
    assert "override 'steps.x=3': steps is a value, not a section" in only(refused(write(), ["steps.x=3"]))
    line = only(refused(write(), ["run.dir=7"]))
    assert line == "override run.dir: got 7 (int): Input should be a valid string; to give a string write run.dir='\"7\"'"
    line = only(refused(write(), ["warm_start.examples=5"]))
    assert "warm_start.steps: missing; add steps = ..." in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.holdout=0"], "override data.holdout: no rows to evaluate on; set data.holdout to a number of rows, or give [eval.data]"),
        (["data.limit=20"], "line 10: data.holdout: 20 of 20 rows leave none to train on; lower it or raise data.limit"),
        (["batch.minibatches=33"], "override batch.minibatches: 33 minibatches of 32 prompts; it can be rollout.prompts at most"),
        (["optim.warmup_steps=91"], "override optim.warmup_steps: 91 warm-up steps but steps is 90; lower it"),
        (["model.path=smollm2", "model.tiny.hidden=64"], 'goes with model.path = "tiny" only, and model.path is "smollm2"; remove one'),
        (["model.tiny.heads=3"], "line 5: model.tiny.hidden: hidden 128 must be an even multiple of heads 3"),
        (["model.tiny.kv_heads=3"], "override model.tiny.kv_heads: heads 4 must be a multiple of kv_heads 3"),
    ],
)
def test_cross_checks(write, overrides, message):
    assert message in only(refused(write(), overrides))


def test_evaluation_rows_of_their_own_need_no_holdout(write):
    assert load_recipe(write(), ["data.holdout=0", "eval.data.path=tiny"]).recipe.data.holdout == 0


def test_plugins_are_checked_with_key_and_line(write, tmp_path):
    text = GOOD.replace("tolerance = 1e-3", 'tolerence = "x"\ndigits = "7"')
    text += '\n[rule]\nuse = "./rules.py:ranket"\n[engine]\nuse = "nope"\n'

    def check(path, overrides):
        config.check_plugins(load_recipe(path, overrides))

    path = write(text)
    engine, rule, first, second = refused(path, ["verifier.parts=3"], check)[:4]
    assert engine.startswith(f'{path}, line 25: engine.use: plug-in "nope": llmrl.*_engine has none of that name')
    assert rule.startswith(f'{path}, line 23: rule.use: plug-in "./rules.py:ranket": ./rules.py has no "ranket"')
    assert 'nearest: "ranked"' in rule
    assert first.startswith(f'{path}, line 18: verifier.tolerence: unknown key "tolerence"') and 'nearest: "tolerance"' in first
    assert second == f"{path}, line 19: verifier.digits: key \"digits\" of ./units.py:units: got '7' (str), expected int: " + (
        "Input should be a valid integer"
    )
    assert refused(path, ["verifier.parts=3"], check)[4].startswith("override verifier.parts: ")


ENGINE = "engine.use=./units.py:units"


def test_a_rule_that_compares_samples_needs_two(write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def check(path, overrides):
        config.check_plugins(load_recipe(path, overrides))

    check(write(), [ENGINE, "rule.use=./rules.py:lonely", "rollout.group=1"])
    line = only(refused(write(), [ENGINE, "rule.use=./rules.py:ranked", "rollout.group=1"], check))
    assert line.startswith("override rollout.group: ") and line.endswith("compares the samples of a prompt: group must be 2 or more, not 1")


def test_show_lists_everything_with_its_origin(write, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    loaded = load_recipe(write(), [ENGINE, "rule.use=./rules.py:ranked", "rule.high=0.3"])
    show(loaded, as_json=True)
    shown = json.loads(capsys.readouterr().out)
    values = shown["values"]
    assert shown["path"] == str(loaded.path)
    assert values["rule.high"] == {"value": 0.3, "origin": "override"}
    assert values["rule.low"] == {"value": 0.2, "origin": "default"}
    assert values["verifier.tolerance"] == {"value": 1e-3, "origin": "file"}
    assert values["verifier.digits"] == {"value": 7, "origin": "default"}
    assert values["checks.max_logp_gap"] == {"value": None, "origin": "default"}
    assert set(loaded.origins) <= set(values)
    monkeypatch.setenv("COLUMNS", "200")
    show(loaded)
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if "rule.high" in line)
    assert "0.3" in row and "override" in row


def test_lines_survive_multi_line_strings_and_quoted_keys(write):
    text = GOOD.replace('path = "./rows.jsonl"', 'path = "./rows.jsonl"\ntemplate = """\nsteps = 4\n[rollout]\n"""\n"splitt" = "x"')
    path = write(text)
    assert only(refused(path)).startswith(f'{path}, line 14: data.splitt: unknown key; nearest: "split"')


def test_every_field_of_a_recipe_has_a_home_in_the_contract():
    keys = {f"{s}.{k}" for s, f in config.Recipe.model_fields.items() for k in getattr(f.annotation, "model_fields", {})}
    contract = "run.dir model.path data.path engine.use rule.use verifier.use checkpoint.every eval.every"
    assert set(contract.split()) <= keys and {"seed", "steps"} <= set(config.Recipe.model_fields)


def test_an_empty_override_takes_a_key_or_a_section_out(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text(
        'steps = 3\n[model]\npath = "tiny"\n[data]\npath = "chains"\nholdout = 5\nanswer_after = "####"\n[data.args]\nrows = 50\n[verifier]\nuse = "exact"\n'
    )
    loaded = load_recipe(path, ["data.answer_after=", "data.args="])
    assert loaded.recipe.data.answer_after is None and loaded.recipe.data.args == {}
    assert loaded.origins["data.answer_after"] == "default"
    with pytest.raises(InputError, match=r"data\.limit.*no such key"):
        load_recipe(path, ["data.limit="])
