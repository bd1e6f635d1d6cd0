"""The program of an engine's process: `engine_child.py SPEC` carries out the spec's steps with vLLM's `LLM`.

Steps are objects with `op`:
  generate  `prompts` (token ids) together, greedy, `max_tokens` each; optional `salt`, `lora` ({name, path}),
            `prompt_logprobs`, `n` (answers to each prompt, drawn), `after` (the prompts go on from those of the step of this name
            and its answers), `images` and `embeds` (a seed for each prompt: it holds an image, or is its embeddings and
            only as long as its token ids); a `name` under which the result is kept
  beam      the same as a search among two beams
  embed     the prompts' vectors, of a pooling model
  abort     the same prompts are added and aborted after `engine_steps` steps of the engine
  reset     empties the engine's own prefix cache, with `connector` also FlexKV's; it must not refuse, as a block that is
            still held would make it
  weights   changes the model's weights where they are
  sleep     vLLM's sleep, and what it does on GPUs: the connectors are told, and the memory of the KV cache is given away;
            `engine` false: without vLLM's part, which empties all caches
  wake      the end of that: other memory, the connectors told, vLLM's part
  settle    waits `seconds`, and on a busy machine until no node moves blocks: saves run beside the engine
  pace      an engine in this process begins a step only when no node moves blocks, until `on` is false. Where it schedules step
            by step, it gives blocks behind a window away in the very next one, and saves that have not ended are called off
  kv        writes to the file `path`, for each rank, a digest of what each device block holds, "" for zeros; needs
            VLLM_ALLOW_INSECURE_SERIALIZATION
  run       runs the program `argv` (kills or starts a daemon), which must succeed; `background`: does not wait for it
  fail_loads  from now on every load is given up before it begins, as a stalled node would make it; `on` false ends that
  spoil_states  from now on states are saved wrongly, as `how` says (spoilt_states.py)
  churn     generates the answers of `prompts`, one prompt after the other, with the engine's own cache empty, again and again
            until there is a file `until`; every time they must be the same
  status    writes the status of the node in FLEXKV_RUNTIME_DIR to the file `path`
  die_in_writes  from now on, beside the steps that follow: as soon as drives have writes of the node at `socket` (none given:
            of the engine's own), and have written `written` blocks before, the status that says so goes to the file `path`, and
            this process is killed with SIGKILL, after the processes `also`. The results are those so far
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import spoilt_states
from engine import marked_processes, open_descriptors


def settle(seconds: float) -> None:
    from flexkv import _core

    time.sleep(seconds)
    deadline = time.monotonic() + 60
    for path in Path(os.environ.get("FLEXKV_RUNTIME_DIR", "/nowhere")).glob("*.sock"):
        try:
            while json.loads(_core.query_status(str(path)))["queues"]["jobs_in_flight"] > 0:
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)
        except RuntimeError:  # a dead daemon's
            continue


def own_sockets() -> list[Path]:
    return list(Path(os.environ["FLEXKV_RUNTIME_DIR"]).glob("*.sock"))


def write_status(step: dict[str, Any]) -> None:
    from flexkv import _core

    (socket,) = own_sockets()
    Path(step["path"]).write_text(_core.query_status(str(socket)))


def die_in_writes(step: dict[str, Any]) -> None:
    """Between a look at the status and the signals there is only what must be."""
    from flexkv import _core

    with Path(step["path"]).open("wb", buffering=0) as said:
        while True:
            for socket in [Path(step["socket"])] if "socket" in step else own_sockets():
                try:
                    status = _core.query_status(str(socket))
                except RuntimeError:  # it has not begun yet
                    continue
                fields = json.loads(status)
                drives = fields["disk"]["drives"]
                under_way = fields["queues"]["disk_writes"] > 0 and any(drive["queued"] for drive in drives)
                if under_way and sum(drive["blocks_written"] for drive in drives) >= step["written"]:
                    for pid in step.get("also", ()):
                        os.kill(pid, signal.SIGKILL)
                    said.write(status.encode())
                    os.killpg(0, signal.SIGKILL)


class Engine:
    def __init__(self, arguments: dict[str, Any]) -> None:
        from vllm import LLM
        from vllm.config import KVEventsConfig

        if "kv_events_config" in arguments:
            arguments["kv_events_config"] = KVEventsConfig(**arguments["kv_events_config"])
        self._llm = LLM(**arguments)
        if arguments.get("pipeline_parallel_size", 1) > 1:
            # vLLM (0.32) leaves this out on CPUs in eager mode; then all stages but the first lack room for their input.
            self._llm.collective_rpc(_profile)
        self._step = self._llm.llm_engine.step
        self._added = 0
        self._said: dict[str, list[list[int]]] = {}  # prompts and answers, by step

    def schedules_asynchronously(self) -> bool:
        return bool(self._llm.llm_engine.vllm_config.scheduler_config.async_scheduling)

    def generate(self, step: dict[str, Any]) -> dict[str, Any]:
        before = self._counters()
        prompts = step["prompts"]
        if "after" in step:
            prompts = [said + more for said, more in zip(self._said[step["after"]], prompts, strict=True)]
        outputs = self._llm.generate(
            [self._prompt(step, number, ids) for number, ids in enumerate(prompts)],
            self._sampling(step),
            lora_request=self._lora(step),
            use_tqdm=False,
        )
        answers = [list(answer.token_ids) for output in outputs for answer in output.outputs]
        self._said[step["name"]] = [ids + answer for ids, answer in zip(prompts, answers, strict=False)]
        return self._result(before) | {
            "outputs": answers,
            "prompt_logprobs": [_chosen_logprobs(output) for output in outputs],
            "errors": sum(answer.finish_reason == "error" for output in outputs for answer in output.outputs),
        }

    def churn(self, step: dict[str, Any]) -> dict[str, Any]:
        first: dict[str, Any] = {}
        while not first or not Path(step["until"]).exists():
            outputs = []
            for ids in step["prompts"]:
                result = self.generate(step | {"prompts": [ids]})
                outputs += result["outputs"]
                self.reset({})
            first = first or result | {"outputs": outputs}
            if outputs != first["outputs"]:
                sys.exit(f"other answers than before: {outputs}")
        return first

    def beam(self, step: dict[str, Any]) -> dict[str, Any]:
        from vllm.sampling_params import BeamSearchParams

        before = self._counters()
        params = BeamSearchParams(beam_width=2, max_tokens=step["max_tokens"], ignore_eos=True)
        prompts = [self._prompt(step, number, ids) for number, ids in enumerate(step["prompts"])]
        outputs = self._llm.beam_search(prompts, params)
        return self._result(before) | {"outputs": [beam.tokens for output in outputs for beam in output.sequences]}

    def embed(self, step: dict[str, Any]) -> dict[str, Any]:
        before = self._counters()
        prompts = [self._prompt(step, number, ids) for number, ids in enumerate(step["prompts"])]
        outputs = self._llm.embed(prompts, use_tqdm=False)
        return self._result(before) | {"vectors": [output.outputs.embedding for output in outputs]}

    def _result(self, before: dict[str, int]) -> dict[str, Any]:
        """What the counters have grown by, and nothing else yet."""
        after = self._counters()
        return {name: after[name] - before[name] for name in after} | {
            "outputs": [],
            "prompt_logprobs": [],
            "vectors": [],
            "errors": 0,
            "descriptors": open_descriptors(marked_processes(os.environ["E2E_RUN_ID"])),
        }

    def pace(self, step: dict[str, Any]) -> None:
        engine = self._llm.llm_engine
        engine.step = self._paced_step if step["on"] else self._step

    def _paced_step(self) -> Any:
        outputs = self._step()
        settle(0)
        return outputs

    def abort(self, step: dict[str, Any]) -> None:
        engine = self._llm.llm_engine
        ids = []
        for number, prompt in enumerate(step["prompts"]):
            self._added += 1
            prompt = self._prompt(step, number, prompt)
            ids.append(engine.add_request(f"abort-{self._added}", prompt, self._sampling(step)))
        for _ in range(step["engine_steps"]):
            engine.step()
        engine.abort_request([i or f"abort-{n + 1}" for n, i in enumerate(ids)])
        while engine.has_unfinished_requests():
            engine.step()

    def reset(self, step: dict[str, Any]) -> bool:
        # With the engine in a process of its own an abort may still be on its way there.
        deadline = time.monotonic() + step.get("patience", 60.0)
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

    def _prompt(self, step: dict[str, Any], number: int, ids: list[int]) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
        if "embeds" in step:
            hidden = self._llm.model_config.get_hidden_size()
            prompt = {"prompt_embeds": _random_embeddings(step["embeds"][number], len(ids), hidden)}
        if "images" in step:
            prompt["multi_modal_data"] = {"image": _random_image(step["images"][number])}
        return prompt | ({"cache_salt": step["salt"]} if "salt" in step else {})

    @staticmethod
    def _sampling(step: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            temperature=1 if "n" in step else 0,
            seed=7,
            n=step.get("n", 1),
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
        counters = {"drafted": 0, "accepted": 0}
        for metric in self._llm.get_metrics():
            if metric.name == "vllm:prompt_tokens_by_source":
                counters[names[metric.labels["source"]]] = int(metric.value)
            elif metric.name == "vllm:num_preemptions":
                counters["preemptions"] = int(metric.value)
            elif metric.name in _SPECULATION:
                counters[_SPECULATION[metric.name]] = int(metric.value)
        return counters


_SPECULATION = {
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
}


def _random_embeddings(seed: int, tokens: int, hidden: int) -> Any:
    import torch

    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def _random_image(seed: int) -> Any:
    import numpy
    from PIL import Image

    pixels = numpy.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def _chosen_logprobs(output: Any) -> list[float]:
    """The log-probability of each prompt token but the first, as far as they were asked for."""
    positions = zip(output.prompt_token_ids, output.prompt_logprobs or [], strict=False)
    return [position[token].logprob for token, position in positions if position]


def _profile(worker: Any) -> None:
    worker.model_runner.profile_run()


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
            case "beam":
                results[step["name"]] = engine.beam(step) | {"reset": last_reset}
            case "embed":
                results[step["name"]] = engine.embed(step) | {"reset": last_reset}
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
            case "pace":
                engine.pace(step)
            case "kv":
                engine.write_kv(step)
            case "run":
                engine.run(step)
            case "fail_loads":
                engine.fail_loads(step)
            case "spoil_states":
                spoilt_states.spoil(step["how"])
            case "churn":
                results[step["name"]] = engine.churn(step) | {"reset": last_reset}
            case "status":
                write_status(step)
            case "die_in_writes":
                Path(spec["results"]).write_text(json.dumps(results))
                threading.Thread(target=die_in_writes, args=[step], daemon=True).start()
            case "die":
                Path(spec["results"]).write_text(json.dumps(results))
                os.killpg(0, signal.SIGKILL)
        print(f"step {number} {step['op']} {step.get('name', '')}: {time.monotonic() - start:.3f} s", flush=True)
    engine.close()
    Path(spec["results"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
