"""`llmrl show`: every key of a recipe with its value and where it is from."""

from __future__ import annotations

import json
import sys
from typing import Any

from llmrl import plugins
from llmrl.config import HOMES, LoadedRecipe, Origin, check_plugins, leaves


def resolved(loaded: LoadedRecipe) -> list[tuple[str, Any, Origin]]:
    """(dotted key, value, origin) of everything, with the defaults of the plug-ins' factories. Raises InputError as `config.check_plugins`."""
    check_plugins(loaded)
    rows: list[tuple[str, Any, Origin]] = []
    for name, section in loaded.recipe.model_dump(mode="json").items():
        for key, value in leaves({name: section}):
            rows.append((key, value, loaded.origins.get(key, "default")))
        if name in HOMES and section is not None:
            factory = plugins.resolve(section["use"], home=HOMES[name], base=loaded.base)
            for key, (_, default) in plugins.signature_of(factory).items():
                if key not in section:
                    rows.append((f"{name}.{key}", default, "default"))
    return rows


def show(loaded: LoadedRecipe, *, as_json: bool = False) -> None:
    """Print every resolved key, its value and its origin: a table, or one JSON object {"path", "values": {key: {"value", "origin"}}}."""
    rows = resolved(loaded)
    if as_json:
        values = {key: {"value": value, "origin": origin} for key, value, origin in rows}
        sys.stdout.write(json.dumps({"path": str(loaded.path), "values": values}, default=str, indent=2) + "\n")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("key", "value", "origin", title=str(loaded.path))
    for key, value, origin in rows:
        shown = "-" if value is None else json.dumps(value, default=str, ensure_ascii=False)
        table.add_row(key, Text(shown), Text(origin, style={"default": "dim", "file": "", "override": "bold"}[origin]))
    Console().print(table)
