"""The program of an engine's process: `engine_child.py SPEC` carries out the spec's steps with vLLM's `LLM`.

Steps are objects with `op`:
  generate  `prompts` (token ids) together, greedy, `max_tokens` each; optional `salt`, `lora` ({name, path}),
            `prompt_logprobs`; a `name` under which the result is kept
  abort     the same prompts are added and aborted after `engine_steps` steps of the engine
  reset     empties the engine's own prefix cache, with `connector` also FlexKV's; it must not refuse, as a block that is
            still held would make it
  weights   changes the model's weights where they are
  sleep     vLLM's sleep, and what it does on GPUs: the connectors are told, and the memory of the KV cache is given away;
            `engine` false: without vLLM's part, which empties all caches
  wake      the end of that: other memory, the connectors told, vLLM's part
  settle    waits `seconds`, and on a busy machine until no node moves blocks: saves run beside the engine
  kv        writes to the file `path`, for each rank, a digest of what each device block holds, "" for zeros; needs
            VLLM_ALLOW_INSECURE_SERIALIZATION
  run       runs the program `argv` (kills or starts a daemon), which must succeed; `background`: does not wait for it
  fail_loads  from now on every load is given up before it begins, as a stalled node would make it; `on` false ends that
  die       kills this very process with SIGKILL, after writing the results so far
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from engine import marked_processes, open_descriptors


def settle(seconds: float) -> None:
    from flexkv import _core

    time.sleep(seconds)
    deadline = time.monotonic() + 10
    for path in Path(os.environ.get("FLEXKV_RUNTIME_DIR", "/nowhere")).glob("*.sock"):
        try:
            while json.loads(_core.query_status(str(path)))["queues"]["jobs_in_flight"] > 0:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
        except RuntimeError:  # a dead daemon's
            continue


class Engine:
    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVEventsConfig

        if "kv_events_config" in arguments:
            arguments["kv_events_config"] = KVEventsConfig(**arguments["kv_events_config"])
        self._llm = LLM(**arguments)
        self._added = 0

    def schedules_asynchronously(self) -> bool:
        return bool(self._llm.llm_engine.vllm_config.scheduler_config.async_scheduling)

    def generate(self, step: dict[str, Any]) -> dict[str, Any]:
        before = self._counters()
        outputs = self._llm.generate(
            [self._prompt(step, ids) for ids in step["prompts"]],
            self._sampling(step),
            lora_request=self._lora(step),
            use_tqdm=False,
        )
        after = self._counters()
        grown = {name: after[name] - before[name] for name in after}
        return grown | {
            "outputs": [list(output.outputs[0].token_ids) for output in outputs],
            "prompt_logprobs": [_chosen_logprobs(output) for output in outputs],
            "descriptors": open_descriptors(marked_processes(os.environ["E2E_RUN_ID"])),
        }

    def abort(self, step: dict[str, Any]) -> None:
        engine = self._llm.llm_engine
        ids = []
        for prompt in step["prompts"]:
            self._added += 1
            ids.append(engine.add_request(f"abort-{self._added}", self._prompt(step, prompt), self._sampling(step)))
        for _ in range(step["engine_steps"]):
            engine.step()
        engine.abort_request([i or f"abort-{n + 1}" for n, i in enumerate(ids)])
        while engine.has_unfinished_requests():
            engine.step()

    def reset(self, step: dict[str, Any]) -> bool:
        # With the engine in a process of its own an abort may still be on its way there.
        deadline = time.monotonic() + step.get("patience", 5.0)
        arguments = {"reset_connector": True} if step.get("connector") else {}
        while not (done := self._llm.reset_prefix_cache(**arguments)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return done

    def change_weights(self) -> None:
        self._llm.collective_rpc(_change_weights)

    def sleep(self, step: dict[str, Any]) -> None:
        if step.get("engine", True):
            self._llm.sleep(level=1)
        self._llm.collective_rpc(_give_kv_memory_away)

    def wake(self, step: dict[str, Any]) -> None:
        if not all(self._llm.collective_rpc(_take_other_kv_memory)):
            sys.exit("the KV cache was to get other memory, and has not")
        if step.get("engine", True):
            self._llm.wake_up()

    def write_kv(self, step: dict[str, Any]) -> None:
        Path(step["path"]).write_text(json.dumps(self._llm.collective_rpc(_kv_digests)))

    @staticmethod
    def run(step: dict[str, Any]) -> None:
        if step.get("background"):
            subprocess.Popen(step["argv"], start_new_session=True, stdin=subprocess.DEVNULL)
        else:
            subprocess.run(step["argv"], check=True)

    @staticmethod
    def fail_loads(step: dict[str, Any]) -> None:
        """Only for engines in this process: the rank agent is asked to give each load up, by its own means."""
        from flexkv.integration.vllm.metadata import by_group
        from flexkv.integration.vllm.worker import WorkerSide

        original = getattr(WorkerSide, "_original_start_loads", WorkerSide.start_loads)
        WorkerSide._original_start_loads = original

        def give_up(self: Any, meta: Any, layers_will_ask: bool) -> None:
            for group, jobs in by_group([job for order in meta.loads for job in order.jobs]).items():
                self._agents[group].cancel(jobs)
            original(self, meta, layers_will_ask)

        WorkerSide.start_loads = give_up if step["on"] else original

    def close(self) -> None:
        # vLLM's engine waits in `Queue.get` for what ends it, and Python loses a signal that comes between its last look for
        # signals and that wait: on a busy machine one in a hundred that follow a reply at once.
        time.sleep(0.5)
        # By default vLLM kills its processes after 5 s, and what they leave then would be blamed on us.
        self._llm.llm_engine.engine_core.shutdown(timeout=60)

    @staticmethod
    def _prompt(step: dict[str, Any], ids: list[int]) -> dict[str, Any]:
        return {"prompt_token_ids": list(ids)} | ({"cache_salt": step["salt"]} if "salt" in step else {})

    @staticmethod
    def _sampling(step: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=0,
            max_tokens=step["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            prompt_logprobs=step.get("prompt_logprobs"),
        )

    @staticmethod
    def _lora(step: dict[str, Any]) -> Any:
        if "lora" not in step:
            return None
        from vllm.lora.request import LoRARequest

        return LoRARequest(step["lora"]["name"], step["lora"]["id"], step["lora"]["path"])

    def _counters(self) -> dict[str, int]:
        names = {"local_compute": "computed", "local_cache_hit": "engine_hits", "external_kv_transfer": "flexkv_hits"}
        counters = {}
        for metric in self._llm.get_metrics():
            if metric.name == "vllm:prompt_tokens_by_source":
                counters[names[metric.labels["source"]]] = int(metric.value)
            elif metric.name == "vllm:num_preemptions":
                counters["preemptions"] = int(metric.value)
        return counters


def _chosen_logprobs(output: Any) -> list[float]:
    """The log-probability of each prompt token but the first, as far as they were asked for."""
    positions = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
    return [position[token].logprob for token, position in positions if position]


def _change_weights(worker: Any) -> None:
    import torch

    draw = torch.Generator().manual_seed(7)
    for weights in worker.model_runner.model.parameters():
        weights.data *= 1 + 0.3 * torch.randn(weights.shape, generator=draw, dtype=weights.dtype)


def _give_kv_memory_away(worker: Any) -> None:
    """As vLLM's allocator does on GPUs, where a connector of vLLM's own, or none, is told nothing."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    if has_kv_transfer_group():
        getattr(get_kv_transfer_group(), "unregister_kv_caches", lambda: None)()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in worker.model_runner.kv_caches
    }
    worker.e2e_asleep = [(storage, storage.nbytes(), address) for address, storage in storages.items()]
    for storage in storages.values():
        storage.resize_(0)


def _take_other_kv_memory(worker: Any) -> bool:
    """Whether it lies elsewhere now. It is full of 0.747, which no block of a model's KV is."""
    import torch
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    for storage, size, address in worker.e2e_asleep:
        storage.resize_(size)
        if storage.data_ptr() == address:
            storage.resize_(size + 4096)  # elsewhere, as it is copied from here
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0x3F)
    if has_kv_transfer_group():
        getattr(get_kv_transfer_group(), "restore_kv_caches", lambda: None)()
    return all(storage.data_ptr() != address for storage, _, address in worker.e2e_asleep)


def _kv_digests(worker: Any) -> list[str]:
    """In a worker process."""
    import hashlib

    import torch

    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    caches = [cache[0] if isinstance(cache, (list, tuple)) else cache for cache in (layer.kv_cache for layer in layers)]
    blocks = (
        b"".join(cache[i].contiguous().view(torch.uint8).numpy().tobytes() for cache in caches)
        for i in range(caches[0].shape[0])
    )
    return [hashlib.sha256(block).hexdigest() if any(block) else "" for block in blocks]


def _force_async_scheduling() -> None:
    """vLLM's CPU platform switches it off whatever the user says; the scheduler itself does not mind."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def keep(cls: type, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = classmethod(keep)


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    if spec["async_scheduling"]:
        _force_async_scheduling()
    engine = Engine(spec["arguments"])
    if engine.schedules_asynchronously() != spec["async_scheduling"]:
        sys.exit("the engine did not take the scheduling mode that the test asks for")
    results: dict[str, dict[str, Any]] = {}
    last_reset = None
    for number, step in enumerate(spec["steps"]):
        start = time.monotonic()
        match step["op"]:
            case "generate":
                results[step["name"]] = engine.generate(step) | {"reset": last_reset}
            case "abort":
                engine.abort(step)
            case "reset":
                last_reset = engine.reset(step)
            case "weights":
                engine.change_weights()
            case "sleep":
                engine.sleep(step)
            case "wake":
                engine.wake(step)
            case "settle":
                settle(step["seconds"])
            case "kv":
                engine.write_kv(step)
            case "run":
                engine.run(step)
            case "fail_loads":
                engine.fail_loads(step)
            case "die":
                Path(spec["results"]).write_text(json.dumps(results))
                os.killpg(0, signal.SIGKILL)
        print(f"step {number} {step['op']} {step.get('name', '')}: {time.monotonic() - start:.3f} s", flush=True)
    engine.close()
    Path(spec["results"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
