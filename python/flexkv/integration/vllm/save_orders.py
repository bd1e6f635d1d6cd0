"""Orders the saves of each step. Blocks are saved in the step that completes them. A request's device blocks may be reused
as soon as vLLM frees them, so saves still running are remembered by block (`RunningSaves`), and before a step goes out
that is going to overwrite such a block, the node is told to keep nothing of them (docs/decisions/0010).
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from flexkv.integration.common.saves import Job, Offers, RunningSaves, Save
from flexkv.integration.vllm import compat, events
from flexkv.integration.vllm.groups import NULL_BLOCK, Group
from flexkv.integration.vllm.metadata import FlexKVMetadata
from flexkv.integration.vllm.tracked import Chain, Tracked

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput

logger = logging.getLogger("flexkv.vllm")

# Ranks whose node is gone end their copies by themselves, and nobody tells when: in milliseconds.
_QUIET_SECONDS = 1.0


class SaveOrders:
    def __init__(
        self,
        groups: list[Group],
        clients: list[Any],
        requests: dict[str, Tracked],
        timeout_seconds: float,
        *,
        describes: bool,
    ) -> None:
        """`requests`: the scheduler side's own, by id; looked at only. `describes`: what is saved is told to routers."""
        self._describes = describes
        self._groups = groups
        self._clients = clients
        self._requests = requests
        self._timeout_seconds = timeout_seconds
        self._filled: list[list[int]] = []  # device blocks of requests that were admitted since the last step
        self._running = RunningSaves()
        self._quiet_at = 0.0  # from when on saves of nodes that are gone read nothing
        # Device blocks that failed loads left, and what was computed from them: see taint(). Until they are overwritten.
        self._tainted: set[int] = set()
        self._generations = [0] * len(groups)  # of the clients' connections, at the last step
        self._step = 0

    def filled(self, block_ids: list[int]) -> None:
        """From the next step on these are going to be overwritten."""
        self._filled.append(block_ids)

    def order(self, output: SchedulerOutput, meta: FlexKVMetadata) -> None:
        """Adds to `meta` the saves of the blocks that the step completes, and calls off those that it overwrites."""
        self._step = meta.step
        overwritten: set[Job] = set()
        self._settle()
        self._running.add_readers(compat.overwritten_besides(output), overwritten)
        filled, self._filled = self._filled, []
        for block_ids in filled:
            self._running.add_readers(block_ids, overwritten)
            self._tainted.difference_update(block_ids)
        for new in output.scheduled_new_reqs:
            self._set_tables(new.req_id, new.block_ids, new.num_computed_tokens, overwritten)
        cached = output.scheduled_cached_reqs
        for request_id, computed, tables in zip(
            cached.req_ids, cached.num_computed_tokens, cached.new_block_ids, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                self._set_tables(request_id, tables, computed, overwritten)
            elif tables:
                self._extend_tables(request_id, tables, overwritten)
        # Before the first new save: these read what the step writes.
        for job in overwritten:
            if (save := self._call_off(job)) is not None:
                save.offers.refused(save.first, self._step, from_start=True)
        for new in output.scheduled_new_reqs:
            self._save_completed(new.req_id, new.num_computed_tokens, output, meta)
        for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            self._save_completed(request_id, computed, output, meta)
        for request_id, number, block, tokens in compat.complete_states(output):
            if request_id not in output.num_scheduled_tokens:
                continue  # its blocks may have been given away in this very step
            self._save_state(self._groups[number], request_id, block, tokens, meta)

    def _set_tables(self, request_id: str, tables: tuple[list[int], ...], computed: int, saves: set[Job]) -> None:
        tracked = self._requests.get(request_id)
        for number, group in enumerate(self._groups):
            block_ids = tables[group.index]
            self._overwrite(tracked, block_ids[computed // group.block_tokens :], saves)
            if tracked is not None:
                tracked.chains[number].block_ids = list(block_ids)

    def _extend_tables(self, request_id: str, tables: tuple[list[int], ...], saves: set[Job]) -> None:
        tracked = self._requests.get(request_id)
        for number, group in enumerate(self._groups):
            self._overwrite(tracked, tables[group.index], saves)
            if tracked is not None:
                tracked.chains[number].block_ids.extend(tables[group.index])

    def _overwrite(self, tracked: Tracked | None, block_ids: list[int], saves: set[Job]) -> None:
        self._running.add_readers(block_ids, saves)
        if tracked is not None and tracked.tainted:
            self._tainted.update(block_ids)
        elif self._tainted:
            self._tainted.difference_update(block_ids)

    def _save_completed(self, request_id: str, computed: int, output: SchedulerOutput, meta: FlexKVMetadata) -> None:
        tracked = self._requests.get(request_id)
        if tracked is None or not tracked.save or tracked.outdated:
            return
        after_step = computed + output.num_scheduled_tokens.get(request_id, 0)
        for group, client, chain in zip(self._groups, self._clients, tracked.chains, strict=True):
            if group.tail_blocks:
                self._save_tails(group, chain, tracked, computed, after_step, meta)
            elif not group.holds_states:
                self._save(group, client, chain, tracked, computed, after_step, meta)

    def _save(
        self,
        group: Group,
        client: Any,
        chain: Chain,
        tracked: Tracked,
        computed: int,
        after_step: int,
        meta: FlexKVMetadata,
    ) -> None:
        """Offers the blocks that are complete after this step and were not offered before."""
        block_hashes = tracked.block_hashes()
        # Only tokens that are certain have hashes: drafts that may yet be rejected, and tokens still being sampled by
        # a step in flight, are saved later.
        hashed = len(block_hashes) // group.hashes_per_block
        full = min(after_step // group.block_tokens, hashed, len(chain.block_ids))
        offers = chain.offers
        if full <= offers.offered or not offers.due(self._step):
            return
        first = max(offers.offered, group.first_live(computed))
        runs = group.runs(chain.block_ids[first:full], first)
        # What lies behind a gap can only be saved if the node has what belongs into it.
        if not runs or runs[-1][0] + len(runs[-1][1]) != full:
            return
        first, blocks = runs[-1]
        if self._tainted and not self._tainted.isdisjoint(blocks):
            offers.refused(first, self._step)
            return
        if self._describes:
            events.describe(client, group, chain, tracked.request, first, full)
        job = client.save(chain.sequence, group.hashes(block_hashes), first, blocks)
        if job == 0:  # no node, or its ranks are not there yet
            offers.refused(first, self._step)
            return
        offers.offered = full
        meta.saves.append((group.index, job))
        self._running.add((group.index, job), Save(offers, first, blocks))

    def _save_tails(
        self, group: Group, chain: Chain, tracked: Tracked, computed: int, after_step: int, meta: FlexKVMetadata
    ) -> None:
        """What prefixes need that end where this step, or the one before, has passed. Offered once: it is gone soon."""
        block_hashes = tracked.block_hashes()
        step = group.boundary_blocks
        hashed = len(block_hashes) // group.hashes_per_block
        ready = min(after_step // group.block_tokens, hashed, len(chain.block_ids)) // step * step
        live = group.first_live(computed) + group.tail_blocks
        for end in range(max(chain.offers.offered + step, -(-live // step) * step), ready + 1, step):
            blocks = chain.block_ids[end - group.tail_blocks : end]
            if NULL_BLOCK not in blocks and self._tainted.isdisjoint(blocks):
                self._save_apart(group, group.tail_hashes(block_hashes, end), blocks[::-1], meta)
        chain.offers.offered = max(chain.offers.offered, ready)

    def _save_state(self, group: Group, request_id: str, block: int, tokens: int, meta: FlexKVMetadata) -> None:
        """`block` holds the state after so many tokens once the step has ended. Offered once: a moment later it is gone."""
        tracked = self._requests.get(request_id)
        if tracked is None or not tracked.save or tracked.outdated or block == NULL_BLOCK or block in self._tainted:
            return
        number, inside = divmod(tokens, group.block_tokens)
        hashes = group.hashes(tracked.block_hashes())
        if inside or number > len(hashes):
            return
        self._save_apart(group, [hashes[number - 1]], [block], meta)

    def _save_apart(self, group: Group, hashes: list[bytes], blocks: list[int], meta: FlexKVMetadata) -> None:
        """As a chain of its own: what precedes it is not needed with it."""
        client = self._clients[group.index]
        sequence = client.open_sequence()
        job = client.save(sequence, hashes, 0, blocks)
        client.close_sequence(sequence)
        if job != 0:
            meta.saves.append((group.index, job))
            self._running.add((group.index, job), Save(Offers(), 0, blocks))

    def _settle(self) -> None:
        """Forgets the saves that have ended; what was not kept is offered again later."""
        for number, (group, client) in enumerate(zip(self._groups, self._clients, strict=True)):
            for job, problem in client.take_ended_jobs():
                if (save := self._running.end((group.index, job))) is None:
                    continue
                if problem:
                    save.offers.refused(save.first, self._step, from_start=problem != "pool_full")
                else:
                    save.offers.kept()
            generation = client.generation()
            if generation != self._generations[number]:
                # Nobody will tell how earlier saves ended, and what was kept may be gone.
                self._generations[number] = generation
                if self._running.reading() is not None:
                    self._quiet_at = time.monotonic() + _QUIET_SECONDS
                self.call_off_all()
                self._running.node_lost(group.index)
                self.offer_again()

    def _call_off(self, job: Job) -> Save | None:
        self._clients[job[0]].cancel(job[1])
        return self._running.call_off(job)

    def call_off_all(self) -> None:
        for group, job in self._running.call_off_all():
            self._clients[group].cancel(job)

    def end_all(self) -> bool:
        """Calls all saves off and waits until they are quiet; False if they are not in time."""
        self.call_off_all()
        deadline = time.monotonic() + self._timeout_seconds
        while (job := self._running.reading()) is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                logger.error("FlexKV: a save still reads the engine's memory; the engine must not give that away now")
                return False
            self._clients[job[0]].wait_ended_jobs(left)
            self._settle()
        time.sleep(max(self._quiet_at - time.monotonic(), 0))
        return True

    def offer_again(self) -> None:
        for tracked in self._requests.values():
            for chain in tracked.chains:
                chain.offers.offered = 0

    def taint(self, invalid: set[int]) -> None:
        """Of the requests that share a block, vLLM lets the first one compute it again, and has the others rely on that,
        even when the first one is aborted before. What such a request computes may be wrong, and stays in the engine's
        own cache; we keep none of it. A parked request shares no block that is not there yet."""
        for tracked in self._requests.values():
            if tracked.parked:
                continue
            for chain in tracked.chains:
                first = next((i for i, block in enumerate(chain.block_ids) if block in invalid), None)
                if first is not None:
                    tracked.tainted = True
                    self._tainted.update(chain.block_ids[first:])
        readers: set[Job] = set()
        self._running.add_readers(list(self._tainted), readers)
        for job in readers:
            self._call_off(job)
