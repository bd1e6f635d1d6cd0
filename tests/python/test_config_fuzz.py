"""Whatever a file, a variable or an engine says: Settings or ConfigError, nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from flexkv.config import ConfigError, load
from flexkv.config.table import BY_ENV, BY_KEY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

keys = st.one_of(st.sampled_from(sorted(BY_KEY)), st.text(max_size=20))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=30), st.dates(), st.binary(max_size=10),
    st.from_regex(r"[0-9]{1,12}(\.[0-9]+)?[KMGTkmgt]?(i?B)?", fullmatch=True),
    st.sampled_from(["auto", "1e400", "9" * 5000, "\ud800", "\x00", "~", "on", "ipc:///tmp/x", "/a.sock"]),
)  # fmt: skip
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
mappings = st.dictionaries(keys, values, max_size=6)
yaml_words = (
    "cpu_cache_gb evict_ratio: - &a *a !!int !!binary !!set <<: ? [ ] { } ' | > # --- ... 1 .inf 1:30 0o7 2001-01-01 = "
    "!!timestamp !!float !!bool !!omap !!pairs !!str : %YAML"
)
yaml_pieces = st.lists(
    st.sampled_from([*yaml_words.split(), '"', "\\", "\n", "\n", "\t", " ", "  ", "\n---\n"]), max_size=25
)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def try_load(**arguments: object) -> None:
    try:
        loaded = load(**{"environ": {}, **arguments})  # type: ignore[arg-type]
        loaded.as_dict()
        loaded.node_options()
    except ConfigError as error:
        assert str(error)
        str(error).encode()  # printable anywhere


def try_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try_load(file=path)


@relaxed
@given(content=st.binary(max_size=200), suffix=st.sampled_from([".yml", ".json"]))
def test_random_bytes(folder: Path, content: bytes, suffix: str) -> None:
    try_file(folder / f"bytes{suffix}", content)


@relaxed
@given(content=st.text(max_size=200), suffix=st.sampled_from([".yml", ".json"]))
def test_random_text(folder: Path, content: str, suffix: str) -> None:
    try_file(folder / f"text{suffix}", content.encode("utf-8", "surrogatepass"))


@relaxed
@given(pieces=yaml_pieces)
def test_pieces_of_yaml(folder: Path, pieces: list[str]) -> None:
    try_file(folder / "pieces.yaml", "".join(pieces).encode())


@relaxed
@given(content=mappings)
def test_well_formed_yaml(folder: Path, content: dict[str, object]) -> None:
    try_file(folder / "well.yaml", yaml.safe_dump(content, allow_unicode=False).encode("utf-8", "surrogatepass"))


@relaxed
@given(content=mappings)
def test_well_formed_json(folder: Path, content: dict[str, object]) -> None:
    try_file(folder / "well.json", json.dumps(content, default=str).encode())


@relaxed
@given(extra=st.dictionaries(keys | st.integers() | st.none(), values, max_size=6))
def test_extra(extra: dict[str, object]) -> None:
    try_load(extra=extra)


@relaxed
@given(
    environ=st.dictionaries(st.sampled_from(sorted(BY_ENV)) | st.text().map("FLEXKV_".__add__), st.text(), max_size=6)
)
def test_environment(environ: dict[str, str]) -> None:
    try_load(environ=environ)


@relaxed
@given(extra=st.fixed_dictionaries({}, optional={
    "cpu_cache_gb": st.integers(1, 100), "evict_ratio": st.floats(0, 1), "instance_num": st.integers(1, 9),
    "log_level": st.sampled_from(["debug", "INFO"]), "enable_metrics": st.booleans(),
}))  # fmt: skip
def test_what_is_right_is_taken_from_every_source(folder: Path, extra: dict[str, object]) -> None:
    (folder / "right.json").write_text(json.dumps(extra))
    (folder / "right.yml").write_text(yaml.safe_dump(extra))
    environ = {f"FLEXKV_{key.upper()}": str(value) for key, value in extra.items()}
    expected = load(environ={}, extra=extra).as_dict()
    for other in (load(environ=environ), load(environ={}, file=folder / "right.json"),
                  load(environ={}, file=folder / "right.yml")):  # fmt: skip
        assert other.as_dict() | {"config_path": ""} == expected
