"""`llmrl rules`: every rule with its paper, what it needs and what it costs; `llmrl rules NAME`: its docstring and keywords.

All of it is read off the rule: the docstring, the signature, and the `Needs` of the rule as its defaults build it. A factory may have the attribute
`cost`, a line on rollouts or forwards that these do not show ("" = there are none, though its collect is its own).
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class RuleFacts:
    name: str
    line: str
    """The first sentence of the docstring."""
    papers: list[str]
    """arXiv numbers named in the docstring, the rule's own first."""
    needs: list[str]
    cost: list[str]
    """What a step costs beyond sampling, one forward and one backward."""
    keywords: dict[str, str]
    """name -> annotation and default, as Python writes them"""
    docstring: str
    file: str


def rules(
    name: Annotated[str | None, typer.Argument(help="A rule, e.g. canon, or ./mine.py:mine; without it all shipped ones are listed")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Machine-readable output on stdout, nothing else.")] = False,
) -> None:
    """List the update rules, or print one's formula, defaults and differences."""
    from llmrl import plugins
    from llmrl.config import HOMES

    names = [name] if name else sorted(plugins.available(HOMES["rule"]))
    found = [facts_of(n) for n in names]
    if json_:
        sys.stdout.write(json.dumps([asdict(f) for f in found] if name is None else asdict(found[0])) + "\n")
    elif name:
        sys.stdout.write(one(found[0]))
    else:
        sys.stdout.write(table(found))


def facts_of(ref: str, base: Path | None = None) -> RuleFacts:
    """What is known of a rule without running it. Raises InputError for a reference to nothing."""
    from llmrl import plugins
    from llmrl.config import HOMES

    where = base or Path()
    factory = plugins.resolve(ref, home=HOMES["rule"], base=where)
    doc = inspect.getdoc(factory) or ""
    about = f"{doc}\n{inspect.getdoc(inspect.getmodule(factory)) or ''}"
    needs, cost = _needs_and_cost(factory, ref, where)
    keywords = {
        key: inspect.formatannotation(note).replace("typing.", "") + ("" if default is plugins.REQUIRED else f" = {default!r}")
        for key, (note, default) in plugins.signature_of(factory).items()
    }  # fmt: skip
    papers = list(dict.fromkeys(re.findall(r"\b(\d{4}\.\d{5})\b", doc) or re.findall(r"\b(\d{4}\.\d{5})\b", about)))
    file = plugins.source_file(ref, home=HOMES["rule"], base=where)
    return RuleFacts(ref, _sentence(doc), papers, needs, cost, keywords, doc, file.name)


def _sentence(doc: str) -> str:
    """The first line up to where it names its source."""
    line = doc.splitlines()[0] if doc else "(no docstring)"
    return re.sub(r"(?<=\.)\s+arXiv:.*$", "", line).strip()


def _needs_and_cost(factory: Callable[..., Any], ref: str, base: Path) -> tuple[list[str], list[str]]:
    from llmrl import plugins
    from llmrl.config import HOMES

    missing = [key for key, (_, default) in plugins.signature_of(factory).items() if default is plugins.REQUIRED]
    extra = [text for text in [getattr(factory, "cost", None)] if text]
    needs = [f"key {key}" for key in missing]
    if getattr(factory, "min_group", 2) > 1:
        needs.append(f"groups of {getattr(factory, 'min_group', 2)} or more")
    if missing:
        return needs, extra or ["depends on its keys"]
    rule = plugins.use(ref, {}, home=HOMES["rule"], base=base, where="[rule]")
    n = rule.needs
    needs += [text for on, text in ((n.ref_logp, "reference model"), (n.whole_groups, "whole groups in a micro-batch")) if on]
    asked = {"old_logp": n.old_logp, "old_entropy": n.old_entropy, "ref_logp": n.ref_logp, "hidden states": bool(n.hidden)}
    forwards = [what for what, on in asked.items() if on]
    cost = [f"{len(forwards)} forward{'s' if len(forwards) > 1 else ''} more ({', '.join(forwards)})"] if forwards else []
    cost += ["entropy with gradient"] if n.entropy else []
    collect = _collect_name(rule)
    if collect == "dynamic_groups":
        extra = ["refills prompts of equal scores", *extra]
    elif collect != "sample_groups" and not hasattr(factory, "cost"):
        extra = ["a collect of its own: see its docstring"]
    return needs, cost + extra


def _collect_name(rule: Any) -> str:
    return getattr(getattr(rule.collect, "func", rule.collect), "__name__", "")


def table(found: list[RuleFacts]) -> str:
    """One rule a paragraph: as wide as a terminal of any width reads well."""
    out = []
    for f in found:
        out.append(f"{f.name}  {f.line}")
        paper = "arXiv " + ", ".join(f.papers) if f.papers else "no paper"
        out.append(f"    {paper} | needs {', '.join(f.needs) or 'nothing more'} | cost {'; '.join(f.cost) or 'nothing more'}")
    return "\n".join(out) + "\n\nllmrl rules NAME: formula, defaults, differences. In a recipe: [rule] use = \"NAME\" and its keywords.\n"


def one(f: RuleFacts) -> str:
    keys = "\n".join(f"  {name}: {text}" for name, text in f.keywords.items())
    return f"{f.docstring}\n\nneeds: {', '.join(f.needs) or 'nothing more'}\ncost: {'; '.join(f.cost) or 'nothing more'}\nfile: {f.file}\n\nkeywords:\n{keys}\n"
