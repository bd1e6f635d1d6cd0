"""Which weights a model or an adapter has: what KV computed by others must not be mistaken for."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def weight_files(model: str) -> list[list[Any]]:
    """Names, sizes and times of a local model's files: new weights under an old path must not find old KV."""
    root = Path(model)
    if not root.is_dir():
        return []
    wanted = (".safetensors", ".bin", ".pt", ".gguf", ".json")
    return sorted(
        [path.name, stat.st_size, stat.st_mtime_ns]
        for path in root.iterdir()
        if path.suffix in wanted and (stat := path.stat())
    )


def hub_snapshot(model: str, revision: str | None) -> str | None:
    """The commit of a model from a hub, as it lies in the local cache: what a branch's name stands for changes."""
    try:
        from huggingface_hub import try_to_load_from_cache

        config_file = try_to_load_from_cache(model, "config.json", revision=revision)
    except Exception:  # a folder, or a name that is none for a hub
        return None
    return Path(config_file).parent.name if isinstance(config_file, str) else None
