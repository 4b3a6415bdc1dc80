"""What `llmrl view` does: the samples of a run directory as one page."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from llmrl import plugins
from llmrl.records import InputError
from llmrl.sampling import EVALUATORS, model_folder


def view_run(run_dir: Path, out: Path | None, *, steps: tuple[int, int] | None, cap: int, role: str) -> dict[str, Any]:
    """Decodes with the tokenizer of the last checkpoint, or that of the recipe's model; without either, tokens are not shaded."""
    if not (run_dir / "samples").is_dir():
        raise InputError(f"{run_dir} is no run directory: it has no folder samples")
    chat = _chat(run_dir)
    run_page = plugins.resolve(f"{EVALUATORS}.report_run:run_page", home=EVALUATORS, base=Path())
    result = run_page(run_dir, out or run_dir / "report.html", steps=steps, text=chat.text if chat else None, cap=cap, role=role)
    return result | {"shaded": chat is not None}


def _chat(run_dir: Path) -> Any:
    from llmrl.models import load_tokenizer
    from llmrl.recipe import Model

    manifest, tried = run_dir / "manifest.json", []
    with contextlib.suppress(InputError):  # no checkpoint yet
        tried.append(Model(path=model_folder(str(run_dir))))
    if manifest.is_file() and (told := json.loads(manifest.read_text(encoding="utf-8")).get("recipe", {}).get("model")):
        tried.append(Model.model_validate(told))
    for model in tried:
        try:
            return load_tokenizer(model, base=Path.cwd())
        except (InputError, OSError, ValueError):  # ValueError: transformers, of a folder without a tokenizer
            continue
    return None
