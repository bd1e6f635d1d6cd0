"""What a setting is: its names, its type with what it allows, its default and its meaning."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from flexkv.config import sizes


class Status(enum.Enum):
    ACTIVE = "active"
    PLANNED = "planned"  # understood, without effect until the tier it belongs to exists: a warning when set
    NOT_NEEDED = "not needed"  # understood, and nothing is left for it to do


@dataclass(frozen=True)
class Kind:
    """A type of value: `parse` raises ValueError on what is not allowed; `allowed` is the sentence for the user."""

    allowed: str
    parse: Callable[[object], Any]
    show: Callable[[Any], str] = str


@dataclass(frozen=True)
class Setting:
    key: str  # in a file and in an engine's extra configuration
    env: tuple[str, ...]  # the first is the name to use
    aliases: tuple[str, ...]  # other keys accepted in a file
    kind: Kind
    default: str  # as the reference page prints it
    doc: str
    topic: str  # the part of the system it belongs to
    status: Status
    attribute: str = ""  # of Settings; empty unless active
    secret: bool = False  # its value is never shown
    in_file: bool = True

    def show(self, value: object) -> str:
        return "***" if self.secret else self.kind.show(value)


@dataclass(frozen=True)
class IgnoredEntry:
    """A setting of the original that was given and has no effect here."""

    setting: Setting
    value: object
    origin: str


class WrongValue(ValueError):
    """Of a value that needs more words than what is allowed."""


def _refuse(value: object) -> NoReturn:
    raise ValueError(value)


def switch() -> Kind:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}

    def parse(value: object) -> bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower() if isinstance(value, int | str) else ""
        return words[word] if word in words else _refuse(value)

    return Kind("1/0, true/false, yes/no, on/off", parse, lambda on: "on" if on else "off")


def integer(low: int, high: int) -> Kind:
    def parse(value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,18}", value.strip(), re.ASCII):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            return _refuse(value)
        return value

    return Kind(f"an integer from {low} to {high}", parse)


def number(low: float, high: float) -> Kind:
    def parse(value: object) -> float:
        if isinstance(value, str):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return _refuse(value)
        # Bounds first: an integer too large for a float must not reach float().
        if not low <= value <= high or not math.isfinite(value):
            return _refuse(value)
        return float(value)

    return Kind(f"a number from {low:g} to {high:g}", parse, lambda value: f"{value:g}")


def number_or_zero(low: float, high: float) -> Kind:
    """A number that is not given as 0; otherwise at least `low`, because less cannot be meant."""
    given = number(low, high)

    def parse(value: object) -> float:
        parsed = number(0, high).parse(value)
        return parsed if parsed == 0 else given.parse(value)

    return Kind(f"0, or {given.allowed}", parse, given.show)


def size(bare_unit: int, low: int, high: int, *, auto: Callable[[], sizes.AutoSize] | None = None) -> Kind:
    def parse(value: object) -> int:
        if auto is not None and isinstance(value, str) and value.strip().lower() == "auto":
            return auto()
        parsed = sizes.parse_size(value, bare_unit)
        return parsed if low <= parsed <= high else _refuse(value)

    unit = {1: "bytes", sizes.KIB: "KiB", sizes.MIB: "MiB", sizes.GIB: "GiB"}[bare_unit]
    bounds = f"from {sizes.format_size(low)} to {sizes.format_size(high)}"
    auto_text = ", or auto" if auto else ""
    return Kind(
        f"a size such as 16, 512MB, 1.5T (a bare number counts {unit}) {bounds}{auto_text}", parse, sizes.format_size
    )


def size_choice(*allowed: int) -> Kind:
    def parse(value: object) -> int:
        parsed = sizes.parse_size(value, 1)
        return parsed if parsed in allowed else _refuse(value)

    return Kind(
        " or ".join(sizes.format_size(one) for one in allowed) + " (a bare number counts bytes)",
        parse,
        sizes.format_size,
    )


def choice(*names: str, synonyms: dict[str, str] | None = None) -> Kind:
    def parse(value: object) -> str:
        word = value.strip().lower() if isinstance(value, str) else ""
        word = (synonyms or {}).get(word, word)
        return word if word in names else _refuse(value)

    return Kind("one of " + ", ".join(names), parse)


def text(allowed: str, pattern: str) -> Kind:
    def parse(value: object) -> str:
        # Printable only: a control character in a name would travel into paths, logs and keys.
        if isinstance(value, str) and value.isprintable() and re.fullmatch(pattern, value):
            return value
        return _refuse(value)

    return Kind(allowed, parse)


def directories() -> Kind:
    """Absolute paths (`~` is the home directory), none twice: a tuple."""

    def parse(value: object) -> tuple[str, ...]:
        parts = value.split(";") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return _refuse(value)
        paths = []
        for part in parts:
            if not isinstance(part, str) or not part.isprintable():
                return _refuse(value)
            if part.strip():
                paths.append(os.path.normpath(os.path.expanduser(part.strip())))
        for path in paths:
            if not os.path.isabs(path):
                raise WrongValue(f"{show_value(path)} is not an absolute path")
            if paths.count(path) > 1:
                raise WrongValue(f"{show_value(path)} is given twice")
        if len(paths) > 64:
            return _refuse(value)
        return tuple(paths)

    return Kind("absolute paths of directories, separated by `;`, none twice, at most 64", parse, ";".join)


def anything() -> Kind:
    return Kind("anything", lambda value: value, show_value)


def show_value(value: object) -> str:
    """The value as it was written, short and safe to print whatever it holds."""
    if isinstance(value, bool | float | str) or value is None:
        written = repr(value)
    elif isinstance(value, int):
        written = str(value) if abs(value) < 10**20 else "an integer of more than 20 digits"
    else:
        return f"a {type(value).__name__}"
    return written if len(written) <= 80 else written[:77] + "..."


def setting(
    kind: Kind,
    default: object,
    doc: str,
    *,
    topic: str,
    key: str = "",
    env: tuple[str, ...] = (),
    aliases: tuple[str, ...] = (),
    default_text: str = "",
    in_file: bool = True,
    secret: bool = False,
) -> Any:
    """Declares one active setting as a field of the Settings dataclass. A callable default is called at each load."""
    spec = {
        "kind": kind,
        "key": key,
        "env": env,
        "aliases": aliases,
        "doc": doc,
        "topic": topic,
        "in_file": in_file,
        "secret": secret,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"spec": spec | {"default": default_text}})
    metadata = {"spec": spec | {"default": default_text or kind.show(default)}}
    return dataclasses.field(default=default, repr=not secret, metadata=metadata)
