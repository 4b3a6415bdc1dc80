"""ExPO: the identities of its specification (section 11), token by token; what is sampled, filtered, hidden, kept and trained."""

import asyncio
import json
import math

import pytest
import torch
from accelerate import Accelerator
from torch.testing import assert_close

from llmrl.batch import evaluate_terms, global_denominators, pack
from llmrl.chat import Chat, char_tokenizer
from llmrl.engine import TableEngine
from llmrl.hf_engine import HFEngine
from llmrl.learner import Learner
from llmrl.memory import Memory
from llmrl.plugins import resolve, use
from llmrl.recipe import Optim
from llmrl.records import InputError, Prompt, Sampling, Verdict
from llmrl.rollout import RolloutIO
from llmrl.rules import explanations as x
from llmrl.rules import expo as expo_file
from llmrl.rules import grpo as family
from llmrl.step import view_of
from llmrl.templates import Template
from tests.builders import tiny_policy

torch.set_num_threads(1)
LETTERS = "0123456789+-*=;#()@ ?SECRTxyz:"
TINY = {"template": "tiny", "marks": ("#",), "cut": "mark", "answer_format": "#{answer}", "min_tokens": 3, "hints": ("xyz",)}
PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"{i}+1="},), str(i + 1), {"solution": f"{i}+1=x{i}#{i + 1}"}) for i in range(3)]


class Exact:
    """Right iff what follows the last # is the answer; "?" cannot be judged; no # is no answer."""

    def score(self, items):
        def one(p, t):
            if "?" in t:
                return Verdict(None, "timeout")
            return Verdict(float(t.rpartition("#")[2] == p.answer), "ok") if "#" in t else Verdict(0.0, "no_answer")

        return [one(p, t) for p, t in items]


def rule_of(tmp_path, **keys):
    return use("expo", {**TINY, **keys}, home="llmrl.rules", base=tmp_path, where="[rule]")


def make_io(reply, *, memory=None, step=1, group=2, limit=16, steps=10, engine=None, chat=None):
    chat = chat or Chat(char_tokenizer(LETTERS))
    return RolloutIO(engine or TableEngine(chat, reply), Exact(), chat, memory or Memory(), Sampling(limit), group, (0, step), steps=steps)


def replies(table, own="0#0"):
    """Explanations by (prompt id, attempt), or by prompt id for all attempts; the policy's own samples say `own`."""
    asked = []

    def reply(r):
        asked.append(r)
        if "explain" not in r.seed:
            return own
        name, attempt = str(r.seed[2]).split("~")[0], r.seed[-1]
        return table.get((name, attempt), table.get(name, "5+5+5#9"))

    reply.asked = asked
    return reply


def collect(rule, io, prompts=PROMPTS):
    return asyncio.run(rule.collect(prompts, io))


def explained(groups):
    return [s for g in groups for s in g.samples if s.role == "explanation"]


def right(i):
    return f"{i}+1={i + 1};#{i + 1}"


# ---------------------------------------------------------------- on a real model


def policy_and_learner():
    policy = tiny_policy(hidden=32, ffn=64, alphabet=LETTERS)
    with torch.no_grad():
        for p in policy.model.parameters():
            if p.dim() == 2:
                p.mul_(4.0)
    learner = Learner(policy, Accelerator(cpu=True), head_chunk=7)
    learner.start(Optim(lr=1e-2, clip_norm=0.0))
    return policy, learner


def gradient(learner, rule, groups, *, tokens=10**6):
    """(loss shares, gradient by name) of one update on these groups."""
    samples = [s for g in groups for s in g.samples]
    adv_T, _ = rule.credit.update(view_of(samples, learner, 16), rule.credit.init())
    adv = list(adv_T.split([len(s.token_ids) for s in samples]))
    denominators = global_denominators(samples, rule.loss, max_new_tokens=16, groups=len(groups))
    total = {}
    for batch in pack(samples, adv, tokens=tokens):
        loss, shares = evaluate_terms(rule.loss, batch, learner.forward(batch, rule.needs), denominators)
        learner.backward(loss)
        total = {k: total.get(k, 0.0) + v for k, v in shares.items()}
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learner.params}
    for _, p in learner.params:
        p.grad = None
    return total, grads


def same(one, other, exact=False):
    for name in one:
        assert_close(one[name], other[name], **({"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-7}))


def scripted(policy, table, own):
    """Groups whose own samples carry the real log-probs of the scripted texts."""
    io = make_io(replies(table, own), chat=policy.chat, limit=24)
    real = HFEngine(policy)
    io.engine.score = real.score
    return io


def test_beta_zero_is_grpo_bit_for_bit(tmp_path):
    """Identity 1: loss, gradient and rollouts; explanations draw from streams of their own."""
    policy, learner = policy_and_learner()
    ios = [make_io(None, engine=HFEngine(policy), chat=policy.chat) for _ in range(3)]
    rules = [family.grpo(), rule_of(tmp_path, beta=0.0), rule_of(tmp_path, resample=0, source="solution")]
    runs = [collect(rule, io) for rule, io in zip(rules, ios, strict=True)]
    own = [[(s.id, s.token_ids, s.behavior_logp) for g in groups for s in g.samples if s.role == "policy"] for groups in runs]
    assert own[0] == own[1] == own[2] and len(explained(runs[2])) == 3
    assert [t.label for t in rules[1].loss] == ["pg_clip"] and ios[0].generated == ios[1].generated and not ios[1].noted
    for groups in runs[:2]:  # an untrained model is never right: give the groups something to learn from
        for g in groups:
            g.samples[0].reward = 1.0
    one, other = (gradient(learner, rule, groups) for rule, groups in zip(rules[:2], runs, strict=False))
    assert one[0] == other[0] and max(float(g.abs().max()) for g in one[1].values()) > 0
    same(one[1], other[1], exact=True)


def test_an_all_wrong_group_learns_from_the_explanation_alone(tmp_path):
    """Identities 2, 5, 7: the gradient is beta times that of the masked NORM(-log pi(y~|q)) of a plain forward; mean and sum differ by |y~|."""
    policy, learner = policy_and_learner()
    prompts = PROMPTS[:2]  # p1 is never explained: B = 2 divides all the same
    grads = {}
    for norm, beta in (("mean", 0.04), ("mean", 0.08), ("sum", 0.04)):
        rule = rule_of(tmp_path, norm=norm, beta=beta)
        groups = collect(rule, scripted(policy, {"p0": right(0)}, "1#7"), prompts)
        shares, grads[norm, beta] = gradient(learner, rule, groups)
        assert shares["pg_clip"] == 0.0
    (sample,) = explained(groups)
    ids = torch.tensor([sample.context_ids + sample.token_ids])
    labels = torch.tensor([[-100] * len(sample.context_ids) + sample.token_ids])  # loss on c~, the answer and the end token; none on the prompt
    policy.model.set_attn_implementation("eager")
    logits = policy.model(ids).logits[0, :-1].float()
    logits.retain_grad()
    allowed = logits.index_fill(1, torch.tensor(sorted(policy.banned_ids)), -torch.inf)  # tokens that are never sampled
    nll = torch.nn.functional.cross_entropy(allowed, labels[0, 1:], ignore_index=-100, reduction="sum")
    (0.04 * nll / 2).backward()
    n = len(sample.token_ids)
    want = {name: p.grad.clone() for name, p in learner.params}
    same(grads["sum", 0.04], want)
    same(grads["mean", 0.04], {k: v / n for k, v in want.items()})
    same(grads["mean", 0.08], {k: 2 * v for k, v in grads["mean", 0.04].items()})
    assert (logits.grad[: len(sample.context_ids) - 1] == 0).all() and (logits.grad[len(sample.context_ids) - 1 :].abs().sum(-1) > 0).all()


def test_however_the_batch_is_cut_the_gradient_is_the_same(tmp_path):
    policy, learner = policy_and_learner()
    rule = rule_of(tmp_path)
    groups = collect(rule, scripted(policy, {p.id: right(i) for i, p in enumerate(PROMPTS)}, "1#1"))
    same(gradient(learner, rule, groups)[1], gradient(learner, rule, groups, tokens=1)[1])


def test_chain_rule(tmp_path):
    """Identity 6: log pi(c~|q) + log pi(a*|q, c~) is the summed log-prob of y~."""
    policy, _ = policy_and_learner()
    groups = collect(rule_of(tmp_path), scripted(policy, {"p0": right(0)}, "1#7"), PROMPTS[:1])
    (s,) = explained(groups)
    engine, cut = HFEngine(policy), len("0+1=1;")
    (whole, reasoning, answer) = engine.score(
        [(s.context_ids, s.token_ids), (s.context_ids, s.token_ids[:cut]), (s.context_ids + s.token_ids[:cut], s.token_ids[cut:])]
    )
    assert policy.chat.text(s.token_ids[cut:]) == "#1"
    assert sum(whole) == pytest.approx(sum(reasoning) + sum(answer), abs=1e-4)


def test_expert_solutions_go_the_same_way(tmp_path):
    """Identity 8: with the solution set to what the policy explains, both give the same samples."""
    texts = {f"p{i}": right(i) for i in range(3)}
    prompts = [Prompt(p.id, p.messages, p.answer, {"solution": texts[p.id]}) for p in PROMPTS]
    one, other = (explained(collect(rule_of(tmp_path, source=source), make_io(replies(texts)), prompts)) for source in ("self", "solution"))
    assert [vars(s) for s in one] == [vars(s) for s in other] and len(one) == 3
    with pytest.raises(InputError, match=r'row p0: source = "solution" needs the dataset\'s solutions'):
        collect(rule_of(tmp_path, source="solution"), make_io(replies({})), [Prompt("p0", PROMPTS[0].messages, "1")])


# ---------------------------------------------------------------- hidden answer, no member of the group


def test_the_explanation_is_no_member_of_its_group(tmp_path):
    """Identity 4: advantages with and without it are the same numbers; it has none itself."""
    rule = rule_of(tmp_path)
    groups = collect(rule, make_io(replies({"p0": right(0)}, own="1#1"), group=4))
    for g in groups:
        g.samples[1].reward = 0.5
    with_, without = [s for g in groups for s in g.samples], [s for g in groups for s in g.samples if s.role == "policy"]
    assert len(with_) == len(without) + 1

    class One:
        def all_sum(self, v):
            return v

        def gather(self, v):
            return [v]

    def adv(samples):
        a_T, _ = rule.credit.update(view_of(samples, One(), 16), rule.credit.init())
        return {s.id: a.tolist() for s, a in zip(samples, a_T.split([len(s.token_ids) for s in samples]), strict=True)}

    a, b = adv(with_), adv(without)
    assert {k: a[k] for k in b} == b and any(v != 0 for row in b.values() for v in row)
    (e,) = explained(groups)
    assert set(a[e.id]) == {0.0} and e.reward is None and e.behavior_logp is None and e.weights == {"explained": 1.0}


HOSTILE = {
    "chat": "SECRET{answer}SECRET {question}", "twice": "{answer}{question}{answer}SECRET", "system": "SECRET {answer}\n---\n{question}SECRET{answer}",
    "after": "{question}@{answer}@\n---\n{question}:SECRET",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_template_leaks_into_a_training_context(tmp_path, name):
    """Identity 3, as tokens and as text: only the sampling context knows the answer."""
    (tmp_path / "mine.txt").write_text(HOSTILE[name])
    prompts = [Prompt(f"p{i}", ({"role": "system", "content": "xyz"}, {"role": "user", "content": f"{i}+1="}), f"77{i}") for i in range(3)]
    reply = replies({f"p{i}": f"{i}+1=x;#77{i}" for i in range(3)})
    io = make_io(reply)
    groups = collect(rule_of(tmp_path, template="./mine.txt"), io, prompts)
    assert len(explained(groups)) == 3
    seen = [io.chat.show(r.context_ids) for r in reply.asked if "explain" in r.seed]
    assert all("SECRET" in text and "77" in text for text in seen)
    for g in groups:
        for s in g.samples:
            assert s.context_ids == io.chat.prompt_ids(g.prompt.messages) == g.samples[0].context_ids
            assert "SECRET" not in io.chat.show(s.context_ids) and "77" not in io.chat.show(s.context_ids)
        assert g.samples[-1].token_ids == io.chat.completion_ids(f"{g.prompt.id[1]}+1=x;#{g.prompt.answer}")


def test_templates_must_show_question_and_answer(tmp_path):
    for text, told in (("{question}", r"must contain \{answer\}"), ("{answer}", r"must contain \{question\}"), ("{question}{answer}{x}", r"no field \{x\}")):
        (tmp_path / "mine.txt").write_text(text)
        with pytest.raises(InputError, match=told):
            rule_of(tmp_path, template="./mine.txt")
    for kind in ("chat", "tiny"):
        rule_of(tmp_path, template=kind)


# ---------------------------------------------------------------- section 4.1


def test_filters_and_resampling(tmp_path):
    """Wrong, short, cut off, hinting and unjudged texts are sampled again, three times at most, each try from a stream of its own."""
    table = {
        ("p0", 0): "0+1=2#2", ("p0", 1): "0+1=1+1+1+1+1+1+1", ("p0", 2): "#1", ("p0", 3): right(0),  # contradicts, length, short, accepted
        ("p1", 0): "1 x yz?", ("p1", 1): "1+1 xyz 2#2", ("p1", 2): "1+1=2",  # unjudged, hint, states no answer: accepted
        "p2": "2+1=9#9",  # never right
    }  # fmt: skip
    reply = replies(table)
    io = make_io(reply, limit=16)
    groups = collect(rule_of(tmp_path), io)
    assert [(s.id, s.text) for s in explained(groups)] == [("p0/explained0", "0+1=1;#1"), ("p1/explained0", "1+1=2#2")]
    tried = [r.seed[2:] for r in reply.asked if "explain" in r.seed]
    assert len(tried) == len(set(tried)) == 4 + 3 + 4 and ("p2", "explain", 0, 3) in tried
    share = {k.removeprefix("rule/explained/"): v[0] / v[1] for k, v in io.noted.items() if "explained" in k and v[1]}
    assert share["accepted_share"] == 2 / 3
    assert [round(11 * share[f"{r}_share"]) for r in ("contradicts", "length", "short", "hint", "unjudged")] == [5, 1, 1, 1, 1]
    assert io.noted["rule/all_wrong_share"] == [3, 3]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Add them: 2+2=4. So the final answer is $\\boxed{4}$.", "Add them: 2+2=4. "),
        ("First.\n\nThe final answer is:\n\\[\n\\boxed{4}\n\\]", "First.\n\n"),
        ("Let the boxed\nx = 3.\n$$\n\\boxed{4}\n$$", "Let the boxed\nx = 3.\n"),
        ("The answer is near. We check it.\nThus \\boxed{4}", "The answer is near. We check it.\n"),
        ("No statement at all.", "No statement at all."),
        ("\\boxed{4}", ""),
    ],
)
def test_where_the_statement_begins(text, kept):
    how = x.Explainer(Template("{question}{answer}"), expo_file.ANSWER)
    assert text[: how.reasoning_ends(text)] == kept


def byte_pair_chat(texts):
    """A tokenizer whose tokens are longer than a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return Chat(PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<eos>"))


def test_cuts_fall_between_sampled_tokens():
    """The kept ids are a prefix of the sampled ids, whatever the tokenizer would make of the text; a token across the cut goes."""
    text = "We add \u00e9 2 and 2. Then 4. The final answer is $\\boxed{4}$."
    chat = byte_pair_chat(["We add", " 2 and ", "4. The", " final answer is", " $\\boxed", ". Then"] * 20)
    how = x.Explainer(Template("{question}{answer}"), expo_file.ANSWER)
    io = make_io(None, chat=chat, engine=object())
    ids = chat.completion_ids(text)
    made = how.target(ids, "4", 3, io)
    assert ids[: len(made.reasoning)] == made.reasoning and 0 < len(made.reasoning) < len(ids) - 3
    assert "final" not in chat.text(made.reasoning) and "We add \u00e9 2 and 2." in text[: len(chat.text(made.reasoning))]
    assert made.suffix[-1] == chat.tokenizer.eos_token_id and made.text.endswith("The final answer is $\\boxed{4}$.") and made.version == 3
    letters = [chat.tokenizer.convert_tokens_to_ids(c) for c in chat.tokenizer.convert_ids_to_tokens(ids) for c in c]  # the same text in one-byte tokens
    other = how.target(letters, "4", 3, io)
    assert other.reasoning == letters[: len(other.reasoning)] and chat.text(other.reasoning) == "We add \u00e9 2 and 2. Then 4. "


# ---------------------------------------------------------------- options


def test_refresh_keeps_explanations_in_the_memory(tmp_path):
    memory = Memory()
    for refresh, asked_at in (("once", [1]), (3, [1, 4, 7]), ("always", list(range(1, 8)))):
        memory, asked = Memory(), []
        for step in range(1, 8):
            reply = replies({"p0": "0+1=1" + "+" * step + "#1"})
            groups = collect(rule_of(tmp_path, refresh=refresh), make_io(reply, memory=memory, step=step), PROMPTS[:1])
            (s,) = explained(groups)
            if any("explain" in r.seed for r in reply.asked):
                asked.append(step)
            assert s.text == "0+1=1" + "+" * asked[-1] + "#1"
            memory.end_step()
            state = json.loads(json.dumps(memory.state_dict()))  # as a checkpoint would carry it
            memory = Memory()
            memory.load_state_dict(state)
        assert asked == asked_at


def test_weights_of_annealing_and_of_several_explanations(tmp_path):
    table = {"p0": right(0)}
    for step, weight in ((1, 0.5), (6, 0.25), (10, 0.05)):
        groups = collect(rule_of(tmp_path, anneal="linear", explanations=2), make_io(replies(table), step=step), PROMPTS[:1])
        assert [s.weights["explained"] for s in explained(groups)] == pytest.approx([weight] * 2)


def test_only_all_wrong_and_the_comparisons(tmp_path):
    texts = {f"p{i}": right(i) for i in range(3)}
    groups = collect(rule_of(tmp_path, only_all_wrong=True), make_io(replies(texts, own="1#2")))  # right for p1 alone
    assert [s.prompt_id for s in explained(groups)] == ["p0", "p2"]
    assert [t.label for t in rule_of(tmp_path, policy=False).loss] == ["explained"]
    rule = rule_of(tmp_path, in_group=True)
    assert [t.label for t in rule.loss] == ["pg_clip"]
    s = explained(collect(rule, make_io(replies(texts))))[0]
    assert (s.reward, s.cohort, s.weights) == (1.0, "p0", {"policy": 1.0})
    reply = replies({"p0": "0+1=2;#2", "p1": "1+1=3;#3", "p2": "2+1=1;#1"})  # shuffled: the next prompt's answer is shown, verified and trained
    io = make_io(reply)
    groups = collect(rule_of(tmp_path, shuffle_answers=True), io)
    assert [s.text for s in explained(groups)] == ["0+1=2;#2", "1+1=3;#3", "2+1=1;#1"]
    assert [io.chat.text(r.context_ids) for r in reply.asked if "explain" in r.seed] == ["0+1=@2@", "1+1=@3@", "2+1=@1@"]


def test_keys_are_checked(tmp_path):
    for keys, told in (({"beta": -1.0}, "beta"), ({"answer_format": "#"}, r"\{answer\}"), ({"refresh": 0}, "refresh"), ({"marks": ()}, "marks")):
        with pytest.raises(InputError, match=told):
            rule_of(tmp_path, **keys)
    assert resolve("exp_dpo", home="llmrl.rules", base=tmp_path) is expo_file.exp_dpo
    with pytest.raises(InputError, match=r'mode = "offline" goes with pairs'):
        use("exp_dpo", {**TINY, "mode": "offline"}, home="llmrl.rules", base=tmp_path, where="[rule]")


def test_gradient_ratio_by_hand(tmp_path):
    """One group of two, rewards 1 and 0, A = +-0.7071; log-prob of every token ln 1/2. Explanation of 8 tokens, beta 0.04."""
    io = make_io(replies({"p0": right(0)}))
    io.engine.logp = math.log(0.5)
    io.engine.reply = lambda r: right(0) if "explain" in r.seed else ("0#1" if r.seed[-1] == 0 else "0#2")
    collect(rule_of(tmp_path), io, PROMPTS[:1])
    n = len(right(0)) + 1
    explained_norm = 0.04 / n * 0.5 * math.sqrt(n)
    policy_norm = 0.5 * 0.707106 / 4 / 2 * math.sqrt(8)  # two samples of 4 tokens
    assert io.noted["rule/logit_grad_ratio"][0] == pytest.approx(explained_norm / policy_norm, rel=1e-4)
