"""What tells one model's weights from another's."""

from __future__ import annotations

from pathlib import Path

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
