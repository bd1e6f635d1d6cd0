"""Makes the reference page of all settings. `python -m flexkv.config.reference` prints it."""

from __future__ import annotations

from collections.abc import Iterable

from flexkv.config import kvbm
from flexkv.config.setting import Setting, Status
from flexkv.config.table import TABLE

_HEAD = """\
# Settings

<!-- Made by `python -m flexkv.config.reference > docs/reference/settings.md`; change python/flexkv/config/ instead. -->

Every setting can be given in three places. Of two that set the same key, the one further down wins:

1. the environment variable;
2. the file that `FLEXKV_CONFIG_PATH` names, YAML or JSON, one mapping of keys to values;
3. the engine's own configuration of the connector (`kv_connector_extra_config` of vLLM), with the same keys.

`flexkv config show` prints the effective value of each setting and where it came from.

- An unknown key in a file is an error; an unknown `FLEXKV_*` variable, or an unknown key in the engine's
  configuration, is a warning. A wrong value is an error everywhere.
- An empty variable, and a key with nothing behind it, count as absent.
- **GB means GiB** (2^30 bytes), also in the names of settings: `16`, `16GB`, `16g` and `16GiB` are the same size.
  `KB`, `MB`, `TB` likewise; `B` counts bytes.
- Where a setting has several names, the first wins if more than one is given in the same place.
"""

_PLANNED = """
# Planned

Names of the original FlexKV for parts that do not exist here yet. They are understood, never an error, and have no
effect; setting one to anything but off gives a warning.
"""

_NOT_NEEDED = """
# Accepted, not needed

Names of the original FlexKV that have nothing left to do here. They are understood and ignored.
"""

_KVBM = """
# From NVIDIA's KVBM

Variables of KVBM, the cache that comes with NVIDIA Dynamo, are understood where they have a counterpart, so that an environment
which was made for it serves FlexKV, too; a `FLEXKV_*` variable of the same meaning wins. The others are ignored; with a warning
where that leaves something undone. KVBM's file (`KVBM_CONFIG_PATH`) and `DYN_KVBM_NIXL_BACKEND_*` are not read.

| variable | key of ours | value, or why there is none |
|---|---|---|
"""


def reference_page() -> str:
    parts = [_HEAD]
    for topic, settings in _by_topic(Status.ACTIVE):
        parts.append(f"\n## {topic}\n\n| key | environment | default | allowed | meaning |\n|---|---|---|---|---|\n")
        for one in settings:
            keys = _names((one.key, *one.aliases)) if one.in_file else "not in a file"
            parts.append(f"| {keys} | {_names(one.env)} | {one.default} | {_cell(one.kind.allowed)} | {one.doc} |\n")
    for status, head, column in (
        (Status.PLANNED, _PLANNED, "meaning"),
        (Status.NOT_NEEDED, _NOT_NEEDED, "why not"),
    ):
        parts.append(head)
        for topic, settings in _by_topic(status):
            parts.append(f"\n## {topic}\n\n| key | environment | {column} |\n|---|---|---|\n")
            parts += (f"| {_names((one.key, *one.aliases))} | {_names(one.env)} | {one.doc} |\n" for one in settings)
    parts.append(_KVBM)
    parts += (f"| `{one.env}` | {f'`{one.key}`' if one.key else ''} | {one.doc} |\n" for one in kvbm.TABLE)
    return "".join(parts)


def _by_topic(status: Status) -> Iterable[tuple[str, list[Setting]]]:
    topics: dict[str, list[Setting]] = {}
    for one in TABLE:
        if one.status is status:
            topics.setdefault(one.topic, []).append(one)
    return topics.items()


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
