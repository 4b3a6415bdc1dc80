"""Rows -> prompts, the held-out split, the stream."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from llmrl.data import PromptStream, fill, read_prompts, split_holdout, template_fields
from llmrl.records import InputError, Prompt

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not here")
ROWS = [{"id": f"r{i}", "prompt": f"What is {i}+{i}?", "answer": str(2 * i), "level": i % 3} for i in range(1, 8)]


def write_jsonl(path: Path, rows: list) -> Path:
    raw = b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def prompts_of(n: int) -> list[Prompt]:
    return [Prompt(str(i), ({"role": "user", "content": f"q{i}"},), str(i)) for i in range(n)]


def refused(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        read_prompts(*args, **kwargs)
    return str(caught.value)


# Sources


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "x.csv"])
def test_the_same_rows_from_every_kind_of_file(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]))
            writer.writeheader()
            writer.writerows(ROWS)
    else:
        write_jsonl(path, ROWS)
    table = read_prompts(f"./{name}", base=tmp_path)
    assert [p.id for p in table.prompts] == [f"r{i}" for i in range(1, 8)]
    assert table.dropped == []
    assert table.prompts[2].messages == ({"role": "user", "content": "What is 3+3?"},)
    assert table.prompts[2].answer == "6"
    assert table.prompts[2].meta == {"level": "0" if name == "x.csv" else 0}


def test_places_a_file_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = write_jsonl(tmp_path / "data.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    for given in (str(path), "../data.jsonl", "data.jsonl"):
        assert len(read_prompts(given, base=tmp_path / "recipes").prompts) == 7
    message = refused("../dota.jsonl", base=tmp_path / "recipes")
    assert "no such file" in message and "did you mean 'data.jsonl'" in message


def test_a_generator_function_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text("def rows(*, n: int = 3):\n    return ({'question': f'{i}?', 'answer': i} for i in range(n))\n")
    table = read_prompts("./mine.py:rows", base=tmp_path, args={"n": 2})
    assert [(p.id, p.text, p.answer) for p in table.prompts] == [("1", "0?", "0"), ("2", "1?", "1")]
    assert "m" in refused("./mine.py:rows", base=tmp_path, args={"m": 2})


def test_a_source_of_no_known_kind(tmp_path):
    assert "hub:owner/name" in refused("data.json", base=tmp_path)
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert "takes no data.args" in refused("x.jsonl", base=tmp_path, args={"n": 1})


def test_reasoning_gym_missing_says_how_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # import raises ImportError, installed or not
    assert "pip install 'llmrl[gym]'" in refused("gym:chain_sum", base=tmp_path)


def test_reasoning_gym(tmp_path):
    pytest.importorskip("reasoning_gym")
    table = read_prompts("gym:chain_sum", base=tmp_path, args={"size": 4, "seed": 1})
    assert len(table.prompts) == 4 and all(int(p.answer or "") or p.answer == "0" for p in table.prompts)
    assert table.prompts[0].meta["metadata"]["source_dataset"] == "chain_sum"
    assert "sizes" in refused("gym:chain_sum", base=tmp_path, args={"sizes": 4})


def test_hub_loads_and_is_clear_when_offline(tmp_path):
    """In a process of its own: `datasets` reads its offline switch when it is imported. A local folder takes the place of a Hub name."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS)
    code = f"""
from pathlib import Path
from llmrl.data import read_prompts
from llmrl.records import InputError
table = read_prompts("hub:{folder}", base=Path("."), split="train")
print(len(table.prompts), table.prompts[0].id, table.prompts[0].meta)
try:
    read_prompts("hub:nobody/nothing", base=Path("."))
except InputError as error:
    print(error)
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7 r1 {'level': 1}\n")
    assert "hub:nobody/nothing" in done.stdout and "without a network" in done.stdout


# Columns, answers, messages


def test_column_mapping(tmp_path):
    rows = [{"task": "2+2?", "reward_model": {"truth": 4}, "n": 7, "how": "count", "other": None}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    columns = {"prompt": "task", "answer": "reward_model.truth", "id": "n", "solution": "how"}
    (prompt,) = read_prompts("x.jsonl", base=tmp_path, columns=columns).prompts
    assert (prompt.id, prompt.text, prompt.answer) == ("7", "2+2?", "4")
    assert prompt.meta == {"reward_model": {"truth": 4}, "other": None, "solution": "count"}
    assert read_prompts("x.jsonl", base=tmp_path, columns=columns | {"id": ""}).prompts[0].id == "1"


def test_column_errors_name_what_there_is(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"promt": "q", "answer": "a"}])
    message = refused("x.jsonl", base=tmp_path)
    assert "no column for the prompt" in message and "it has: promt, answer" in message and "nearest: 'promt'" in message
    message = refused("x.jsonl", base=tmp_path, columns={"prompt": "prompd"})
    assert "data.columns.prompt = 'prompd'" in message and "nearest: 'promt'" in message
    assert "nearest: 'prompt'" in refused("x.jsonl", base=tmp_path, columns={"promptt": "promt"})
    assert "no column for the solution" in refused("x.jsonl", base=tmp_path, columns={"prompt": "promt"}, need_solution=True)


def test_default_names_in_order(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"problem": "p", "question": "q", "solution": "s", "task_id": 5}])
    (prompt,) = read_prompts("x.jsonl", base=tmp_path).prompts
    assert (prompt.id, prompt.text, prompt.answer) == ("5", "q", "s")


def test_answer_after_takes_what_follows_the_last_marker(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"question": "q", "answer": "a #### 1, so\n#### 1,234 "}, {"question": "r", "answer": "no mark"}])
    table = read_prompts("x.jsonl", base=tmp_path, answer_after="####", on_bad="drop")
    assert table.prompts[0].answer == "1,234"
    assert table.prompts[0].meta == {"solution": "a #### 1, so\n#### 1,234 "}
    assert [(b.row, b.id) for b in table.dropped] == [(2, None)] and "'####'" in table.dropped[0].reason


def test_an_answer_is_not_needed_where_none_is_asked_for(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "write"}])
    assert read_prompts("x.jsonl", base=tmp_path, need_answer=False).prompts[0].answer is None
    assert "no column for the answer" in refused("x.jsonl", base=tmp_path)


def test_messages(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "2+2"}]
    bad = [turns[:2], [], [{"role": "robot", "content": "x"}], [{"role": "system", "content": "s"}, turns[0]]]
    rows = [{"messages": m, "answer": "4"} for m in [turns, json.dumps(turns), *bad]] + [{"messages": "plain", "answer": "4"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    table = read_prompts("x.jsonl", base=tmp_path, system="Be brief.", on_bad="drop")
    assert [p.messages for p in table.prompts] == [({"role": "system", "content": "Be brief."}, *turns)] * 2
    assert table.prompts[0].text == "2+2"
    assert [b.row for b in table.dropped] == [3, 4, 5, 6, 7]
    assert "system message of its own" in table.dropped[3].reason
    assert "excludes" in refused("x.jsonl", base=tmp_path, columns={"messages": "messages"}, template="{answer}")


# Templates


def test_template_braces_in_data_and_template(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "{a} {answer} {", "answer": "1", "choices": ["é", 2]}])
    template = "Q: {prompt}\n{choices}\nUse \\boxed{} or \\frac{{1}}{{2}}."
    (prompt,) = read_prompts("x.jsonl", base=tmp_path, template=template).prompts
    assert prompt.text == 'Q: {a} {answer} {\n["é", 2]\nUse \\boxed{} or \\frac{1}{2}.'
    assert prompt.meta == {"prompt": "{a} {answer} {", "choices": ["é", 2]}
    assert fill("{{{a}}}{}", {"a": "{b}"}) == "{{b}}{}"
    assert template_fields("{a b} {{c}} {} {a b}{d}", "here") == ["a b", "d"]


def test_template_errors(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "p", "answer": "1", "hint": "h"}, {"prompt": "p", "answer": "1"}])
    message = refused("x.jsonl", base=tmp_path, template="{promt}")
    assert "data.template: {promt}" in message and "nearest: 'prompt'" in message
    assert "a single '}'" in refused("x.jsonl", base=tmp_path, template="{prompt} }")
    message = refused("x.jsonl", base=tmp_path, template="{prompt} {hint}")
    assert "row 2" in message and "'hint'" in message


def test_template_names_a_column_by_its_role(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [{"question": "2+2?", "answer": "4"}])
    assert read_prompts("x.jsonl", base=tmp_path, template="Now: {prompt}").prompts[0].text == "Now: 2+2?"


# Bad rows


BAD_ROWS: list = [
    {"id": "ok", "prompt": "p", "answer": "1"},
    {"id": "a", "prompt": " ", "answer": "1"},
    {"id": "b", "prompt": "p", "answer": None},
    {"id": "ok", "prompt": "other", "answer": "1"},
    b'{"id": "d", "prompt": "\xff", "answer": "1"}',
    b'{"id": "e", "prompt": ',
    b"[1]",
    {"id": "f", "prompt": "far too long a prompt", "answer": "1"},
    {"id": "g", "prompt": "p", "answer": [1]},
    b'{"id": "h", "prompt": "\\ud800", "answer": "1"}',
    b'{"id": "i", "prompt": "p", "answer": NaN}',
    b"",
    {"prompt": "p", "answer": 0},
]


def test_every_bad_row_is_named_and_dropped(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", BAD_ROWS)
    table = read_prompts("x.jsonl", base=tmp_path, on_bad="drop", tokens_of=lambda p: len(p.text.split()), max_prompt_tokens=4)
    assert [(p.id, p.answer) for p in table.prompts] == [("ok", "1"), ("13", "0")]
    assert [(b.row, b.id) for b in table.dropped] == [
        (2, "a"), (3, "b"), (4, "ok"), (5, None), (6, None), (7, None), (8, "f"), (9, "g"), (10, "h"), (11, "i"),
    ]  # fmt: skip
    reasons = ["no prompt", "no answer", "the same id as row 1", "not UTF-8 (byte 23", "not JSON", "a list where a JSON object"]
    reasons += ["5 tokens, over the limit of 4", "the answer is a list", "surrogate", "no answer"]
    for bad, reason in zip(table.dropped, reasons, strict=True):
        assert reason in bad.reason


def test_bad_rows_are_refused_in_one_error(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", BAD_ROWS)
    message = refused("x.jsonl", base=tmp_path)
    assert "9 of 12 rows cannot be used" in message
    assert message.count("\n  row ") == 5 and "row 2 (id 'a')" in message and "and 4 more" in message
    assert 'data.on_bad = "drop"' in message and str(tmp_path / "x.jsonl") in message


def test_nothing_left_is_an_error_even_when_dropping(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", [b"{", b"["])
    assert "2 of 2 rows" in refused("x.jsonl", base=tmp_path, on_bad="drop")
    write_jsonl(tmp_path / "x.jsonl", [])
    assert "no rows" in refused("x.jsonl", base=tmp_path)
    write_jsonl(tmp_path / "x.jsonl", [{"prompt": "", "answer": "1"}])
    assert "No usable row" in refused("x.jsonl", base=tmp_path, on_bad="drop")


def test_damaged_files_are_refused(tmp_path):
    whole = write_jsonl(tmp_path / "x.jsonl.gz", ROWS * 50).read_bytes()
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read to its end" in refused("x.jsonl.gz", base=tmp_path, on_bad="drop")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    assert "parquet" in refused("x.parquet", base=tmp_path)


def test_csv_bad_rows(tmp_path):
    (tmp_path / "x.csv").write_bytes(b'\xef\xbb\xbfprompt,answer\r\n"two\nlines",1\r\nonly\r\n\xff,2\r\n\r\n"a, b",3\r\n')
    table = read_prompts("x.csv", base=tmp_path, on_bad="drop")
    assert [(p.id, p.text, p.answer) for p in table.prompts] == [("1", "two\nlines", "1"), ("4", "a, b", "3")]
    assert [(b.row, b.reason) for b in table.dropped] == [
        (2, "1 cells under a header of 2 (line 4 of the file)"),
        (3, "not UTF-8 (line 5 of the file)"),
    ]


def test_limit_and_split(tmp_path):
    rows = [row | {"split": "test" if i % 2 else "train"} for i, row in enumerate(ROWS)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert [p.id for p in read_prompts("x.jsonl", base=tmp_path, split="test").prompts] == ["r2", "r4", "r6"]
    assert [p.id for p in read_prompts("x.jsonl", base=tmp_path, split="test", limit=2).prompts] == ["r2", "r4"]
    assert "data.limit must be at least 1" in refused("x.jsonl", base=tmp_path, limit=0)
    assert "holds test, train" in refused("x.jsonl", base=tmp_path, split="dev")
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    assert "no column 'split'" in refused("x.jsonl", base=tmp_path, split="dev")


# Held-out split


def test_holdout_depends_on_ids_and_seed_alone():
    prompts = prompts_of(50)
    train, held = split_holdout(prompts, 10, seed=3)
    assert len(train) == 40 and len(held) == 10
    assert {p.id for p in train} | {p.id for p in held} == {p.id for p in prompts}
    assert {p.id for p in split_holdout(prompts[::-1], 10, seed=3)[1]} == {p.id for p in held}
    assert {p.id for p in split_holdout(prompts, 10, seed=4)[1]} != {p.id for p in held}
    assert {p.id for p in held} < {p.id for p in split_holdout(prompts, 11, seed=3)[1]}
    assert [p.id for p in split_holdout(prompts_of(5), 2, seed=0)[1]] == ["1", "4"]  # golden: `printf '0\0%s' ID | sha256sum`


def test_holdout_is_never_trained_on_under_another_id():
    twice = [Prompt(f"{i}/{copy}", ({"role": "user", "content": f"q{i}"},), "a") for i in range(6) for copy in range(2)]
    train, held = split_holdout(twice, 2, seed=0)
    assert len(held) == 2 and len(train) == 8
    assert not {p.text for p in held} & {p.text for p in train}
    with pytest.raises(InputError, match="6 different questions"):
        split_holdout(twice, 6, seed=0)


def test_holdout_of_everything_is_refused():
    for n in (5, 6):
        with pytest.raises(InputError, match="hold out fewer"):
            split_holdout(prompts_of(5), n, seed=0)
    assert split_holdout(prompts_of(5), 0, seed=0)[1] == []


# Stream


def ids(prompts: list[Prompt]) -> list[str]:
    return [p.id for p in prompts]


def test_each_epoch_is_a_permutation_of_its_own():
    stream = PromptStream(prompts_of(7), seed=1)
    epochs = [ids(stream.take(7)) for _ in range(4)]
    assert all(sorted(epoch) == [str(i) for i in range(7)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids(PromptStream(prompts_of(7), seed=2).take(7)) != epochs[0]
    assert ids(PromptStream(prompts_of(3), seed=1, shuffle=False).take(7)) == list("0120120")


def test_what_comes_is_what_the_ranks_take():
    streams = [PromptStream(prompts_of(7), seed=1, rank=r, world=2) for r in range(2)]
    for _ in range(3):  # across ends of epochs
        coming = [s.coming(6) for s in streams]
        assert coming[0] == coming[1] == streams[0].coming(6)
        taken = [s.take(3) for s in streams]
        assert [p for pair in zip(*taken, strict=True) for p in pair] == coming[0]


def philox_words(key: tuple[int, int], n: int) -> list[int]:
    """Philox4x64-10 written out (Salmon et al., SC11, table 2), the counter starting at 1 as in numpy."""
    words: list[int] = []
    for block in range(1, n // 4 + 2):
        x, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            p, q = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
            x = [q >> 64 ^ x[1] ^ k[0], q % 2**64, p >> 64 ^ x[3] ^ k[1], p % 2**64]
            k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
        words += x
    return words[:n]


@pytest.mark.parametrize("seed", [0, 7, 2**63])
def test_the_order_is_that_of_philox_words(seed):
    """Independent of numpy: the same order in every version and on every machine."""
    want = []
    for epoch in range(3):
        words = philox_words((seed, epoch), 9)
        want += sorted(range(9), key=words.__getitem__)
    assert ids(PromptStream(prompts_of(9), seed=seed).take(27)) == [str(i) for i in want]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_resume_at_every_position_across_epochs(world):
    prompts, steps, n = prompts_of(7), 13, 2
    for rank in range(world):
        whole = PromptStream(prompts, seed=5, rank=rank, world=world)
        want = [ids(whole.take(n)) for _ in range(steps)]
        for cut in range(steps):
            first = PromptStream(prompts, seed=5, rank=rank, world=world)
            got = [ids(first.take(n)) for _ in range(cut)]
            state = json.loads(json.dumps(first.state_dict()))
            second = PromptStream(prompts, seed=5, rank=rank, world=world)
            second.load_state_dict(state)
            assert got + [ids(second.take(n)) for _ in range(steps - cut)] == want


@pytest.mark.parametrize("size", [1, 5, 8])
def test_ranks_together_see_what_one_rank_sees(size):
    one = ids(PromptStream(prompts_of(size), seed=9).take(24))
    for world in (2, 3, 4):
        streams = [PromptStream(prompts_of(size), seed=9, rank=rank, world=world) for rank in range(world)]
        shares = [ids(stream.take(24 // world)) for stream in streams]
        assert [shares[i % world][i // world] for i in range(24)] == one
        assert len({json.dumps(stream.state_dict()) for stream in streams}) == 1


def test_resume_with_another_number_of_ranks():
    prompts = prompts_of(5)
    one = PromptStream(prompts, seed=0)
    one.take(3)
    two = [PromptStream(prompts, seed=0, rank=rank, world=2) for rank in range(2)]
    for stream in two:
        stream.load_state_dict(one.state_dict())
    shares = [ids(stream.take(2)) for stream in two]
    assert [shares[0][0], shares[1][0], shares[0][1], shares[1][1]] == ids(one.take(4))


def test_another_dataset_is_not_resumed():
    state = PromptStream(prompts_of(5), seed=0).state_dict()
    changed = [*prompts_of(4), Prompt("4", ({"role": "user", "content": "another"},), "4")]
    for others in (prompts_of(6), prompts_of(5)[::-1], changed):
        with pytest.raises(InputError, match="another dataset"):
            PromptStream(others, seed=0).load_state_dict(state)
    with pytest.raises(InputError, match="no prompts"):
        PromptStream([], seed=0)


# Real rows


@needs_data
def test_real_gsm8k():
    table = read_prompts(str(DATA / "math" / "gsm8k_train.jsonl.gz"), base=ROOT, need_solution=True)
    assert len(table.prompts) == 7473
    assert table.prompts[0].id == "gsm8k-train-00000" and table.prompts[0].answer == "72"
    again = read_prompts(str(DATA / "math" / "gsm8k_train.jsonl.gz"), base=ROOT, columns={"answer": "solution"}, answer_after="####")
    differ = [p.id for p, q in zip(table.prompts, again.prompts, strict=True) if p.answer != (q.answer or "").replace(",", "")]
    assert differ == []
    train, held = split_holdout(table.prompts, 200, seed=0)
    assert len(held) == 200 and len(train) <= 7273
    assert not {p.text for p in held} & {p.text for p in train}


@needs_data
def test_real_math_mbpp_and_a_file_without_answers():
    table = read_prompts(str(DATA / "math" / "math_train_levels.jsonl.gz"), base=ROOT, template="{prompt}\nAnswer in \\boxed{}.")
    assert len(table.prompts) == 7455 and all(p.text.endswith("\\boxed{}.") for p in table.prompts)
    assert {p.meta["level"] for p in table.prompts} == {1, 2, 3, 4, 5}
    assert len(read_prompts(str(DATA / "code" / "mbpp.jsonl.gz"), base=ROOT, split="train").prompts) == 374
    assert "no column for the answer" in refused(str(DATA / "format" / "ifeval_prompts.jsonl.gz"), base=ROOT)
