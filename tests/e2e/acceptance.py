"""What a KV cache for engines should be asked, and which tests show it.

usage: python tests/e2e/acceptance.py

Prints the table of docs/engines/README.md; `tests/python/test_docs.py` holds the page to it, and it to tests that exist and run
where it says."""

from __future__ import annotations

from dataclasses import dataclass

_STOCK = "e2e/test_vllm_stock_connector.py"
_GROUPS = "e2e/test_vllm_groups.py"
_EVENTS = "e2e/test_vllm_events.py"
_SGLANG = "e2e/test_sglang.py"


@dataclass(frozen=True)
class Row:
    """Tests by where they run, with paths from tests/; what else shows it, by hand; what nothing shows."""

    asked: str
    in_ci: tuple[str, ...] = ()
    with_nixl: tuple[str, ...] = ()
    by_hand: str = ""
    not_run: str = ""


ROWS = [
    Row(
        "vLLM's connector hands its 17 methods on to us, and says what to install without us",
        in_ci=("e2e/test_upstream_contract.py",),
    ),
    Row(
        "vLLM: greedy outputs equal with hits; TP 2, PP 2, MLA, FP8, asynchronous scheduling",
        in_ci=(_STOCK, "e2e/test_vllm_pipeline.py", "e2e/test_vllm_shards.py"),
        by_hand="token-major blocks and full CUDA graphs on a GPU ([`gpu.md`](../gpu.md))",
        not_run="its V2 model runner; MLA and FP8 on a GPU",
    ),
    Row(
        "a failed load is computed again, or ends its request and no other; never garbage",
        in_ci=(
            "e2e/test_vllm_daemon.py::test_injected_load_failures_are_recomputed",
            "e2e/test_vllm_daemon.py::test_a_load_that_fails_under_asynchronous_scheduling_does_not_end_the_engine",
            f"{_GROUPS}::test_failed_loads_are_recomputed",
            "e2e/test_vllm_requests.py::test_a_failed_load_ends_its_request_and_no_other",
            "python/test_sglang_linker.py::test_a_load_whose_node_goes_away_fails_and_aborts_only_its_request",
        ),
    ),
    Row(
        "preemption, or a device pool that is too small, while loads and saves are under way: outputs equal",
        in_ci=(
            f"{_STOCK}::test_preemption_storm",
            f"{_GROUPS}::test_preemption_storm",
            f"{_SGLANG}::test_an_engine_whose_pool_is_too_small_evicts_and_loads_and_stays_right",
        ),
    ),
    Row(
        "aborts while loading: blocks come back",
        in_ci=(
            f"{_STOCK}::test_abort_while_loading",
            f"{_STOCK}::test_whole_pool_is_usable_after_aborts",
            "python/test_sglang_linker.py::test_a_queued_load_that_is_canceled_writes_nothing",
        ),
    ),
    Row(
        "adapters, salts, images, embeddings: no hit across",
        in_ci=(
            "e2e/test_vllm_lora.py::test_no_cross_hit",
            f"{_STOCK}::test_salts_do_not_share",
            "e2e/test_vllm_images.py::test_equal_placeholders_share_nothing",
            "e2e/test_vllm_requests.py::test_embeddings_never_match_by_the_tokens_they_stand_in_for",
            "python/test_tensorrt_llm.py::test_salts_and_adapters_do_not_mix",
            f"{_SGLANG}::test_linked_engines_load_after_a_flush_and_after_a_restart_but_not_what_another_salt_kept",
            "python/test_sglang_linker.py::test_salts_and_adapters_share_nothing",
        ),
        not_run="adapters and images in a running SGLang",
    ),
    Row(
        "weights changed, and a reset: nothing old is found",
        in_ci=("e2e/test_vllm_sleep.py::test_a_reset_makes_blocks_of_old_weights_unreachable",),
        not_run="through Dynamo's `clear_kv_blocks`",
    ),
    Row(
        "beside another connector: vLLM's MultiConnector, with NIXL; Dynamo's PdConnector",
        in_ci=(
            "e2e/test_vllm_multi.py",
            "e2e/test_saves.py::test_a_save_is_canceled_before_another_connector_loads_into_its_block",
        ),
        with_nixl=("e2e/test_dynamo_disaggregated.py",),
    ),
    Row(
        "hybrid models through the full connector: windows and states served",
        in_ci=(_GROUPS, "e2e/test_vllm_states.py", "e2e/test_latent_windows.py"),
        not_run="states other than of short convolutions; states on a GPU; DeepSeek-V4's model",
    ),
    Row(
        "SGLang: outputs equal with loads, one rank and two; `--enable-flexkv` and the linker",
        in_ci=(_SGLANG, "python/test_sglang_linker.py", "python/test_sglang_hicache.py"),
        by_hand="each door on a GPU (`gpu/sglang_equality.py`)",
        not_run="MLA in a running SGLang",
    ),
    Row(
        "killed engines and daemons leave nothing behind that a next start does not remove",
        in_ci=(
            "e2e/test_vllm_daemon.py::test_engine_killed_and_started_again",
            "e2e/test_vllm_daemon.py::test_daemon_killed_while_serving",
            "e2e/test_vllm_ssd.py::test_engine_killed_while_it_writes",
        ),
        not_run="SGLang killed",
    ),
    Row(
        "two engines, two data-parallel ranks on a machine, with settings as they come: no collision",
        in_ci=(
            f"{_EVENTS}::test_data_parallel_ranks_have_nodes_of_their_own_otherwise",
            "e2e/test_vllm_daemon.py::test_second_engine_hits_what_the_first_stored",
            "python/test_manager_nodes.py::test_data_parallel_ranks_share_the_node_of_the_first",
        ),
        not_run="two data-parallel ranks of a running SGLang",
    ),
    Row(
        "a router sees what FlexKV keeps, no more once it is evicted or reset, and Dynamo's can use every event",
        in_ci=("e2e/test_dynamo.py", _EVENTS),
        not_run="a reset as Dynamo's router sees it (our own replica of one does)",
    ),
    Row(
        "TensorRT-LLM: an executor that calls in its order; both import paths and constructors",
        in_ci=("python/test_tensorrt_llm.py",),
        not_run="inside TensorRT-LLM",
    ),
    Row(
        "cost on vLLM's scheduler thread: 20 us for a prompt of 100,000 tokens that was looked up before",
        by_hand="`bench/scheduler_cost.py` ([`benchmarks.md`](../benchmarks.md#scheduler-thread))",
    ),
]


def table() -> str:
    lines = ["| asked | shown by (tests/) | nothing shows |", "| --- | --- | --- |"]
    for row in ROWS:
        shown = [_names("in CI", row.in_ci), _names("`DYNAMO_DISAGGREGATED`", row.with_nixl), row.by_hand and f"by hand: {row.by_hand}"]
        lines.append(f"| {row.asked} | {'; '.join(filter(None, shown))} | {row.not_run or '-'} |")
    return "\n".join(lines) + "\n"


def _names(where: str, tests: tuple[str, ...]) -> str:
    return f"{where}: " + ", ".join(f"`{test}`" for test in tests) if tests else ""


if __name__ == "__main__":
    print(table(), end="")
