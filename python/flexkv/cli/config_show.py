"""`flexkv config show`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from flexkv.cli.common import console, load_settings, print_json
from flexkv.config import Settings
from flexkv.config.settings import ACTIVE


def run(as_json: bool, file: Path | None, changed: bool) -> None:
    settings = load_settings(file)
    rows = _rows(settings, changed)
    if as_json:
        print_json({"settings": rows, "warnings": list(settings.warnings)})
        return
    if not rows:
        print("all settings have their defaults")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, options in (("setting", {}), ("value", {}), ("origin", {"overflow": "fold"}), ("meaning", {})):
        table.add_column(column, **options)  # type: ignore[arg-type]
    for row in rows:
        style = "dim" if row["origin"] == "default" or row["status"] != "active" else ""
        meaning = row["reason"] or row["meaning"]
        if row["status"] != "active":
            meaning = f"no effect ({row['status']}): {meaning}"
        # Text, not str: values may hold what Rich would take for markup.
        table.add_row(*(Text(cell, style=style) for cell in (row["key"], row["text"], row["origin"], meaning)))
    console().print(table)


def _rows(settings: Settings, changed: bool) -> list[dict[str, Any]]:
    rows = []
    for one in ACTIVE:
        value = settings.value(one.key)
        origin = settings.origin(one.key)
        if changed and origin == "default":
            continue
        rows.append(
            {
                "key": one.key,
                "value": one.show(value) if one.secret else value,
                "text": one.show(value) or "(none)",
                "origin": origin,
                "status": one.status.value,
                "meaning": one.doc,
                "reason": getattr(value, "reason", ""),
            }
        )
    for entry in settings.ignored:
        text = entry.setting.show(entry.value)
        rows.append(
            {
                "key": entry.setting.key,
                "value": text,
                "text": text,
                "origin": entry.origin,
                "status": entry.setting.status.value,
                "meaning": entry.setting.doc,
                "reason": "",
            }
        )
    return rows
