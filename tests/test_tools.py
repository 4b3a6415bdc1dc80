"""Tools and the shipped environments: calls that are read, refused and told; the contract of environments, and that it finds broken ones."""

import asyncio
from pathlib import Path

import pytest

from llmrl.environment import Action
from llmrl.environments.calculator import calculate, calculator
from llmrl.environments.guessing import guessing
from llmrl.records import Prompt
from llmrl.tools import Call, ToolError, Tools, parse_calls, parse_marked, schema_of
from llmrl.turn_tasks import guesses, products
from tests.contracts.environment import check_environment


def ask(text, functions=(calculate,), **kw):
    return asyncio.run(Tools(functions, **kw).step(Action(text)))


def call(body):
    return f"<tool_call>{body}</tool_call>"


# ---------------------------------------------------------------- calls


def test_calls_are_read_in_order():
    text = "I think. " + call('\n{"name": "a", "arguments": {"x": 1}}\n') + " and " + call('{"name": "b"}') + " done"
    assert parse_calls(text) == [Call("a", {"x": 1}), Call("b", {})]
    assert parse_calls("no call") == []
    assert parse_marked("1+(3*7)=(2", ("(", ")"), calculate) == [Call("calculate", {"expression": "3*7"}), Call(problem="no ')'")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (call("3*7"), "holds no JSON"),
        ('<tool_call>{"name": "calculate"', "is not closed"),
        (call('{"name": 3}'), 'must hold {"name"'),
        (call('{"name": "sum", "arguments": {}}'), "there is no tool 'sum'; there are calculate"),
        (call('{"name": "calculate", "arguments": {}}'), "expression: Field required"),
        (call('{"name": "calculate", "arguments": {"expression": "1", "base": 2}}'), "base: Extra inputs are not permitted"),
        (call('{"name": "calculate", "arguments": {"expression": "1/0"}}'), "Fraction(1, 0)"),
        (call('{"name": "calculate", "arguments": {"expression": "2**9"}}'), "only numbers"),
    ],
)
def test_a_bad_call_is_told_to_the_model(text, says):
    step = ask(text)
    (message,) = step.messages
    assert message["role"] == "tool" and message["content"].startswith("error: ") and says in message["content"]
    assert not step.done and step.numbers == {"calls_in_turn": 1.0, "call_errors_in_turn": 1.0}


def test_a_tool_s_own_failure_is_not_the_model_s():
    def broken(x: int) -> str:
        raise OSError("no disk")

    with pytest.raises(OSError, match="no disk"):
        ask(call('{"name": "broken", "arguments": {"x": 1}}'), [broken])


def test_functions_plain_and_async_and_what_they_return():
    async def look(word: str, most: int = 2) -> dict:
        """Looks up a word.

        Not for the model.
        """
        return {"word": word, "most": most}

    step = ask(call('{"name": "look", "arguments": {"word": "a"}}') + call('{"name": "calculate", "arguments": {"expression": "3*7"}}'), [look, calculate])
    assert [m["content"] for m in step.messages] == ['{"word": "a", "most": 2}', "21"]
    schema = schema_of(look)["function"]
    assert schema["name"] == "look" and schema["description"] == "Looks up a word." and schema["parameters"]["required"] == ["word"]
    assert schema["parameters"]["properties"] == {"word": {"type": "string"}, "most": {"default": 2, "type": "integer"}}
    assert ask("the answer is 21").done


@pytest.mark.parametrize(
    ("expression", "value"),
    [("3*7", "21"), ("-(2+3)*4", "-20"), ("1/3", "0.333333"), ("7//2", "3"), ("7%4", "3"), ("0.1+0.2", "0.3"), ("99999*99999", "9999800001"), (" 5 ", "5")],
)
def test_the_calculator(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize("expression", ["", "a", "2**99", "__import__('os')", "f(1)", "[1]", "'a'*9", "True", "1if 1else 2", "9" * 201, "(" * 150])
def test_what_the_calculator_refuses(expression):
    with pytest.raises(ToolError):
        calculate(expression)


# ---------------------------------------------------------------- guessing, tasks


def test_the_expert_halves_and_a_state_comes_back():
    async def go():
        env = guessing(turns=4, per_turn=-0.1)()
        await env.reset(Prompt("a", ({"role": "user", "content": "1-15="},), "11"), ())
        said = [await env.expert()]
        first = await env.step(Action(said[-1]))
        state = env.snapshot()
        said.append(await env.expert())
        second = await env.step(Action(said[-1]))
        other = guessing(turns=4)()
        other.restore(state)
        return said, first, second, await other.step(Action("11"))

    said, first, second, third = asyncio.run(go())
    assert said == ["8", "12"] and first.messages[0]["content"] == "+" and second.messages[0]["content"] == "-"
    assert first.numbers == second.numbers == {"attribution": 2.0} and third.numbers == {"attribution": 3.0}
    assert first.reward == -0.1 and not second.done and third.done and third.score == 1.0


@pytest.mark.parametrize(("guess", "attribution"), [("11", 3), ("8", 2), ("3", 1), ("2", 0), ("16", -1), ("0", -1), ("#", -1)])
def test_what_a_guess_is_worth(guess, attribution):
    """The number is 11 in 1-15: 8 rules out 8 of 15, 3 rules out a fifth, 2 less."""

    async def go():
        env = guessing()()
        await env.reset(Prompt("a", ({"role": "user", "content": "1-15="},), "11"), ())
        return await env.step(Action(guess))

    assert asyncio.run(go()).numbers == {"attribution": float(attribution)}


@pytest.mark.parametrize("rows", [products(rows=300), guesses(rows=300)], ids=["products", "guesses"])
def test_demonstrations_are_episodes_of_their_environment(rows):
    """Played again, the environment says what the demonstration has it say."""
    rows = list(rows)
    assert len({r["id"] for r in rows}) == 300 and {len(r["turns"]) for r in rows} >= {1, 3}

    async def replay(row, env):
        await env.reset(Prompt(row["id"], ({"role": "user", "content": row["prompt"]},), row["answer"]), ())
        for said, told in zip(row["turns"][::2], [*row["turns"][1::2], None], strict=True):
            step = await env.step(Action(said["content"]))
            assert step.messages == ((told,) if told else ())
            assert step.done == (told is None)
        return step

    for row in rows:
        step = asyncio.run(replay(row, calculator(marks=("(", ")"))() if "*" in row["prompt"] else guessing(turns=3)()))
        assert step.score in (None, float(row["solution"] == row["answer"]))


# ---------------------------------------------------------------- the contract

GUESS = [Prompt("a", ({"role": "user", "content": "3-17="},), "9"), Prompt("b", ({"role": "user", "content": "1-9="},), "2")]
PRODUCT = [Prompt("a", ({"role": "user", "content": "3*17="},), "51")]


def test_shipped_environments():
    check_environment("guessing", {"turns": 3}, GUESS, say=["10", "4", "2"])
    check_environment("calculator", {"marks": ["(", ")"]}, PRODUCT, say=["(3*17)", "51"])
    check_environment("calculator", {}, PRODUCT, say=[call('{"name": "calculate", "arguments": {"expression": "3*17"}}'), "51"])


BROKEN = '''
import random, time
from llmrl.environment import Step

class Good:
    turns = 0
    async def reset(self, prompt, seed): return prompt.messages
    async def step(self, action):
        self.turns += 1
        return Step(done=True, score=1.0) if self.turns > 2 else Step(({"role": "user", "content": self.say(action)},))
    def say(self, action): return "again"
    async def close(self): pass

class Plain(Good):
    def step(self, action): return Step(done=True)
class Endless(Good):
    async def step(self, action): return Step(({"role": "user", "content": "again"},))
class Dice(Good):
    def say(self, action): return str(random.random())
class Fragile(Good):
    def say(self, action): return str(int(action.text))
class Blocks(Good):
    def say(self, action): time.sleep(0.8); return "again"
class Roles(Good):
    async def reset(self, prompt, seed): return [{"role": "robot", "content": "hello"}]
class Forgets(Good):
    def snapshot(self): return 0
    def restore(self, state): self.turns = 7
shared = Good()

def good(): return Good
def plain(): return Plain
def endless(): return Endless
def dice(): return Dice
def fragile(): return Fragile
def blocks(): return Blocks
def roles(): return Roles
def forgets(): return Forgets
def same(): return lambda: shared
'''


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("good", None), ("plain", r"\(1\) step must be `async def`"), ("endless", r"\(3\)"), ("dice", r"\(4\)"), ("fragile", r"\(5\) step raised at ''"),
        ("blocks", r"\(6\)"), ("roles", r"\(2\)"), ("forgets", r"\(7\)"), ("same", "the same one twice"),
    ],
)  # fmt: skip
def test_the_contract_finds_broken_environments(name, says, tmp_path):
    (tmp_path / "env.py").write_text(BROKEN)

    def check():
        check_environment(f"./env.py:{name}", {}, PRODUCT, say=["1", "2"], base=Path(tmp_path))

    if says is None:
        check()
    else:
        with pytest.raises(AssertionError, match=says):
            check()
