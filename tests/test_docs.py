"""The pages of docs/ say what the code takes: every TOML block is checked against the factories, every link leads somewhere."""

import re
import tomllib
from pathlib import Path

import pytest

from llmrl import plugins, recipe
from llmrl.config import HOMES

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
BLOCKS = [(page.name, n, text) for page in PAGES for n, text in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))]


def refuse_unknown(section: str, values: dict) -> None:
    if section in HOMES:
        kind = recipe.Recipe.model_fields[section].annotation
        plugin = getattr(kind, "__args__", [kind])[0].model_validate(values)  # an optional section: the model or None
        if plugin.use.startswith("./"):  # the README's own example, run in test_cli.py
            return
        factory = plugins.resolve(plugin.use, home=HOMES[section], base=REPO)
        assert plugins.check(factory, plugin.kwargs, name=plugin.use)[1] == []
        for part in plugin.kwargs.get("parts", []):
            refuse_unknown(section, {k: v for k, v in part.items() if k != "weight"})
    else:
        model = recipe.Recipe.model_fields[section].annotation
        model.model_validate(values) if "path" in values or section != "data" else None


@pytest.mark.parametrize(("page", "n", "text"), BLOCKS, ids=[f"{page}-{n}" for page, n, _ in BLOCKS])
def test_every_recipe_block_is_accepted(page, n, text):
    for section, values in tomllib.loads(text).items():
        refuse_unknown(section, values)


def test_every_verifier_has_its_place_on_the_page():
    text = (REPO / "docs" / "verifiers.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| \[`(\w+)", text, re.MULTILINE))
    assert named == set(plugins.available("llmrl.rewards"))
    statuses = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert statuses >= {"ok", "no_answer", "timeout", "error"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    heads = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), target
        assert path or anchor in heads, target
