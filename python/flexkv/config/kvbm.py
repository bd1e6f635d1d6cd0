"""What the variables of NVIDIA's KVBM (`DYN_KVBM_*`, read from kvbm 1.6.1) stand for here, for users of Dynamo who switch."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PREFIX = "DYN_KVBM_"


@dataclass(frozen=True)
class Counterpart:
    """Of one variable. `key`: our setting, which `read` writes the value for; empty: there is none, and `doc` says why."""

    env: str
    key: str
    doc: str
    read: Callable[[str], str] = str
    told: bool = False  # without a counterpart, something that was asked for will not happen: a warning says so


def _decimal_gigabytes(value: str) -> str:
    """KVBM counts 10^9 bytes, we 2^30: never more than was asked for."""
    try:
        return f"{int(float(value) * 1e9)}B"
    except (ValueError, OverflowError):
        return value  # for the setting to refuse


def _opposite(value: str) -> str:
    words = {"1": "off", "true": "off", "yes": "off", "on": "off", "0": "on", "false": "on", "no": "on", "off": "on"}
    return words.get(value.strip().lower(), value)


def _directory_of_its_own(value: str) -> str:
    """KVBM's may be one that all share, such as /tmp; ours is private."""
    return os.path.join(value, "flexkv")


def _without(rows: str, *, told: bool = False) -> tuple[Counterpart, ...]:
    """One variable a line, without the prefix: `NAME: reason`."""
    pairs = [row.strip().partition(": ") for row in rows.strip().splitlines()]
    return tuple(Counterpart(PREFIX + name, "", reason, told=told) for name, _, reason in pairs)


TABLE = (
    Counterpart("DYN_KVBM_CPU_CACHE_GB", "cpu_cache_gb", "in units of 10^9 bytes, as KVBM counts", _decimal_gigabytes),
    Counterpart("DYN_KVBM_DISK_CACHE_GB", "ssd_cache_gb", "in units of 10^9 bytes, as KVBM counts", _decimal_gigabytes),
    Counterpart("DYN_KVBM_DISK_CACHE_DIR", "ssd_cache_dir", "a directory `flexkv` in it", _directory_of_its_own),
    Counterpart("DYN_KVBM_DISK_DISABLE_O_DIRECT", "ssd_direct_io", "the opposite", _opposite),
    Counterpart("DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER", "ssd_admission", "the opposite", _opposite),
    Counterpart("DYN_KVBM_METRICS", "enable_metrics", "as it is"),
    Counterpart("DYN_KVBM_METRICS_PORT", "metrics_port", "as it is; our default is another one"),
    *_without(
        """
        CPU_CACHE_OVERRIDE_NUM_BLOCKS: sizes are given in bytes: cpu_cache_gb
        DISK_CACHE_OVERRIDE_NUM_BLOCKS: sizes are given in bytes: ssd_cache_gb
        HOST_OFFLOAD_PREFIX_MIN_PRIORITY: blocks have no priorities: all are kept
        """,
        told=True,
    ),
    *_without(
        """
        DISK_ZEROFILL_FALLBACK: where the file system cannot reserve space it is done without
        DISK_ALLOCATOR_TYPE: one kind of file; see ssd_direct_io
        LEADER_WORKER_INIT_TIMEOUT_SECS: the engine waits for nothing at its start; until memory is there, lookups are misses
        LEADER_ZMQ_HOST: ranks and node meet in runtime_dir
        LEADER_ZMQ_PUB_PORT: as DYN_KVBM_LEADER_ZMQ_HOST
        LEADER_ZMQ_ACK_PORT: as DYN_KVBM_LEADER_ZMQ_HOST
        CACHE_STATS_LOG_INTERVAL_SECS: counters are always kept, see `flexkv status`
        CACHE_STATS_MAX_REQUESTS: as DYN_KVBM_CACHE_STATS_LOG_INTERVAL_SECS
        MAX_CONCURRENT_TRANSFERS: the copy queues are bounded already
        MAX_TRANSFER_BATCH_SIZE: as DYN_KVBM_MAX_CONCURRENT_TRANSFERS
        TRANSFER_BATCH_SIZE: as DYN_KVBM_MAX_CONCURRENT_TRANSFERS
        DISABLE_WRITE_COMBINED: the pool is ordinary pinned memory
        NCCL_MLA_MODE: what ranks hold alike is stored once, and each loads it (docs/decisions/0014)
        NCCL_MAX_CTAS: as DYN_KVBM_NCCL_MLA_MODE
        ENABLE_NUMA: the kernel places the pool
        ENABLE_RECORD: nothing is recorded
        KV_EVENTS_ENABLE_CONSOLIDATOR: events leave through the engine's own publisher, each with its tier
        KV_EVENTS_CONSOLIDATOR_MODE: as DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR
        TRTLLM_ZMQ_PORT: as DYN_KVBM_KV_EVENTS_ENABLE_CONSOLIDATOR
        """
    ),
)
BY_ENV: Mapping[str, Counterpart] = {one.env: one for one in TABLE}
