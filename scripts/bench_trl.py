"""For bench.py: the model of both sides, TRL's side, and how exact the vocabulary heads of both sides are. Runs in a process of its own."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench import CLIP_NORM, LR, Shape, peak_gb, reward_of, run_task


def build_model(shape: Shape, steps: int, folder: str, work: Path) -> dict[str, Any]:
    """A transformers folder that both sides load: made in `folder`, or the converted SmolLM2 in the user's cache."""
    from llmrl.models import _converted, find_smollm2

    if shape.name == "smollm2":
        return {"folder": str(_converted(find_smollm2()))}
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    corpus = [f"{shape.question(p)} The answer is {p}." for p in range(2000)]
    special, letters = ["<pad>", "<bos>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=letters))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=684, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"folder": folder}


class ForcedLengths:
    """A logits processor: no end token before a row's last place, nothing but the end token there."""

    def __init__(self, lengths: list[int], prompt_length: int, end_ids: list[int]):
        self.last, self.prompt_length, self.end_ids = torch.tensor(lengths) - 1, prompt_length, end_ids

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.prompt_length
        scores[:, self.end_ids] = -torch.inf  # generate hands over a copy of its own
        ends = (self.last == place).nonzero()[:, 0]
        scores[ends] = -torch.inf
        scores[ends, self.end_ids[0]] = 0.0
        return scores


class Watch:
    """Times and counts inside a GRPOTrainer, without changing what it computes."""

    def __init__(self, trainer: Any, shape: Shape):
        self.trainer, self.shape = trainer, shape
        self.seconds: Counter[str] = Counter()
        self.row: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.lengths: list[int] = []
        self.rewards: list[float] = []
        self.time("_generate_single_turn", "generate")
        self.time("_calculate_rewards", "score")
        self.wrap_rewards()
        self.wrap_prepare()
        self.wrap_forward()
        generate = trainer.model.generate

        def forced(**inputs: Any) -> Any:
            rule = ForcedLengths(self.lengths, inputs["input_ids"].shape[1], list(trainer.eos_token_ids))
            return generate(**inputs, logits_processor=[rule])

        trainer.model.generate = forced

    def time(self, method: str, name: str) -> None:
        plain = getattr(self.trainer, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            out = plain(*args, **kwargs)
            self.seconds[name] += time.perf_counter() - began
            return out

        setattr(self.trainer, method, timed)

    def wrap_rewards(self) -> None:
        plain = self.trainer._calculate_rewards

        def rewards(*args: Any, **kwargs: Any) -> Any:
            out = plain(*args, **kwargs)
            self.rewards = out[:, 0].tolist()
            return out

        self.trainer._calculate_rewards = rewards

    def wrap_prepare(self) -> None:
        self.time("_generate_and_score_completions", "prepare")
        plain = self.trainer._generate_and_score_completions

        def prepare(inputs: list[dict[str, Any]]) -> Any:
            group = self.shape.group
            self.lengths = [self.shape.length_of(x["row"], i % group) for i, x in enumerate(inputs)]
            out = plain(inputs)
            got = out["completion_mask"].sum(1).tolist()
            self.row |= {"lengths": got, "decode_slots": len(got) * max(got), "prompt_tokens": int(out["prompt_mask"][::group].sum())}
            self.row |= {"advantages": out["advantages"].tolist(), "rewards": self.rewards}
            return out

        self.trainer._generate_and_score_completions = prepare

    def wrap_forward(self) -> None:
        plain = self.trainer._get_per_token_logps_and_entropies

        def forward(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.row.setdefault("forwards", []).append((input_ids.numel(), int(attention_mask.sum())))
            return plain(model, input_ids, attention_mask, *args, **kwargs)

        self.trainer._get_per_token_logps_and_entropies = forward

    def end_step(self, step_s: float, cpu_s: float) -> None:
        s, row = self.seconds, self.row
        forwards = row.pop("forwards")
        places, real = sum(n for n, _ in forwards), sum(n for _, n in forwards)
        times = {"step_s": step_s, "cpu_s": cpu_s, "generate_s": s["generate"], "score_s": s["score"], "update_s": step_s - s["prepare"]}
        padding = 1 - real / places
        counts = {"positions": places, "padding": padding, "attention_padding": padding, "micro_batches": len(forwards)}
        self.rows.append(row | times | {"rest_s": s["prepare"] - s["generate"] - s["score"]} | counts)
        self.seconds, self.row = Counter(), {}


def run_trl(shape: Shape, steps: int, model_folder: str, work: Path) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, shape.dtype))
    rows = [{"prompt": [{"role": "user", "content": shape.question(p)}], "row": p} for p in range(shape.prompts * steps)]

    def reward(completions: list[Any], row: list[int], **_: Any) -> list[float]:
        return [reward_of(p, i % shape.group) for i, p in enumerate(row)]

    config = GRPOConfig(
        per_device_train_batch_size=shape.micro, gradient_accumulation_steps=shape.prompts * shape.group // shape.micro, max_steps=steps,
        num_generations=shape.group, max_completion_length=shape.longest, num_iterations=1, beta=0.0, loss_type="dapo",
        epsilon=0.2, epsilon_high=0.28, temperature=1.0, learning_rate=LR, lr_scheduler_type="constant", max_grad_norm=CLIP_NORM,
        use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, shuffle_dataset=False,
        output_dir=str(work), logging_steps=10**6, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    trainer = GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    watch = Watch(trainer, shape)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            now = time.perf_counter()
            watch.end_step(now - self.began, time.process_time() - self.cpu)
            self.began, self.cpu = time.perf_counter(), time.process_time()

    trainer.add_callback(Clock())
    trainer.train()
    return {"steps": watch.rows, "peak_gb": peak_gb(), "workers_gb": 0.0}


def run_exact(shape: Shape, steps: int, model_folder: str, work: Path) -> dict[str, Any]:
    """Errors of both heads against fp64, on the same hidden states, targets and upstream gradient: one group of prompt 0."""
    import transformers
    import trl
    from bench import ForcedEngine, write_recipe
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from llmrl.batch import pack
    from llmrl.config import load_recipe
    from llmrl.head import head_logp
    from llmrl.hf_engine import HFEngine
    from llmrl.models import load_policy
    from llmrl.records import Request, Sample

    policy = load_policy(load_recipe(write_recipe(shape, steps, model_folder, work)).recipe.model)
    context = policy.chat.prompt_ids([{"role": "user", "content": shape.question(0)}])
    engine: Any = ForcedEngine(HFEngine(policy), shape)
    done = engine.generate([Request(tuple(context), (0, 1, "0", k), None) for k in range(shape.group)])  # type: ignore[arg-type]
    samples = [Sample(str(i), "0", context, c.token_ids, c.logprobs, 0) for i, c in enumerate(done)]
    (batch,) = pack(samples, [torch.zeros(len(s.token_ids)) for s in samples], tokens=10**6)
    weight = policy.head[0].detach()
    with torch.no_grad():
        hidden = policy.hidden(batch.ids_P, batch.positions_P, batch.plan(policy.kernel)).index_select(0, batch.source_T)
    up = torch.randn(len(batch.tokens_T), generator=torch.Generator().manual_seed(0)) / len(batch.tokens_T)

    def run(head: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        h, w = (x.to(dtype).clone().requires_grad_() for x in (hidden, weight))
        logp = head(h, w)
        return tuple(x.double() for x in (logp.detach(), *torch.autograd.grad(logp, (h, w), up.to(logp.dtype))))

    targets = batch.tokens_T
    exact = run(lambda h, w: (h @ w.T).log_softmax(-1).gather(1, targets[:, None])[:, 0], torch.float64)
    ours = run(lambda h, w: head_logp(h, w, None, targets)[0], weight.dtype)
    how = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs", "entropy"))  # as GRPOTrainer calls it
    theirs = run(lambda h, w: ChunkedLogProbFunction.apply(h, w, None, targets, *how)[0], weight.dtype)

    def errors(got: tuple[torch.Tensor, ...]) -> dict[str, float]:
        gap = (got[0] - exact[0]).abs()
        far = [float((a - b).norm() / b.norm()) for a, b in zip(got[1:], exact[1:], strict=True)]
        return {"logp_max": float(gap.max()), "logp_mean": float(gap.mean()), "d_hidden": far[0], "d_weight": far[1]}

    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return {"llmrl": errors(ours), "trl": errors(theirs), "tokens": len(targets), "versions": versions}


if __name__ == "__main__":
    import sys

    run_task(sys.argv[2], {"model": build_model, "trl": run_trl, "exact": run_exact})
