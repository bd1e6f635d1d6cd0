"""What each connector method costs vLLM's scheduler thread, for one prompt of 100,000 tokens in blocks of 16.

The real scheduler side, embedded node and rank agent, with vLLM's own Request, hashes and output classes; KV memory is a
small tensor, so copying is not what is measured.
usage: scheduler_cost.py MODEL_DIR [events] (any model folder, weights not needed; events: KV events are wanted)
Prints microseconds: the first call, then the median and the largest of those that followed: 200 repeated ones, or one
for each of 10 further prompts where a prompt allows only one.
"""

from __future__ import annotations

import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

TOKENS = 100_000
BLOCK = 16
REPEATS = 200
PROMPTS = 11


def main() -> None:
    import torch
    from vllm import SamplingParams
    from vllm.config import KVEventsConfig, KVTransferConfig, set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.gc_utils import freeze_gc_heap
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from flexkv import _core
    from flexkv.config import load
    from flexkv.integration.vllm import identity
    from flexkv.integration.vllm.groups import groups_of
    from flexkv.integration.vllm.scheduler import SchedulerSide

    config = EngineArgs(
        model=sys.argv[1],
        max_model_len=2048,
        dtype="float32",
        kv_transfer_config=KVTransferConfig(kv_connector="FlexKVConnectorV1", kv_role="kv_both"),
        kv_events_config=KVEventsConfig(enable_kv_cache_events=sys.argv[2:] == ["events"], publisher="null"),
    ).create_engine_config()
    config.cache_config.block_size = BLOCK
    settings = load(extra={"cpu_cache_gb": "512MB", "log_level": "error", "sync_load_max_mb": 0})
    blocks = TOKENS // BLOCK
    with set_current_vllm_config(config):
        scheduler = SchedulerSide(config, settings, groups_of(config, None))
    memory = torch.zeros(blocks + 1, 1, BLOCK, 16)
    options = {
        "runtime_dir": settings.node_target.runtime_dir,
        "node_name": identity.embedded_node_name(config),
        "engine_id": identity.engine_id(config),
        "rank": 0,
        "rank_count": 1,
        "log_level": "error",
    }
    tensor = {
        "name": "kv",
        "address": memory.data_ptr(),
        "element_bytes": 4,
        "shape": list(memory.shape),
        "stride": list(memory.stride()),
    }
    agent = _core.RankAgent(options, [tensor], blocks + 1, "host")
    while not agent.counters()["attached"]:
        time.sleep(0.01)

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)

    def request(name: str, prompt: int) -> Any:
        return Request(
            request_id=name,
            prompt_token_ids=[(i * 7919 + prompt) % 500 + 4 for i in range(TOKENS)],
            sampling_params=SamplingParams(max_tokens=16),
            pooling_params=None,
            block_hasher=hasher,
        )

    table = list(range(1, blocks + 1))
    kv_blocks = SimpleNamespace(get_block_ids=lambda: (table,))

    def step(new: list[Any], cached: dict[str, int], scheduled: dict[str, int]) -> Any:
        return SimpleNamespace(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=list(cached),
                resumed_req_ids=set(),
                new_block_ids=[None] * len(cached),
                num_computed_tokens=list(cached.values()),
            ),
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
        )

    freeze_gc_heap()  # as vLLM does: what there is when an engine is ready is never looked through again
    rows: dict[str, list[float]] = {}

    def timed(name: str, call: Any, repeats: int = 0) -> Any:
        for _ in range(repeats + 1):
            begin = time.perf_counter_ns()
            result = call()
            rows.setdefault(name, []).append((time.perf_counter_ns() - begin) / 1000)
        return result

    for prompt in range(PROMPTS):
        repeats = REPEATS if prompt == PROMPTS - 1 else 0
        # The first request saves its prompt, so that the second one finds it.
        first, second = request(f"first-{prompt}", prompt), request(f"second-{prompt}", prompt)
        timed("lookup, nothing kept", lambda: scheduler.get_num_new_matched_tokens(first, 0), repeats)
        scheduler.update_state_after_alloc(first, kv_blocks, 0)
        new = SimpleNamespace(req_id=first.request_id, num_computed_tokens=0, block_ids=(table,))
        output = step([new], {}, {first.request_id: TOKENS})
        meta = timed("build_connector_meta, saves 6,250 blocks", lambda: scheduler.build_connector_meta(output))
        saves = [job for _, job in meta.saves]
        agent.arm_saves(saves, 0)
        agent.fence(saves, 60_000)
        time.sleep(0.05)  # until the node has heard of it
        timed("take_events, 4,096 blocks (no more at a time)", scheduler.take_events)
        timed("take_events, the other 2,154", scheduler.take_events)
        timed("take_events, nothing new", scheduler.take_events, repeats)

        found = timed("lookup, all kept", lambda: scheduler.get_num_new_matched_tokens(second, 0), repeats)
        assert found[0] >= TOKENS - BLOCK, found
        timed(
            "update_state_after_alloc, orders a load of 6,249 blocks",
            lambda: scheduler.update_state_after_alloc(second, kv_blocks, found[0]),
        )
        empty = step([], {}, {})
        meta = timed("build_connector_meta, with that load", lambda: scheduler.build_connector_meta(empty))
        loads = [job for order in meta.loads for _, job in order.jobs]
        agent.arm_loads(loads, 0)
        assert agent.wait_loads(loads) == []
        decoding = step([], {first.request_id: TOKENS}, {first.request_id: 1})
        timed("build_connector_meta, one decoding request", lambda: scheduler.build_connector_meta(decoding), repeats)
        timed("build_connector_meta, empty step", lambda: scheduler.build_connector_meta(empty), repeats)
        timed("request_finished", lambda: scheduler.request_finished(second))
        scheduler.request_finished(first)

    print(f"{'microseconds':58} {'first':>9} {'median':>9} {'largest':>9}")
    for name, taken in rows.items():
        rest = taken[1:]
        again = f"{statistics.median(rest):9.1f} {max(rest):9.1f}" if rest else ""
        print(f"{name:58} {taken[0]:9.1f} {again}")
    agent.stop()
    scheduler.shutdown()


if __name__ == "__main__":
    main()
