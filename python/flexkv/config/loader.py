"""Reads the sources and makes Settings of them. Lowest first: default, environment, file, the caller's `extra`."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from flexkv.config import kvbm
from flexkv.config.setting import IgnoredEntry, Setting, Status, WrongValue, show_value
from flexkv.config.settings import Settings
from flexkv.config.table import BY_ENV, BY_KEY

_told: set[str] = set()

_MAX_FILE_BYTES = 1 << 20
_PREFIX = "FLEXKV_"
_CONFIG_PATH = BY_KEY["config_path"]


class ConfigError(Exception):
    """The configuration cannot be used. Each problem is one line that names key, value, origin and what is allowed."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class _Entry:
    setting: Setting
    value: object
    origin: str


def load(
    *,
    file: str | os.PathLike[str] | None = None,
    extra: Mapping[str, Any] | None = None,
    extra_origin: str = "kv_connector_extra_config",
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The effective settings. `extra` (an engine's own configuration, command line options) wins over the file, the
    file over the environment. `file` replaces FLEXKV_CONFIG_PATH. Raises ConfigError, with all problems at once, and
    nothing else. Warnings are in the result, for the caller to show: see `untold`."""
    problems: list[str] = []
    warnings: list[str] = []
    sources = [list(_read_environ(os.environ if environ is None else environ, warnings))]
    extra_entries = list(_read_extra(extra or {}, extra_origin, warnings))
    paths = [entry for entry in (*sources[0], *extra_entries) if entry.setting is _CONFIG_PATH]
    if file is not None:
        paths.append(_Entry(_CONFIG_PATH, os.fspath(file), "argument"))
    if paths:
        sources.append(list(_read_file(paths[-1], problems, warnings)))
    sources.append(extra_entries)

    chosen: dict[str, _Entry] = {}
    for source in sources:
        chosen.update((entry.setting.key, entry) for entry in source)
    if paths:
        chosen[_CONFIG_PATH.key] = paths[-1]

    values: dict[str, Any] = {}
    ignored: list[IgnoredEntry] = []
    for entry in chosen.values():
        setting = entry.setting
        if setting.status is not Status.ACTIVE:
            ignored.append(IgnoredEntry(setting, entry.value, entry.origin))
            if setting.status is Status.PLANNED and _asks_for_something(entry):
                warnings.append(f"{setting.key} ({entry.origin}) has no effect yet, planned: {setting.doc}")
            continue
        try:
            values[setting.attribute] = setting.kind.parse(entry.value)
        except ValueError as error:
            why = f"{error}; " if isinstance(error, WrongValue) else ""
            problems.append(
                f"{setting.key}: wrong value {'***' if setting.secret else _written(entry.value)} from {entry.origin}; {why}"
                f"allowed: {setting.kind.allowed}"
            )
    origins = {key: entry.origin for key, entry in chosen.items()}
    settings = Settings(**values, origins=origins, ignored=tuple(ignored))
    problems += settings.problems()
    if problems:
        raise ConfigError(problems)
    return replace(settings, warnings=tuple(warnings))


def untold(settings: Settings) -> list[str]:
    """The warnings that this process has not shown yet; from now on it has."""
    fresh = [warning for warning in dict.fromkeys(settings.warnings) if warning not in _told]
    _told.update(fresh)
    return fresh


def _written(value: object) -> str:
    """A list as it would be written in a variable."""
    if isinstance(value, list | tuple) and all(isinstance(one, str) for one in value):
        value = ";".join(value)
    return show_value(value)


def _asks_for_something(entry: _Entry) -> bool:
    # Switched off is what it is anyway, and variables of other programs are often set for those.
    value = entry.value.strip().lower() if isinstance(entry.value, str) else entry.value
    off = value is None or (isinstance(value, str | int) and value in (0, "", "0", "false", "no", "off", "none"))
    foreign = entry.origin.startswith("env ") and "FLEXKV" not in entry.origin
    return not off and not foreign


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name[:100], list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def _nearest_key(key: str) -> str:
    return _nearest(key.lower().removeprefix("flexkv_"), BY_KEY)


def _once_each(given: Mapping[str, _Entry], names: Iterable[str], warnings: list[str]) -> Iterator[_Entry]:
    """Where one setting has several names in one source, the one that `names` has first wins; the others are told."""
    winners: dict[str, str] = {}
    for name in names:
        entry = given.get(name)
        if entry is None:
            continue
        if entry.setting.key in winners:
            where = entry.origin if name in entry.origin else f"{name} ({entry.origin})"
            warnings.append(f"{where} is ignored: {winners[entry.setting.key]} sets the same")
        else:
            winners[entry.setting.key] = name
            yield entry


def _read_environ(environ: Mapping[str, str], warnings: list[str]) -> Iterator[_Entry]:
    for name in sorted(environ):
        if name.startswith(_PREFIX) and name not in BY_ENV:
            warnings.append(f"{show_value(name)[1:-1]} (environment) is not a setting{_nearest(name, BY_ENV)}")
    # An empty variable counts as absent: shells and container files cannot unset one.
    given = {name: _Entry(one, environ[name], f"env {name}") for name, one in BY_ENV.items() if environ.get(name)}
    given |= _read_kvbm(environ, warnings)
    yield from _once_each(given, (*BY_ENV, *kvbm.BY_ENV), warnings)


def _read_kvbm(environ: Mapping[str, str], warnings: list[str]) -> dict[str, _Entry]:
    given = {}
    for name, one in kvbm.BY_ENV.items():
        value = environ.get(name)
        if value and one.key:
            given[name] = _Entry(BY_KEY[one.key], one.read(value), f"env {name}")
        elif value and one.told:
            warnings.append(f"{name} (environment) has no effect: {one.doc}")
    return given


def _read_extra(extra: Mapping[str, Any], origin: str, warnings: list[str]) -> Iterator[_Entry]:
    given = {}
    for key, value in extra.items():
        setting = BY_KEY.get(key) if isinstance(key, str) else None
        if setting is None:
            # The engine's dictionary is shared with the engine and with other connectors: not ours to refuse.
            warnings.append(f"{show_value(key)} ({origin}) is not a setting{_nearest_key(str(key))}")
        else:
            given[str(key)] = _Entry(setting, value, origin)
    yield from _once_each(given, BY_KEY, warnings)


def _read_file(path_entry: _Entry, problems: list[str], warnings: list[str]) -> Iterator[_Entry]:
    try:
        path = Path(str(path_entry.setting.kind.parse(path_entry.value)))
        text = _read_text(path)
        rows = list(_parse_json(text) if path.suffix.lower() == ".json" else _parse_yaml(text))
    except (
        OSError,
        RecursionError,
        ArithmeticError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        yaml.YAMLError,
    ) as error:  # PyYAML's constructors raise nearly anything on values of a wrong form
        problems.append(f"config file {show_value(path_entry.value)} ({path_entry.origin}): {_reason(error)}")
        return
    given = {}
    for key, value, line in rows:
        origin = f"{path}:{line}"
        setting = BY_KEY.get(key) if isinstance(key, str) else None
        if setting is None:
            problems.append(f"{show_value(key)}: unknown key in {origin}{_nearest_key(str(key)[:100])}")
        elif not setting.in_file:
            problems.append(f"{key}: not allowed in {origin}; it belongs in the environment: {setting.env[0]}")
        elif value is not None:  # `key:` with nothing behind it counts as absent
            given[str(key)] = _Entry(setting, value, origin)
    yield from _once_each(given, BY_KEY, warnings)


def _reason(error: Exception) -> str:
    match error:
        case OSError():
            return error.strerror or str(error)
        case RecursionError():
            return "nested too deeply"
        case yaml.MarkedYAMLError() if error.problem_mark is not None:
            # Without the text around the place, which may be a password.
            what = ", ".join(part for part in (error.context, error.problem) if part)
            return f"line {error.problem_mark.line + 1}: {what}"
        case _:
            return " ".join(str(error).split())[:300] or "cannot be read"


def _read_text(path: Path) -> str:
    if path.suffix.lower() not in (".yml", ".yaml", ".json"):
        raise ValueError("the name must end in .yml, .yaml or .json")
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    if len(content) > _MAX_FILE_BYTES:
        raise ValueError(f"larger than {_MAX_FILE_BYTES} bytes")
    return content.decode("utf-8-sig")


_Row = tuple[object, object, int]


class _YamlLoader(yaml.SafeLoader):
    """Without numbers to the base of 60: nobody who writes `1:30` means 90, so it is text, which no number allows."""

    def resolve(self, kind: type[yaml.Node], value: str | None, implicit: Any) -> str:
        tag: str = super().resolve(kind, value, implicit)
        if kind is yaml.ScalarNode and ":" in (value or "") and tag in _YAML_NUMBERS:
            return self.DEFAULT_SCALAR_TAG
        return tag


_YAML_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _parse_yaml(text: str) -> Iterator[_Row]:
    loader = _YamlLoader(text)
    try:
        root = loader.get_single_node()
        if root is None or root.tag == "tag:yaml.org,2002:null":
            return
        if not isinstance(root, yaml.MappingNode):
            raise TypeError("not a mapping of keys to values")
        seen: set[object] = set()
        for key_node, value_node in root.value:
            line = key_node.start_mark.line + 1
            key = loader.construct_object(key_node, deep=True)
            if isinstance(key, str):
                _refuse_twice(key, seen, line)
            yield key, loader.construct_object(value_node, deep=True), line
    finally:
        loader.dispose()


def _parse_json(text: str) -> Iterator[_Row]:
    if not text.strip():
        return
    root = json.loads(text, object_pairs_hook=_Pairs, parse_constant=_refuse_constant)
    if not isinstance(root, _Pairs):
        raise TypeError("not an object of keys and values")
    seen: set[object] = set()
    for key, value in root:
        place = re.search(rf'"{re.escape(key)}"\s*:', text)
        line = text.count("\n", 0, place.start()) + 1 if place else 1
        _refuse_twice(key, seen, line)
        yield key, value, line


class _Pairs(list[tuple[str, object]]):
    pass


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not JSON")


def _refuse_twice(key: str, seen: set[object], line: int) -> None:
    if key in seen:
        raise ValueError(f"line {line}: {show_value(key)} is given twice")
    seen.add(key)
