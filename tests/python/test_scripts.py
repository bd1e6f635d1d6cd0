"""The commands in scripts/ and examples/ answer before they install or start anything."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*command], check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("name", ["setup", "test", "demo", "soak"])
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help(name: str, option: str) -> None:
    result = run(f"scripts/{name}", option)
    assert result.returncode == 0, result.stderr
    assert f"scripts/{name} [" in result.stdout


@pytest.mark.parametrize("name", ["setup", "test", "demo"])
def test_an_unknown_option(name: str) -> None:
    result = run(f"scripts/{name}", "--no-such-option")
    assert result.returncode != 0
    assert "--no-such-option" in result.stderr


def test_the_example_without_a_model() -> None:
    result = run("sh", "examples/vllm/serve.sh")
    assert result.returncode == 2
    assert result.stderr.startswith("usage: examples/vllm/serve.sh MODEL")
