"""manifest.json: what made a run (resolved recipe, versions, plug-in hashes, seeds), and the check that a resume is the same run."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrl import __version__
from llmrl.checkpoint import write_atomic
from llmrl.compose import parts
from llmrl.config import HOMES, LoadedRecipe
from llmrl.plugins import source_hash
from llmrl.quantize import sizes
from llmrl.recipe import RulePlugin
from llmrl.records import InputError

if TYPE_CHECKING:
    from llmrl.session import Session

MAY_CHANGE = ("run.", "checkpoint.", "scoring.workers", "scoring.concurrency", "learner.", "engine.servers", "engine.folder")
"""Keys that do not change what is computed."""


def _inside(keywords: dict[str, Any]) -> list[str]:
    """The plug-ins named within the keywords of another one, however deep: the `parts` of a combine, what a process reward is made `of`."""
    named = keywords.get("parts")
    tables = [t for t in (*(named if isinstance(named, list) else []), keywords.get("of")) if isinstance(t, dict) and isinstance(t.get("use"), str)]
    return [ref for t in tables for ref in (t["use"], *_inside(t))]


def plugin_hashes(loaded: LoadedRecipe) -> dict[str, str]:
    """sha256 of the source file behind each plug-in reference, those inside a verifier and the parts of a composed rule included."""
    hashes = {}
    for section, home in HOMES.items():
        spec = getattr(loaded.recipe, section)
        if spec is None:
            continue
        refs = [(ref, home) for ref in (spec.use, *_inside(spec.kwargs))]
        refs += [(part.use, at) for _, part, at in parts(spec)] if isinstance(spec, RulePlugin) else []
        hashes |= {f"{section}:{ref}": source_hash(ref, home=at, base=loaded.base) for ref, at in refs}
    return hashes


def write_manifest(folder: Path, session: Session) -> None:
    """Writes manifest.json."""
    loaded = session.loaded
    model, tables = session.policy.model, session.tables
    weights, packed, held = sizes(model)
    text = json.dumps(
        {
            "llmrl": __version__, "recipe_file": str(loaded.path), "recipe": loaded.recipe.model_dump(mode="json"), "origins": loaded.origins,
            "plugins": plugin_hashes(loaded), "seed": loaded.recipe.seed, "processes": session.world, "device": str(session.policy.device),
            "verifier": session.scorer.about, "learner": session.learner.held.facts(),
            "model": {
                "class": type(model).__name__, "parameters": weights, "dtype": str(model.dtype).removeprefix("torch."),
                **({"four_bit_parameters": packed, "bytes": held} if packed else {}),
                "banned_ids": list(session.policy.banned_ids), "stop_ids": sorted(session.policy.stop_ids),
            },
            "rows": {"train": len(tables.train), "held_out": len(tables.held_out), "dropped": tables.dropped, "overlap": tables.overlap},
            "versions": {"python": platform.python_version(), **{p: _version(p) for p in ("torch", "transformers", "accelerate", "datasets", "math-verify")}},
        },
        indent=2,
    )  # fmt: skip
    write_atomic(folder / "manifest.json", text + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_resume(loaded: LoadedRecipe) -> None:
    """Refuses to resume under another recipe or another plug-in source; names every difference."""
    path = Path(loaded.recipe.run.dir) / "manifest.json"
    then = json.loads(path.read_text(encoding="utf-8"))
    old, new = _flat(then["recipe"]), _flat(loaded.recipe.model_dump(mode="json"))
    changed = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k) and not k.startswith(MAY_CHANGE)]
    lines = [f"{k}: was {old.get(k)!r}, is {new.get(k)!r}" for k in changed]
    now = plugin_hashes(loaded)
    lines += [f"{ref}: its source file has changed" for ref, digest in then["plugins"].items() if now.get(ref, digest) != digest]
    if lines:
        raise InputError(f"--resume: {path.parent} was started with another recipe; a resumed run must be the same run:\n  " + "\n  ".join(lines))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{prefix}.{key}" if prefix else str(key)).items()}
