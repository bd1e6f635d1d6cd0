"""An engine of the soak: a scheduler's client and the agents of its ranks in one process, with numpy for a model.

    python -m soak.engine OPTIONS-AS-JSON

SIGUSR1: begin nothing new, stay connected. SIGTERM: end at once, as an engine ends. It writes what it did every second,
and what must not be at the moment it sees it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexkv import _core
from soak.content import BLOCK_TOKENS, Memory, Prompt, private_prompt, shared_prompt

_REQUESTS_MAX = 8
_DEVICE_BLOCKS = 384
_SLACK_S = 1.0  # beyond a deadline, for an engine that shares its cores with others
_CALL_MAX_S = 1.0
_POLL_S = 0.05  # a loop that takes longer did not look: that is not the operation's time
_RESET_PERIOD_S = 45.0


class Request:
    def __init__(self, prompt: Prompt, blocks: list[int], sequence: int) -> None:
        self.prompt = prompt
        self.blocks = blocks
        self.sequence = sequence
        self.state = "waiting"
        self.not_before = 0.0
        self.outdated = False  # the cache was reset since: what it has must not be saved
        self.closed = False
        self.first = self.matched = 0  # what is loaded
        self.job = 0
        self.waiting_ranks: set[int] = set()
        self.good = 0  # leading blocks of the load that all ranks have
        self.cancel_at = float("inf")
        self.began = self.began_lag = 0.0
        self.saves: set[int] = set()


class Engine:
    def __init__(self, options: dict[str, Any]) -> None:
        self.name = options["name"]
        self.owner = f"{self.name}.{options['incarnation']}"
        self.space = options["space"]
        self.draw = random.Random(f"{options['seed']} {self.owner}")
        self.out = Path(options["out"])
        self.load_limit_s = options["load_timeout_ms"] / 1000 + _SLACK_S
        self.save_limit_s = options["save_timeout_ms"] / 1000 + _SLACK_S
        ranks = options["ranks"]
        self.memories = [Memory(rank, _DEVICE_BLOCKS) for rank in range(ranks)]
        where = {"runtime_dir": options["runtime_dir"], "node_name": "soak", "engine_id": self.name}
        limits = {key: options[key] for key in ("load_timeout_ms", "save_timeout_ms")}
        self.agents = [
            _core.RankAgent(
                where | limits | {"rank": rank, "rank_count": ranks, "log_level": "error"},
                memory.describe(),
                memory.block_count,
                "host",
            )
            for rank, memory in enumerate(self.memories)
        ]
        self.parts = self.agents[0].parts()
        self.client = _core.Client.remote(
            options["runtime_dir"], "soak", self.name, ranks, self.space, self.space.encode().ljust(32), BLOCK_TOKENS
        )
        self.free = list(range(_DEVICE_BLOCKS))
        self.requests: list[Request] = []
        self.loading: dict[int, Request] = {}
        self.saving: dict[int, tuple[Request, float, float]] = {}
        self.generation = 0
        self.version = 0
        self.private_seen: Prompt | None = None
        self.next_reset = time.monotonic() + self.draw.uniform(0.3, 1.5) * _RESET_PERIOD_S
        self.lag = 0.0
        self.counts: Counter[str] = Counter()
        self.longest: dict[str, float] = {}
        self.draining = self.ending = False
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "draining", True))
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "ending", True))

    # ---- what is told

    def report(self, kind: str, **facts: Any) -> None:
        """What must not be: read by the soak while this process may be killed at any moment."""
        self.counts[f"reported {kind}"] += 1
        line = json.dumps({"kind": kind, "engine": self.owner, "at": time.monotonic(), **facts}) + "\n"
        with open(self.out / "reports.jsonl", "ab", buffering=0) as file:
            file.write(line.encode())

    def tell(self) -> None:
        state = {
            "engine": self.owner,
            "at": time.monotonic(),
            "counts": dict(self.counts),
            "longest_s": self.longest,
            "requests": len(self.requests),
            "attached": all(agent.counters()["attached"] for agent in self.agents) and self.client.ready(),
            "drained": self.draining and not self.requests,
        }
        path = self.out / f"{self.owner}.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        os.replace(temporary, path)

    @contextmanager
    def timed(self, call: str):
        begin = time.monotonic()
        yield
        took = time.monotonic() - begin
        self.counts[f"calls {call}"] += 1
        self.longest[call] = max(self.longest.get(call, 0.0), took)
        if took > _CALL_MAX_S:
            self.report("slow call", call=call, began=begin, ended=begin + took, over_s=took - _CALL_MAX_S)

    def ended(self, operation: str, began: float, began_lag: float, limit: float) -> None:
        now = time.monotonic()
        took = now - began - (self.lag - began_lag)
        self.longest[operation] = max(self.longest.get(operation, 0.0), took)
        if took > limit:
            self.report("late", operation=operation, began=began, ended=now, over_s=took - limit)

    # ---- the loop

    def run(self) -> None:
        told = polled = time.monotonic()
        while not self.ending:
            now = time.monotonic()
            self.lag += max(0.0, now - polled - _POLL_S)
            polled = now
            busy = self.take_news()
            if now >= self.next_reset and not self.draining:
                self.reset()
            while not self.draining and len(self.requests) < _REQUESTS_MAX and self.begin_request():
                busy = True
            for request in list(self.requests):
                busy |= self.advance(request)
            if now - told >= 1:
                told = now
                self.tell()
            if not busy:
                time.sleep(0.0005)
        self.client.close()
        for agent in self.agents:
            agent.stop()
        self.tell_end()

    def tell_end(self) -> None:
        (self.out / f"{self.owner}.ended").touch()

    def take_news(self) -> bool:
        busy = False
        for rank, agent in enumerate(self.agents):
            for job, _, good in agent.take_loads():
                busy = True
                if (request := self.loading.get(job)) is not None:
                    self.rank_loaded(request, rank, good)
        with self.timed("take_ended_jobs"):
            ended = self.client.take_ended_jobs()
        for job, problem in ended:
            if (save := self.saving.pop(job, None)) is not None:
                busy = True
                self.counts[f"saves ended {problem or 'complete'}"] += 1
                self.ended("save", save[1], save[2], self.save_limit_s)
                save[0].saves.discard(job)
        if (generation := self.client.generation()) != self.generation:
            # Nobody will tell how these end; from a cancellation on their blocks are ours.
            self.generation = generation
            self.counts["generations"] += 1
            for job, (request, _, _) in self.saving.items():
                self.cancel_save(job)
                request.saves.discard(job)
            self.saving.clear()
        return busy

    def reset(self) -> None:
        self.next_reset = time.monotonic() + self.draw.uniform(0.5, 1.5) * _RESET_PERIOD_S
        with self.timed("reset"):
            self.client.reset()
        self.counts["resets"] += 1
        self.version += 1
        for request in self.requests:
            request.outdated = True
        if self.private_seen is not None:
            sequence = self.client.open_sequence()
            matched, reason, _ = self.client.lookup(sequence, self.private_seen.hashes)
            self.client.close_sequence(sequence)
            if matched > 0:
                self.report("found after a reset", blocks=matched, reason=reason)
            self.private_seen = None

    # ---- one request

    def begin_request(self) -> bool:
        private = self.draw.random() < 0.3
        prompt = (
            private_prompt(self.draw, self.owner, self.version)
            if private
            else shared_prompt(self.draw, self.space, time.time())
        )
        if len(prompt.hashes) > len(self.free):
            return False
        blocks = [self.free.pop() for _ in prompt.hashes]
        self.draw.shuffle(self.free)
        request = Request(prompt, blocks, self.client.open_sequence())
        self.requests.append(request)
        self.counts["requests"] += 1
        if self.draw.random() < 0.4:
            with self.timed("prefetch"):
                self.client.prefetch(request.sequence, prompt.hashes)
            request.not_before = time.monotonic() + self.draw.uniform(0, 0.1)
        return True

    def advance(self, request: Request) -> bool:
        now = time.monotonic()
        if request.state == "waiting":
            if now < request.not_before:
                return False
            self.look_up(request)
        elif request.state == "loading":
            if now >= request.cancel_at:
                request.cancel_at = float("inf")
                self.cancel_load(request)
            if request.waiting_ranks:
                return False
            self.loaded(request)
        elif request.state == "saving":
            if now >= request.cancel_at and request.saves:
                for job in request.saves:
                    self.cancel_save(job)
                    self.saving.pop(job, None)
                request.saves.clear()
                # The law: from now on these bytes are nobody's but ours.
                self.forget(request, 0, len(request.blocks))
                self.finish(request)
                return True
            if request.saves:
                return False
            self.check(request, 0, len(request.blocks), "device memory changed")
            self.finish(request)
        return True

    def look_up(self, request: Request) -> None:
        if request.outdated:
            return self.finish(request)
        with self.timed("lookup"):
            matched, _, on_drives = self.client.lookup(request.sequence, request.prompt.hashes)
        self.counts["blocks looked up"] += len(request.blocks)
        self.counts["blocks found"] += matched
        self.counts["blocks found on drives"] += on_drives
        request.matched = min(matched, len(request.blocks))
        if matched > len(request.blocks):
            self.report("found more than asked for", blocks=matched)
        # Now and then the engine has the beginning itself.
        request.first = self.draw.randrange(request.matched) if matched and self.draw.random() < 0.15 else 0
        if request.matched == 0:
            return self.compute(request)
        self.forget(request, request.first, request.matched)
        with self.timed("load"):
            job = self.client.load(request.sequence, request.first, request.blocks[request.first : request.matched])
        self.counts["loads"] += 1
        request.job = job
        request.good = request.matched - request.first
        request.state = "loading"
        request.began, request.began_lag = time.monotonic(), self.lag
        chance = self.draw.random()
        if chance < 0.15:
            return self.load_in_parts(request)
        if chance < 0.20:
            request.cancel_at = request.began + self.draw.uniform(0, 0.02)
        elif chance < 0.23:  # the request is aborted; its blocks stay its own until the load has ended
            request.closed = True
            self.client.close_sequence(request.sequence)
            self.counts["aborts"] += 1
        request.waiting_ranks = set(range(len(self.agents)))
        self.loading[job] = request
        for agent in self.agents:
            agent.arm_loads([job], 0)

    def load_in_parts(self, request: Request) -> None:
        """As a forward does it that follows the load layer by layer."""
        job, wrong = request.job, ""
        for agent in self.agents:
            agent.arm_loads_in_parts([job], 0)
        for part in sorted(set(self.parts)):
            layers = [layer for layer, needed in enumerate(self.parts) if needed == part]
            for memory, agent in zip(self.memories, self.agents, strict=True):
                agent.hold_engine([job], part, 0)
                for position in range(request.first, request.matched):
                    block, key = request.blocks[position], request.prompt.keys[position]
                    if not wrong and not all(memory.layer_is(layer, block, key) for layer in layers):
                        wrong = f"part {part}, block {position}"
        for agent in self.agents:
            request.good = min([request.good, *(good for _, good in agent.wait_loads([job]))])
        self.ended("load in parts", request.began, request.began_lag, self.load_limit_s)
        self.counts["loads in parts"] += 1
        if wrong and request.good == request.matched - request.first:
            self.report("wrong bytes", what=f"a part was not there when the engine went on: {wrong}")

    def rank_loaded(self, request: Request, rank: int, good: int) -> None:
        if rank not in request.waiting_ranks:
            self.report("reported twice", job=request.job, rank=rank)
        request.waiting_ranks.discard(rank)
        request.good = min(request.good, good)
        if not request.waiting_ranks:
            del self.loading[request.job]
            self.ended("load", request.began, request.began_lag, self.load_limit_s)

    def loaded(self, request: Request) -> None:
        complete = request.good == request.matched - request.first
        if request.good == 0:
            request.first = 0
        request.matched = request.first + request.good
        self.check(request, request.first, request.matched, "a load")
        self.counts["loads right" if complete else "loads in part" if request.good else "loads failed"] += 1
        self.counts["blocks checked"] += request.good * len(self.agents)
        self.compute(request)

    def compute(self, request: Request) -> None:
        if request.closed or request.outdated:
            return self.finish(request)
        count = len(request.blocks)
        for memory in self.memories:
            for position in (*range(request.first), *range(request.matched, count)):
                memory.fill(request.blocks[position], request.prompt.keys[position])
        self.save(request, request.matched, count)

    def save(self, request: Request, first: int, end: int) -> None:
        """In pieces, as the chunks of a long prefill come."""
        request.state = "saving"
        request.cancel_at = float("inf")
        cuts = sorted({first, end, *(self.draw.randint(first, end) for _ in range(self.draw.randrange(3)))})
        for begin, stop in zip(cuts, cuts[1:], strict=False):
            with self.timed("save"):
                job = self.client.save(
                    request.sequence, request.prompt.hashes[:stop], begin, request.blocks[begin:stop]
                )
            if job == 0:
                self.counts["saves refused"] += 1
                break
            self.counts["saves"] += 1
            request.saves.add(job)
            self.saving[job] = (request, time.monotonic(), self.lag)
            for agent in self.agents:
                if self.draw.random() > 0.002:  # else as if a worker had dropped it: it ends by its deadline
                    agent.arm_saves([job], 0)
        if request.prompt.private and request.saves:
            self.private_seen = request.prompt
        if self.draw.random() < 0.05:
            request.cancel_at = time.monotonic() + self.draw.uniform(0, 0.01)

    def cancel_load(self, request: Request) -> None:
        self.counts["loads canceled"] += 1
        for agent in self.agents:
            if self.draw.random() < 0.7:  # on one rank only, too
                agent.cancel([request.job])

    def cancel_save(self, job: int) -> None:
        self.counts["saves canceled"] += 1
        with self.timed("cancel"):
            self.client.cancel(job)

    def forget(self, request: Request, first: int, end: int) -> None:
        for memory in self.memories:
            for block in request.blocks[first:end]:
                memory.forget(block)

    def check(self, request: Request, first: int, end: int, what: str) -> None:
        for rank, memory in enumerate(self.memories):
            for position in range(first, end):
                if wrong := memory.differs(request.blocks[position], request.prompt.keys[position]):
                    self.report(
                        "wrong bytes",
                        what=what,
                        rank=rank,
                        block=position,
                        of=[first, end],
                        private=request.prompt.private,
                        outdated=request.outdated,
                        how=wrong,
                    )

    def finish(self, request: Request) -> None:
        if not request.closed:
            with self.timed("close_sequence"):
                self.client.close_sequence(request.sequence)
        self.free.extend(request.blocks)
        self.requests.remove(request)


if __name__ == "__main__":
    Engine(json.loads(sys.argv[1])).run()
