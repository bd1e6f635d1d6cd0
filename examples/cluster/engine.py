"""An engine on a node of the cluster, as cluster.py starts it: computes a prompt, or finds it.

usage: python examples/cluster/engine.py MODEL compute|find RESULT_FILE      with FLEXKV_NODE and FLEXKV_RUNTIME_DIR
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

# Small, and in this process.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm import LLM, SamplingParams

BLOCK = 32
PROMPT = "".join(f"Line {i}: the value of this line is {i * i}.\n" for i in range(40))
CONNECTOR = {
    "kv_connector": "FlexKVConnector",
    "kv_connector_module_path": "flexkv.integration.vllm.connector",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}


def wait_for(what: str, blocks: int) -> None:
    """Until this engine's node has told the others of so many blocks, or knows of so many of theirs."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "flexkv.cli",
        "cluster",
        "status",
        "--name",
        os.environ["FLEXKV_NODE"],
        "--json",
    ]
    while True:
        status = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        if status["nodes"][0]["cluster"]["directory"][what] >= blocks:
            return
        time.sleep(0.5)


def main(model: str, role: str, result: Path) -> None:
    llm = LLM(model=model, dtype="float32", block_size=BLOCK, enforce_eager=True, kv_transfer_config=CONNECTOR)
    blocks = len(llm.get_tokenizer().encode(PROMPT)) // BLOCK
    if role == "find":
        # A node begins to follow what others have of a model when an engine of that model has come.
        wait_for("blocks", blocks)
    (output,) = llm.generate(PROMPT, SamplingParams(max_tokens=16, temperature=0), use_tqdm=False)
    if role == "compute":
        wait_for("told_blocks", blocks)
    answer = {"cached": output.num_cached_tokens, "asked": len(output.prompt_token_ids)}
    result.write_text(json.dumps(answer | {"answer": list(output.outputs[0].token_ids)}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
