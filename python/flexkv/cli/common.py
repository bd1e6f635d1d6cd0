"""What the commands share: output, errors and the core."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console

from flexkv.config import ConfigError, Settings, load, untold

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NO_NODE = 3

# Tables in a pipe are for reading too: not cut at 80 columns.
_PIPE_WIDTH = 160


def console(pipe_width: int = _PIPE_WIDTH) -> Console:
    return Console() if sys.stdout.isatty() else Console(width=pipe_width)


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


def fail(message: object, code: int = EXIT_FAILED) -> NoReturn:
    """Ends the command with its message, one problem a line, on stderr."""
    for line in str(message).splitlines():
        typer.echo(f"flexkv: {line}", err=True)
    raise typer.Exit(code)


def load_settings(file: Path | None) -> Settings:
    """The settings of a command; what is wrong with them ends it, what is odd about them is told."""
    try:
        settings = load(file=file)
    except ConfigError as error:
        fail(error, EXIT_USAGE)
    for warning in untold(settings):
        logging.getLogger("flexkv.config").warning("%s", warning)
    return settings


def load_core() -> Any:
    """The compiled part, loaded on use: `version` and `config` work, and explain, without it."""
    return importlib.import_module("flexkv._core")


def require_core() -> Any:
    try:
        return load_core()
    except ImportError as error:
        fail(f"the compiled part flexkv._core cannot be imported ({error}); build it with `pip install .`")
