"""What tells one model's weights from another's, and one engine's KV from another's."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flexkv.integration.vllm import identity
from flexkv.integration.weights import hub_snapshot, weight_files


def test_weights_of_a_folder_are_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = weight_files(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"22")
    assert weight_files(str(tmp_path)) != first
    assert hub_snapshot(str(tmp_path), None) is None


def test_weights_from_a_hub_are_a_commit(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--org--name"
    for commit in ("a" * 40, "b" * 40):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        assert hub_snapshot("org/name", None) == commit
        assert hub_snapshot("org/name", "a" * 40) == "a" * 40
    assert hub_snapshot("org/other", None) is None


def config() -> Any:
    parallel = SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, decode_context_parallel_size=1)
    images = SimpleNamespace(mm_processor_cache_gb=4, mm_processor_kwargs=None, video_pruning_rate=None)
    cache = SimpleNamespace(
        cache_dtype="auto",
        kv_cache_dtype_skip_layers=[],
        block_size=32,
        enable_prefix_caching=True,
        prefix_caching_hash_algo="sha256",
    )
    return SimpleNamespace(
        model_config=SimpleNamespace(model="/nowhere", dtype="float32", multimodal_config=images),
        cache_config=cache,
        parallel_config=parallel,
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
        attention_config=SimpleNamespace(backend=None),
    )


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("cache_config", "cache_dtype", "fp8_e4m3"),
        ("cache_config", "kv_cache_dtype_skip_layers", ["0"]),
        ("parallel_config", "pipeline_parallel_size", 2),
        ("parallel_config", "decode_context_parallel_size", 2),
        ("parallel_config", "prefill_context_parallel_size", 2),
        ("model_config.multimodal_config", "mm_processor_kwargs", {"max_pixels": 100}),
        ("model_config.multimodal_config", "video_pruning_rate", 0.5),
        ("", "speculative_config", SimpleNamespace(model="/draft", revision=None)),
    ],
)
def test_what_makes_other_kv_of_the_same_tokens(part: str, name: str, value: Any) -> None:
    other = copy.deepcopy(config())
    changed = other
    for step in filter(None, part.split(".")):
        changed = getattr(changed, step)
    setattr(changed, name, value)
    assert identity.fingerprint(config(), "") == identity.fingerprint(config(), "")
    assert identity.fingerprint(other, "") != identity.fingerprint(config(), "")


def _without_hashes_of_images(of: Any) -> None:
    """vLLM then numbers them, from 1 in each process."""
    of.cache_config.enable_prefix_caching = False
    of.model_config.multimodal_config.mm_processor_cache_gb = 0


def _with_seeded_hashes(of: Any) -> None:
    of.cache_config.prefix_caching_hash_algo = "xxhash"


def _with_scales_of_its_own(of: Any) -> None:
    of.cache_config.calculate_kv_scales = True


@pytest.mark.parametrize("change", [_without_hashes_of_images, _with_seeded_hashes, _with_scales_of_its_own])
def test_keys_that_mean_nothing_in_another_process(change: Any) -> None:
    changed = config()
    assert identity.only_here(changed) is None
    change(changed)
    assert identity.only_here(changed) is not None
    assert identity.fingerprint(changed, "") != identity.fingerprint(changed, "")


def test_images_are_hashed_if_either_cache_needs_it() -> None:
    one, other = config(), config()
    one.cache_config.enable_prefix_caching = False
    other.model_config.multimodal_config.mm_processor_cache_gb = 0
    assert identity.only_here(one) is identity.only_here(other) is None
