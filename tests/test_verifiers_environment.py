"""The adaptor for environments of the package verifiers, against a stand-in with the protocol of its 0.1.x (the package is not needed to test here)."""

import asyncio
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from llmrl.environment import Action
from llmrl.environments.verifiers import verifiers, verifiers_rows
from llmrl.records import InputError, Prompt

PROMPT = Prompt("a", ({"role": "user", "content": "3*7"},), "21", {"info": {"x": 1}})


class Rubric:
    async def score_rollout(self, state, score_sem):
        async with score_sem:
            last = state["completion"][-1]["content"]
            state["reward"] = {"21": 1.0, "9": 9.0}.get(last, 0.5)
            state["metrics"] = {"turns": len(state["trajectory"])}


class Standin:
    """As verifiers.MultiTurnEnv and ToolEnv of 0.1.9 go about it: state, trajectory, stop conditions, the rubric."""

    oai_tools = ({"type": "function", "function": {"name": "multiply", "parameters": {}}},)
    rubric = Rubric()

    def __init__(self, max_turns=5):
        self.max_turns, self.cleaned = max_turns, 0

    async def init_state(self, row, client, model, sampling_args):
        return {**json.loads(json.dumps(row)), "trajectory": [], "is_completed": False, "error": None, "final_env_response": None, "oai_tools": self.oai_tools}

    async def setup_state(self, state):
        return state

    async def get_prompt_messages(self, state):
        if not state["trajectory"]:
            return state["prompt"]
        last = state["trajectory"][-1]
        messages = [*last["prompt"], *last["completion"]]
        return [*messages, *await self.env_response(messages, state)]

    async def env_response(self, messages, state):
        if messages[-1]["content"] == "stop":
            state["final_env_response"] = [{"role": "user", "content": "bye"}]
            return state["final_env_response"]
        told = []
        for call in messages[-1]["tool_calls"]:
            a = json.loads(call["function"]["arguments"])
            told.append({"role": "tool", "content": str(a["a"] * a["b"]), "tool_call_id": call["id"]})
        return told

    async def add_trajectory_step(self, state, step):
        state["trajectory"].append(step)

    async def is_completed(self, state):
        n, last = len(state["trajectory"]), state["trajectory"][-1]["completion"][-1] if state["trajectory"] else {}
        done = state["final_env_response"] is not None or n >= self.max_turns or (n > 0 and "tool_calls" not in last and last["content"] != "stop")
        state["is_completed"] = done
        if done:
            await self._cleanup(state)
        return done

    async def render_completion(self, state):
        last = state["trajectory"][-1]
        state["completion"] = [*last["prompt"], *last["completion"]][len(state["prompt"]) :]

    async def _cleanup(self, state):
        self.cleaned += 1

    def get_dataset(self, n=-1):
        rows = [{"example_id": k, "prompt": [{"role": "user", "content": f"{k}*7"}], "answer": str(7 * k), "task": "t", "info": {}} for k in range(3)]
        return rows if n < 0 else rows[:n]


@pytest.fixture
def package(monkeypatch):
    module, env = ModuleType("verifiers"), Standin()
    module.load_environment = lambda name, **args: {"multiply": env, "single": SimpleNamespace()}[name]
    monkeypatch.setitem(sys.modules, "verifiers", module)
    return env


def played(texts, **keys):
    async def go():
        episode = verifiers(env="multiply", **keys)()
        steps = [list(await episode.reset(PROMPT, ()))]
        steps += [await episode.step(Action(text)) for text in texts]
        await episode.close()
        return episode, steps

    return asyncio.run(go())


CALL = '<tool_call>{"name": "multiply", "arguments": {"a": 3, "b": 7}}</tool_call>'


def test_a_tool_is_called_and_the_rubric_scores(package):
    episode, (messages, first, last) = played([CALL, "21"])
    assert messages == [{"role": "user", "content": "3*7"}] and episode.tools == Standin.oai_tools
    assert not first.done and first.messages == ({"role": "tool", "content": "21"},)
    assert last.done and last.score == 1.0 and last.numbers == {"turns": 2.0} and package.cleaned == 1
    assert episode.state["info"] == {"x": 1} and episode.state["trajectory"][1]["prompt"][-1]["tool_call_id"] == "call_0"


def test_ends_limits_and_bad_calls(package):
    _, (_, last) = played(["stop"])  # the environment has the last word
    assert last.done and last.score == 0.5
    package.max_turns = 1
    _, (_, last) = played([CALL])
    assert last.done and last.score == 0.5
    package.max_turns = 5
    _, (_, told, _) = played(["<tool_call>3</tool_call>", "21"])
    assert told.messages[0]["content"].startswith("error: a <tool_call> must hold")


def test_the_range_of_rewards(package):
    with pytest.raises(ValueError, match=r"reward is 9.0, outside of environment.reward_range = \(0.0, 1.0\)"):
        played(["9"])
    assert played(["9"], reward_range=(0.0, 10.0))[1][-1].score == 0.9


def test_an_episode_that_a_limit_ends_is_cleaned_up(package):
    played([CALL])
    assert package.cleaned == 1


def test_its_rows(package):
    _, row = verifiers_rows(env="multiply", rows=2)
    assert row == {"id": "1", "prompt": [{"role": "user", "content": "1*7"}], "answer": "7", "info": {}, "task": "t"}


def test_what_is_refused(package, monkeypatch):
    with pytest.raises(InputError, match="single is a SimpleNamespace without init_state, setup_state"):
        verifiers(env="single")
    with pytest.raises(InputError, match="the first must be the smaller"):
        verifiers(env="multiply", reward_range=(1.0, 0.0))
    monkeypatch.setitem(sys.modules, "verifiers", ModuleType("verifiers"))  # as 0.2 and later: nothing at the top
    with pytest.raises(InputError, match=r'pip install "verifiers<0.2"'):
        verifiers(env="multiply")
