"""Everything that a command needs of a recipe, built in the order in which it can be refused: plug-ins, data, verifier, then the model."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from llmrl import plugins
from llmrl.ahead import Ahead
from llmrl.chat import Chat
from llmrl.compose import build_rule
from llmrl.config import HOMES, LoadedRecipe, check_plugins
from llmrl.data import PromptStream, read_prompts, split_holdout
from llmrl.environment import Make
from llmrl.learner import Learner
from llmrl.memory import Memory
from llmrl.models import Policy, load_policy, load_tokenizer
from llmrl.recipe import Data, Recipe
from llmrl.records import InputError, Prompt, Sampling
from llmrl.rules.base import Rule
from llmrl.scoring import Scorer
from llmrl.strategy import Sharded, Strategy
from llmrl.turns import Episodes


@dataclass
class Tables:
    """The prompts of a recipe."""

    train: list[Prompt]
    held_out: list[Prompt]
    warm: list[Prompt]
    dropped: int
    longest: int
    """Tokens of the longest prompt."""
    overlap: int
    """Evaluation prompts that are training prompts too; 0 unless [eval.data] repeats some."""


@dataclass
class Session:
    """A recipe brought to life. Close it: it owns verifier processes."""

    loaded: LoadedRecipe
    rule: Rule
    tables: Tables
    scorer: Scorer
    accelerator: Any
    policy: Policy
    learner: Learner
    engine: Any
    sampling: Sampling
    stream: PromptStream
    memory: Memory = field(default_factory=Memory)
    credit_state: dict[str, Any] = field(default_factory=dict)
    environment: Episodes | None = None
    ahead: Ahead[Any] = field(default_factory=Ahead)
    """Rollouts of the next steps, where they run during this step's update."""

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def most_tokens(self) -> int:
        """Tokens that the policy can write in a sample, at most."""
        n = self.sampling.max_new_tokens
        return n if self.environment is None else self.environment.most_tokens(n, getattr(self.engine, "max_length", None))

    @property
    def tools(self) -> tuple[dict[str, Any], ...]:
        """Schemas of the tools that a prompt is shown with."""
        return () if self.environment is None else self.environment.tools

    def close(self) -> None:
        self.ahead.close()
        self.scorer.close()
        if hasattr(self.engine, "close"):
            self.engine.close()


def collect_fits(loaded: LoadedRecipe, rule: Rule) -> None:
    """A rule that makes its samples in a way of its own plays no episodes, and one for episodes needs an environment."""
    collect: Any = rule.collect
    while isinstance(collect, partial):
        collect = collect.func
    name = loaded.recipe.rule.use
    if loaded.recipe.environment is not None and not getattr(collect, "plays_episodes", False):
        raise InputError(
            f"{loaded.where('environment')}: the rule {name} makes its samples in a way of its own ({collect.__name__}), which knows no turns; use one "
            "with the default collect, such as grpo or dapo (a collect of yours that takes its samples from sample_groups: llmrl.rollout.plays_episodes)"
        )
    if loaded.recipe.environment is None and getattr(collect, "needs_environment", False):
        raise InputError(f"{loaded.where('rule.use')}: the rule {name} plays episodes; give the recipe a section [environment] (docs/agents.md)")


def environment_of(loaded: LoadedRecipe) -> Episodes | None:
    """The [environment] section, built. Raises InputError when the factory returns something else than what makes environments."""
    spec = loaded.recipe.environment
    if spec is None:
        return None
    make = plugins.use(spec.use, spec.kwargs, home=HOMES["environment"], base=loaded.base, where="[environment]")
    one = make() if callable(make) else None
    missing = [name for name in ("reset", "step", "close") if not inspect.iscoroutinefunction(getattr(one, name, None))]
    if missing:
        raise InputError(
            f'[environment] use = "{spec.use}": what the factory returned must be a function that makes an environment, and its '
            f"{', '.join(missing)} must be `async def` (docs/agents.md)"
        )
    return Episodes(cast(Make, make), spec.use, spec.max_turns, spec.max_tokens, spec.timeout_s)


def scorer_of(loaded: LoadedRecipe) -> Scorer:
    """The [verifier] section, running in its worker processes."""
    r = loaded.recipe
    return Scorer(
        r.verifier.use, r.verifier.kwargs, loaded.base, workers=r.scoring.workers, timeout_s=r.scoring.timeout_s,
        memory_mb=r.scoring.memory_mb, concurrency=r.scoring.concurrency, max_failure_rate=r.scoring.max_failure_rate,
    )  # fmt: skip


def sampling_of(recipe: Recipe) -> Sampling:
    """The [rollout] section as the engine's sampling parameters."""
    return Sampling(**{k: getattr(recipe.rollout, k) for k in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop")})


def read_tables(loaded: LoadedRecipe, chat: Chat) -> Tables:
    """All rows of [data], [eval.data] and [warm_start.data], checked: nothing here needs a model's weights."""
    r = loaded.recipe
    kept: list[int] = []  # tokens of every prompt that is used; dropped ones do not count
    lengths: dict[str, int] = {}  # by question: generated data asks the same one many times

    def tokens_of(prompt: Prompt) -> int:
        key = repr(prompt.messages)
        if key not in lengths:
            lengths[key] = len(chat.prompt_ids(prompt.messages))
            strange = chat.unknown(prompt.text)
            if strange is not None:
                raise InputError(f"row {prompt.id}: the tokenizer has no token for {strange!r}; add it to model.tiny.alphabet or change the row")
        return lengths[key]

    def read(data: Data, *, solution: bool = False) -> tuple[list[Prompt], int]:
        table = read_prompts(
            data.path, base=loaded.base, split=data.split, args=data.args, columns={str(k): v for k, v in data.columns.items()},
            template=data.template, system=data.system, answer_after=data.answer_after, limit=data.limit, on_bad=data.on_bad,
            need_answer=data.columns.get("answer") != "", need_solution=solution, tokens_of=tokens_of, max_prompt_tokens=data.max_prompt_tokens,
        )  # fmt: skip
        kept.extend(tokens_of(prompt) for prompt in table.prompts)
        return table.prompts, len(table.dropped)

    warm_here = r.warm_start is not None and r.warm_start.data is None
    train, dropped = read(r.data, solution=warm_here)
    held: list[Prompt] = []
    if r.data.holdout:
        train, held = split_holdout(train, r.data.holdout, r.seed)
    warm = train if warm_here else []
    if r.warm_start is not None and r.warm_start.data is not None:
        warm, more = read(r.warm_start.data, solution=True)
        questions = {repr(p.messages) for p in held}
        warm, dropped = [p for p in warm if repr(p.messages) not in questions], dropped + more
    _solutions_can_be_written(warm, chat)
    if r.eval.data is not None:
        held, more = read(r.eval.data)
        dropped += more
    held = _distinct(held)[: r.eval.rows]
    trained = {repr(p.messages) for p in (*train, *warm)}
    overlap = sum(repr(p.messages) in trained for p in held)
    return Tables(train, held, warm, dropped, max(kept), overlap)


def _solutions_can_be_written(prompts: Sequence[Prompt], chat: Chat) -> None:
    """A demonstration with a character that the tokenizer lacks would ask for a token that is never sampled."""

    def said(p: Prompt) -> str:
        turns = p.meta.get("turns") or []
        texts = [m["content"] for m in turns if isinstance(m, dict) and {"role", "content"} <= m.keys()]
        if len(texts) < len(turns) or (turns and turns[0]["role"] != "assistant"):
            raise InputError(f'row {p.id}: turns must be a list of messages {{"role", "content"}} that begins with one of the assistant')
        return p.meta["solution"] + "".join(texts)

    strange = chat.unknown("".join(sorted(set().union(*map(said, prompts)))))
    if strange is not None:
        row = next(p for p in prompts if strange in said(p))
        raise InputError(f"row {row.id}: its solution holds {strange!r}, for which the tokenizer has no token; add it to model.tiny.alphabet")


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each question once: a repeated one would count twice in an accuracy."""
    seen: dict[str, Prompt] = {}
    for p in prompts:
        seen.setdefault(repr(p.messages), p)
    return list(seen.values())


def _keep_freed_memory() -> None:
    """glibc hands large freed blocks back to the system at once, and a training step asks for them again, page by page: a quarter of a
    CPU update of SmolLM2. Told to keep them, it peaks no higher. No effect elsewhere."""
    import ctypes
    import sys

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def resolve_strategy(loaded: LoadedRecipe) -> tuple[str, bool]:
    """(strategy, offload) that the recipe and the launcher agree on. InputError where they do not.

    accelerate tells its processes by environment variables what they should be. They are taken out: accelerate's own FSDP and DeepSpeed
    plugins would wrap what is wrapped already, and on CPU turn into plain data parallelism without a word.
    """
    told, offload = "auto", False
    env = os.environ
    if env.pop("ACCELERATE_USE_FSDP", "").lower() == "true":
        if env.get("FSDP_VERSION", "1") != "2":
            raise InputError("accelerate was told fsdp_version 1; set fsdp_version: 2 in its configuration (recipes/accelerate/fsdp2.yaml)")
        told = "fsdp2"
    if env.pop("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        told = f"zero{env.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
        offload = env.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none") == "cpu"
    asked = loaded.recipe.learner
    if "auto" not in (told, asked.strategy) and told != asked.strategy:
        where = loaded.where("learner.strategy")
        raise InputError(f"{where}: the recipe asks for {asked.strategy}, accelerate was started for {told}; change one of them")
    strategy, offload = (told if asked.strategy == "auto" else asked.strategy), offload or asked.offload
    if offload and not strategy.startswith("zero"):
        raise InputError(f"{loaded.where('learner.offload')}: only zero1, zero2 and zero3 offload; learner.strategy is {strategy}")
    world = int(env.get("WORLD_SIZE", "1"))
    if world == 1 and strategy not in ("auto", "ddp"):
        raise InputError(
            f"{loaded.where('learner.strategy')}: {strategy} shards over processes, and this is one; start several (llmrl launch --procs 2), "
            "or set learner.strategy=auto"
        )
    return ("ddp" if strategy == "auto" else strategy), offload


def _four_bits_fit(loaded: LoadedRecipe, strategy: str) -> None:
    lora = loaded.recipe.model.lora
    if lora is not None and lora.quantize is not None and strategy not in ("auto", "ddp"):
        raise InputError(
            f"{loaded.where('model.lora.quantize')}: 4-bit weights cannot be cut into shards, and {strategy} would have nothing else to shard than the "
            "adapters; set learner.strategy=ddp, or leave model.lora.quantize out"
        )


def make_learner(loaded: LoadedRecipe, plan: tuple[str, bool] | None, policy: Policy, accelerator: Any, temperature: float, engine: Any) -> Learner:
    """The learner under `plan` (strategy, offload). Where an engine generates on the model itself, a sharded learner gets a copy of it."""
    r = loaded.recipe
    how: dict[str, Any] = {"head_chunk": r.model.head_chunk, "temperature": temperature}

    def again() -> Policy:
        return load_policy(r.model, base=loaded.base, seed=r.seed, device=accelerator.device)

    own, world = policy, accelerator.num_processes
    whole = plan is None or plan[0] == "ddp"
    if getattr(engine, "policy", None) is policy and (not whole or r.engine.max_staleness):
        own, engine.replica = again(), True  # it generates while the learner learns, or on weights that the learner has cut up
    if plan is None or whole:
        return Learner(own, accelerator, **how)
    if plan[0] == "fsdp2":
        strategy: Strategy = Sharded(own, r.model.head_chunk, world)
    else:
        from llmrl.zero import Zero

        strategy = Zero(own, r.model.head_chunk, world, int(plan[0][-1]), plan[1])
    return Learner(own, accelerator, strategy=strategy, make_policy=again, **how)


def without_adapters(loaded: LoadedRecipe) -> Policy:
    """The recipe's model as it is before LoRA."""
    r = loaded.recipe
    return load_policy(r.model.model_copy(update={"lora": None}), base=loaded.base, seed=r.seed)


def open_session(loaded: LoadedRecipe, *, sharded: bool = True) -> Session:
    """Builds all of it. InputError for anything that the user can mend; no model is loaded before data and verifier are known good.

    sharded: False = the model whole on this process whatever learner.strategy says: for a look at the recipe.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    check_plugins(loaded)
    r = loaded.recipe
    rule, environment = build_rule(r.rule, loaded.base), environment_of(loaded)
    collect_fits(loaded, rule)
    if r.engine.max_staleness and not any(getattr(t.fn, "corrects_mismatch", False) for t in rule.loss):
        raise InputError(
            f"{loaded.where('engine.max_staleness')}: rollouts of older weights need a rule that corrects for them, and {r.rule.use} as it is set does "
            'not; set rule.mismatch = "token_truncate" (or another of its forms), or engine.max_staleness = 0'
        )
    if r.engine.max_staleness and r.max_generated_tokens:
        raise InputError(f"{loaded.where('max_generated_tokens')}: not with engine.max_staleness: rollouts under way would be thrown away; set one of them")
    if r.model.lora is not None and r.warm_start is not None and rule.needs.ref_logp:
        raise InputError(
            f"{loaded.where('model.lora')}: with LoRA the reference model is the model without adapters, which a warm start leaves behind; run the "
            "warm start first (llmrl sft, llmrl export) and set model.path to what it wrote, or leave the KL term out"
        )
    _four_bits_fit(loaded, r.learner.strategy)
    if r.model.lora is not None and rule.needs.ref_every:
        raise InputError(
            f"{loaded.where('model.lora')}: with LoRA the reference model is the model without adapters, and {r.rule.use} wants the policy at the start "
            "of each round; train all weights, or use the rule with a fixed reference (exp_dpo: mode = \"offline\")"
        )
    tables = read_tables(loaded, load_tokenizer(r.model, base=loaded.base))
    _trackers_exist(loaded)
    scorer = scorer_of(loaded)
    engine: Any = None
    try:
        plan = resolve_strategy(loaded) if sharded else None
        _four_bits_fit(loaded, plan[0] if plan else "ddp")
        accelerator = Accelerator(cpu=not torch.cuda.is_available(), log_with=list(r.run.trackers) or None, project_dir=r.run.dir)
        if accelerator.device.type == "cpu":
            _keep_freed_memory()
        set_seed(r.seed)
        policy = load_policy(r.model, base=loaded.base, seed=r.seed, device=accelerator.device)
        connect = plugins.use(r.engine.use, r.engine.kwargs, home=HOMES["engine"], base=loaded.base, where="[engine]")
        engine = connect(policy)
        if r.engine.max_staleness and getattr(engine, "colocated", False):
            raise InputError(f"{loaded.where('engine.max_staleness')}: colocated servers sleep while the learner learns; set max_staleness = 0")
        if r.engine.max_staleness > 1 and not getattr(engine, "streams", False):
            raise InputError(
                f"{loaded.where('engine.max_staleness')}: with engine {r.engine.use} all rollouts end before the weights change, so that more than 1 only "
                'makes them older; set engine.max_staleness = 1, or use vLLM servers (engine.use = "vllm")'
            )
        _fits(loaded, tables, engine)
        sampling = sampling_of(r)
        learner = make_learner(loaded, plan, policy, accelerator, sampling.temperature, engine)
        if r.rollout.prompts % accelerator.num_processes:
            raise InputError(f"rollout.prompts = {r.rollout.prompts} cannot be shared by {accelerator.num_processes} processes evenly")
        stream = PromptStream(tables.train, seed=r.seed, rank=accelerator.process_index, world=accelerator.num_processes, shuffle=r.data.shuffle)
    except BaseException:
        scorer.close()
        if hasattr(engine, "close"):
            engine.close()
        raise
    ahead = Ahead(r.engine.max_staleness)
    return Session(
        loaded, rule, tables, scorer, accelerator, policy, learner, engine, sampling, stream, credit_state=rule.credit.init(), environment=environment,
        ahead=ahead,
    )  # fmt: skip


def _trackers_exist(loaded: LoadedRecipe) -> None:
    from importlib.util import find_spec

    for name in loaded.recipe.run.trackers:
        if not any(find_spec(module) for module in ((name, "tensorboardX") if name == "tensorboard" else (name,))):
            raise InputError(f"{loaded.where('run.trackers')}: {name} is not installed; pip install {name}")


def _fits(loaded: LoadedRecipe, tables: Tables, engine: Any) -> None:
    limit = getattr(engine, "max_length", None)
    need = tables.longest + loaded.recipe.rollout.max_new_tokens
    if limit and need > limit:
        raise InputError(
            f"{loaded.where('rollout.max_new_tokens')}: the longest prompt has {tables.longest} tokens; with max_new_tokens = "
            f"{loaded.recipe.rollout.max_new_tokens} that is {need}, and the model has {limit} positions; lower it, or set data.max_prompt_tokens"
        )


def check_run_folder(loaded: LoadedRecipe, *, resume: bool, overwrite: bool) -> None:
    """Refuses a run directory that holds something else than this command is about; touches nothing. Rank 0 decides for all."""
    folder = Path(loaded.recipe.run.dir)
    if os.environ.get("RANK", "0") != "0":
        return
    ours = (folder / "manifest.json").is_file()
    used = folder.exists() and any(not p.name.startswith(".") for p in folder.iterdir())  # a killed write leaves a hidden part file
    if resume and not ours:
        raise InputError(f"--resume: {folder} holds no run (no manifest.json); start it without --resume")
    if used and not resume and not overwrite:
        raise InputError(f"{folder} already holds a run; continue it with --resume, replace it with --overwrite, or choose another with run.dir=...")
    if used and overwrite and not resume and not ours:
        raise InputError(f"--overwrite: {folder} is not empty and is no run of llmrl (no manifest.json); it is left alone")


def make_run_folder(loaded: LoadedRecipe, *, overwrite: bool) -> Path:
    """The run directory, emptied of an earlier run under `overwrite`. Only once everything else is known to be good."""
    folder = Path(loaded.recipe.run.dir)
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
