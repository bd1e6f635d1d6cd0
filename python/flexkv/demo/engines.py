"""The two ways in which the demo completes a prompt: vLLM in this process's care, and an OpenAI server over HTTP.

Both count where a prompt's KV came from by the growth of vLLM's own counter `vllm:prompt_tokens_by_source`; requests run
one at a time, so the growth belongs to the request.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from .workload import Completion, Workload

KV_TRANSFER_CONFIG = {
    "kv_connector": "FlexKVConnectorV1",
    "kv_role": "kv_both",
    "kv_load_failure_policy": "recompute",
}
_COUNTER = "vllm:prompt_tokens_by_source"
# Room that vLLM may plan with; how much it really takes is set in blocks.
_KV_BYTES_BOUND = 2 << 30
_SERVER_START_SECONDS = 600


def engine_arguments(model: str, dtype: str, workload: Workload, flexkv: bool) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`, named as the fields of its EngineArgs."""
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "seed": 0,
        "max_model_len": workload.longest,
        "max_num_seqs": 4,
        "block_size": workload.block_size,
        "num_gpu_blocks_override": workload.engine_blocks,
        "kv_cache_memory_bytes": _KV_BYTES_BOUND,
        "enforce_eager": True,
    }
    if flexkv:
        arguments["kv_transfer_config"] = KV_TRANSFER_CONFIG
    return arguments


class LlmEngine:
    """vLLM's offline `LLM`. By vLLM's default its engine core and its workers are child processes."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM

        self._llm = LLM(**arguments, disable_log_stats=False)
        self._seen = self._sources()

    def complete(self, prompt: list[int], max_tokens: int) -> Completion:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        (output,) = self._llm.generate([{"prompt_token_ids": list(prompt)}], sampling, use_tqdm=False)
        before, self._seen = self._seen, self._sources()
        return Completion(
            tokens=list(output.outputs[0].token_ids),
            ttft_seconds=output.metrics.first_token_latency,
            engine_tokens=self._seen["local_cache_hit"] - before["local_cache_hit"],
            flexkv_tokens=self._seen["external_kv_transfer"] - before["external_kv_transfer"],
        )

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()

    def _sources(self) -> dict[str, int]:
        return {m.labels["source"]: int(m.value) for m in self._llm.get_metrics() if m.name == _COUNTER}


class ServerEngine:
    """An OpenAI server in a child process, and a client that streams; the time to first token is the client's."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._model = arguments["model"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        # Not the `vllm` script: the CPU build's does not find its own version.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), *_as_flags(arguments)]
        self._server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._wait_until_ready()
        self._seen = self._sources()

    def complete(self, prompt: list[int], max_tokens: int) -> Completion:
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        tokens: list[int] = []
        first = 0.0
        start = time.perf_counter()
        for chunk in self._stream("/v1/completions", body):
            for choice in chunk["choices"]:
                tokens += choice.get("token_ids") or []
            if tokens and not first:
                first = time.perf_counter() - start
        before, self._seen = self._seen, self._sources()
        return Completion(
            tokens=tokens,
            ttft_seconds=first,
            engine_tokens=self._seen["local_cache_hit"] - before["local_cache_hit"],
            flexkv_tokens=self._seen["external_kv_transfer"] - before["external_kv_transfer"],
        )

    def close(self) -> None:
        self._server.terminate()
        try:
            self._server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._server.kill()

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}: {response.read(2000).decode()}")
            for line in response:
                data = line.removeprefix(b"data: ").strip()
                if line.startswith(b"data: ") and data != b"[DONE]":
                    yield json.loads(data)
        finally:
            connection.close()

    def _get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _SERVER_START_SECONDS
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                raise RuntimeError(f"the server ended with code {self._server.returncode} while it started")
            try:
                if self._get("/health")[0] == 200:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.2)
        raise RuntimeError(f"the server was not ready after {_SERVER_START_SECONDS} s")

    def _sources(self) -> dict[str, int]:
        from prometheus_client.parser import text_string_to_metric_families

        return {
            sample.labels["source"]: int(sample.value)
            for family in text_string_to_metric_families(self._get("/metrics")[1])
            for sample in family.samples
            if sample.name == _COUNTER + "_total"
        }


def _as_flags(arguments: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            flags.append(flag)
        else:
            flags += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def quiet_environment() -> dict[str, str]:
    """The environment of an engine process: nothing is fetched, nothing is reported home."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}
