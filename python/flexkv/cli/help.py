"""How `--help` looks: flags without a type, sentences that fill the lines of the terminal."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class _Command(TyperCommand):
    def __init__(self, *args: Any, help: str | None = None, **options: Any) -> None:
        super().__init__(*args, help=None if help is None else _unwrapped(help), **options)

    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_types_of_flags(super().get_params(ctx))


class App(typer.Typer):
    """A Typer whose groups and commands show their help so."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Group, **options)

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, cls=_Command, **options)


def _without_types_of_flags(params: list[Any]) -> list[Any]:
    """A type behind a flag looks like a value that it takes. Here, for --help itself is one, too."""
    for param in params:
        if getattr(param, "is_flag", False):
            param.metavar = ""
    return params


def _unwrapped(text: str) -> str:
    """Docstrings end their lines where ours end."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
