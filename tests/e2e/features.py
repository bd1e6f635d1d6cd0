"""What FlexKV does with each feature of vLLM, and which tests show it.

usage: python tests/e2e/features.py [REPORT.xml]

Prints the table of docs/engines/vllm.md; `tests/python/test_docs.py` holds the page to it, and it to tests that exist.
With a report (`pytest tests/e2e --junit-xml REPORT.xml`) each row says how its tests ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

_STOCK = "test_vllm_stock_connector.py"
_GROUPS = "test_vllm_groups.py"

# (feature, what becomes of it, tests)
FEATURES: list[tuple[str, str, list[str]]] = [
    (
        "speculative decoding, drafts from the text (n-grams)",
        "served; what is kept are confirmed tokens only",
        ["test_vllm_speculative.py", "test_saves.py::test_a_block_that_only_drafts_complete_is_not_saved"],
    ),
    (
        "speculative decoding, draft models (EAGLE, MTP)",
        "served, their layers in the same blocks; **not run**: none for CPUs",
        ["test_identity.py::test_what_makes_other_kv_of_the_same_tokens"],
    ),
    (
        "streaming input (sessions)",
        "served; with speculative decoding not saved, as vLLM 0.32 keeps KV of drafts behind a stop; **not run**",
        ["test_saves.py::test_sessions_with_drafts_are_not_saved"],
    ),
    (
        "images, video, audio",
        "served; equal inputs share, others never, however equal their placeholders",
        ["test_vllm_images.py"],
    ),
    (
        "the same with prefix caching and vLLM's cache of processed inputs both off",
        "kept for this process alone, which says so: vLLM only numbers such inputs",
        ["test_identity.py::test_keys_that_mean_nothing_in_another_process"],
    ),
    (
        "prompt embeddings",
        "served; keyed by their bytes, never by the tokens they stand in for",
        [
            "test_vllm_requests.py::test_embeddings_never_match_by_the_tokens_they_stand_in_for",
            "test_vllm_requests.py::test_equal_embeddings_are_found",
        ],
    ),
    ("LoRA", "served; keyed by the adapter's name, path and files", ["test_vllm_lora.py"]),
    ("cache salts", "served", [f"{_STOCK}::test_salts_do_not_share", f"{_GROUPS}::test_salts_do_not_share"]),
    ("several answers to a prompt (`n`)", "served", ["test_vllm_requests.py::test_several_answers"]),
    ("beam search", "served", ["test_vllm_requests.py::test_beam_search"]),
    (
        "log-probabilities of prompts",
        "computed whole, as vLLM asks for; saved",
        [f"{_STOCK}::test_prompt_logprobs_skip_reading"],
    ),
    (
        "pooling: last token",
        "served",
        ["test_vllm_pooling.py::test_the_last_token"],
    ),
    (
        "pooling: mean, CLS, bidirectional attention",
        "runs without FlexKV, which says so: vLLM needs the whole prompt in one step there, and a hit would end the engine",
        [
            "test_vllm_pooling.py::test_the_mean_of_all_tokens",
            "test_groups.py::test_models_whose_prompts_have_to_be_computed_whole_are_refused",
        ],
    ),
    (
        "pipeline parallelism",
        "served; a block is found when all stages have saved it",
        ["test_vllm_pipeline.py"],
    ),
    ("tensor parallelism", "served", [_STOCK, "test_vllm_shards.py"]),
    (
        "ranks on several machines (`--nnodes`)",
        "served, with a daemon on each ([several_machines.md](../operations/several_machines.md))",
        ["test_vllm_machines.py"],
    ),
    (
        "decode and prefill context parallelism",
        "one KV group: served, what a rank holds is part of the key; several: without FlexKV. **Not run**: none for CPUs",
        ["test_shards.py", "test_identity.py::test_what_makes_other_kv_of_the_same_tokens"],
    ),
    (
        "FP8 KV",
        "served; keyed by the type",
        ["test_vllm_pipeline.py", "test_identity.py::test_what_makes_other_kv_of_the_same_tokens"],
    ),
    ("latent attention (MLA)", "served", ["test_vllm_shards.py"]),
    ("sliding windows, chunked attention: several KV groups", "served by the full connector", [_GROUPS]),
    (
        "states (Mamba, linear attention, short convolutions)",
        "served by the full connector with prefix caching (`FlexKVConnectorV1`: vLLM does not start). Run with short "
        "convolutions; Mamba and linear attention **not run**: vLLM 0.32 does not compute them on CPUs",
        ["test_vllm_states.py", "test_states.py"],
    ),
    (
        "states with drafts, context parallelism, ReplaySSM, `prefix_match_unit` or without attention; without prefix caching",
        "runs without FlexKV, which says so",
        ["test_states.py::test_refused"],
    ),
    (
        "compressed latents and windows over latents (DeepSeek-V4)",
        "served by the full connector from 0.32 on, without drafts; **not run**: none for CPUs. Tested over vLLM's own groups, "
        "block pool and memory of it, without the model",
        ["test_latent_windows.py"],
    ),
    (
        "windows that are computed again (DeepSeek-V4.1), windows behind the prompt (R-SWA), several precisions elsewhere",
        "runs without FlexKV, which says so",
        [
            "test_latent_windows.py::test_refused",
            "test_groups.py::test_refused",
            "test_groups.py::test_windows_with_a_gap_are_refused_also_where_the_engine_does_not_describe_them",
        ],
    ),
    ("encoder-decoder models", "not started by vLLM with any connector", []),
    (
        '`kv_load_failure_policy` "fail"',
        "warned of at the start; a failed load ends its request and no other",
        ["test_vllm_requests.py::test_a_failed_load_ends_its_request_and_no_other"],
    ),
]

def table(outcome: Callable[[list[str]], str] | None = None) -> str:
    """`outcome`: how tests ended, as a column more."""
    last, rule = (" | outcome |", " --- |") if outcome else (" |", "")
    lines = [f"| feature | with FlexKV | tests (tests/e2e){last}", f"| --- | --- | --- |{rule}"]
    for feature, fate, tests in FEATURES:
        lines.append(f"| {feature} | {fate} | {_names(tests)} |" + (f" {outcome(tests)} |" if outcome else ""))
    return "\n".join(lines) + "\n"


def named_tests() -> set[str]:
    return {test for *_, tests in FEATURES for test in tests}


def _names(tests: list[str]) -> str:
    return ", ".join(f"`{test}`" for test in tests) or "-"


def _outcome(report: Path) -> Callable[[list[str]], str]:
    cases: list[tuple[str, str]] = []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        ended = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "passed")
        name = case.get("name", "").split("[")[0]
        cases.append((f"{case.get('classname', '').split('.')[-1]}.py::{name}", ended))

    def of(tests: list[str]) -> str:
        ended = [how for name, how in cases if any(name == test or name.startswith(f"{test}::") for test in tests)]
        return ", ".join(f"{ended.count(how)} {how}" for how in sorted(set(ended))) or "not run"

    return of


if __name__ == "__main__":
    print(table(_outcome(Path(sys.argv[1])) if len(sys.argv) > 1 else None), end="")
