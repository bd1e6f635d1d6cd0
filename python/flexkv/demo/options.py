"""The demo's command line, with nothing but Python's own library: `./scripts/demo` checks it before it installs anything.

As a program it says what is wrong with its arguments, prints their help, or does nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Callable, Optional, Sequence  # noqa: UP035  (the system's Python may be an old one)

from .workload import Workload

_DESCRIPTION = """\
Multi-turn conversations with long prompts through vLLM, once without FlexKV and once with it.

vLLM's own prefix cache holds little more than one prompt, so each turn would compute its whole prompt again. The first
run installs what is missing (vLLM, a compiler, the wheel of this checkout); later ones begin at once. Exit code 1: a run
failed, or the outputs differ; 2: a wrong option.
"""


def parse(arguments: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Ends the process on --help (code 0) and on what is wrong (code 2)."""
    parser = argparse.ArgumentParser(
        prog="./scripts/demo",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    defaults = Workload()
    parser.add_argument(
        "--model",
        type=_directory,
        metavar="DIR",
        help="model directory (default: a small random llama, made on the spot)",
    )
    parser.add_argument("--serve", action="store_true", help="through an OpenAI server and a streaming client")
    parser.add_argument(
        "--in-process", action="store_true", help="vLLM's offline engine in one process (not with --serve)"
    )
    for name, least, text in (
        ("conversations", 2, "conversations that take turns"),
        ("turns", 1, "turns of each conversation"),
        ("first-tokens", 64, "prompt tokens of the first turn; longer ones gain more"),
        ("turn-tokens", 1, "tokens of each later question"),
        ("answer-tokens", 1, "tokens of each answer"),
    ):
        default = getattr(defaults, name.replace("-", "_"))
        help_text = f"{text} (default: {default}, at least {least})"
        parser.add_argument(f"--{name}", type=_at_least(least), default=default, metavar="N", help=help_text)
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="data type of the model (default: float32 for the random model, else the model's own)",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="save every figure there")
    parser.add_argument(
        "--out",
        default="out/demo",
        metavar="DIR",
        help="directory of plot, logs and the random model (default: out/demo)",
    )
    given = parser.parse_args(arguments)
    if given.serve and given.in_process:
        parser.error("--in-process is for the offline engine: not with --serve")
    try:
        workload_of(given).check()
    except ValueError as error:
        parser.error(str(error))
    return given


def workload_of(given: argparse.Namespace) -> Workload:
    return Workload(given.conversations, given.turns, given.first_tokens, given.turn_tokens, given.answer_tokens)


def _at_least(least: int) -> Callable[[str], int]:
    def parse_count(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse_count


def _directory(text: str) -> str:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"no such directory: {text}")
    if not os.path.isfile(os.path.join(text, "config.json")):
        raise argparse.ArgumentTypeError(f"not a model's directory, there is no config.json in it: {text}")
    return text


def _file(text: str) -> str:
    if os.path.isdir(text) or not os.path.isdir(os.path.dirname(os.path.abspath(text))):
        raise argparse.ArgumentTypeError(f"cannot be written, the directory above it must exist: {text}")
    return text


if __name__ == "__main__":
    parse(sys.argv[1:])
