"""Asks two questions about one long document. The second one finds the document's KV in FlexKV, although vLLM's own cache
has been emptied in between, as it is when other prompts need the room.

usage: python examples/vllm/offline.py MODEL      (without a GPU: VLLM_CPU_KVCACHE_SPACE=4 before it)
"""

from __future__ import annotations

import sys

from vllm import LLM, SamplingParams

FLEXKV = {
    "kv_connector": "FlexKVConnector",
    "kv_connector_module_path": "flexkv.integration.vllm.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",  # vLLM's default would end a request whose KV cannot be loaded
    # Without this 16 GiB of host memory, or what fits: "kv_connector_extra_config": {"cpu_cache_gb": 64},
}
DOCUMENT = "".join(f"Line {i}: the value of this line is {i * i}.\n" for i in range(40))


def main(model: str) -> None:
    llm = LLM(model=model, kv_transfer_config=FLEXKV)
    for question in ("What is the value of line 7?", "Which line has the value 144?"):
        (output,) = llm.generate(DOCUMENT + question, SamplingParams(max_tokens=16), use_tqdm=False)
        print(f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were not computed again")
        llm.reset_prefix_cache()


if __name__ == "__main__":
    main(sys.argv[1])
