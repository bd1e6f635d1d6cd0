"""Which saves a step has to wait for, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

from flexkv.integration.vllm.scheduler import SchedulerSide


def test_a_block_read_by_two_saves_is_fenced_until_both_have_ended() -> None:
    ended: list[int] = []
    side = SchedulerSide.__new__(SchedulerSide)
    side._saves_by_block = {7: {1, 2}, 8: {2}}
    side._blocks_by_save = {1: [7], 2: [7, 8]}
    side.client = SimpleNamespace(take_ended_jobs=lambda: [ended.pop()] if ended else [])

    def fences() -> set[int]:
        found: set[int] = set()
        side._fence([7, 9], found)
        return found

    assert fences() == {1, 2}
    ended.append(2)
    side._forget_ended_saves()
    assert fences() == {1}
    ended.append(1)
    side._forget_ended_saves()
    assert fences() == set()
    assert side._saves_by_block == {} and side._blocks_by_save == {}
