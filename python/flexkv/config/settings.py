"""The active settings, one field each: this table feeds the environment, files, `flexkv config show` and the docs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flexkv.config import sizes
from flexkv.config.cluster import ClusterSettings, cluster_options, cluster_problems, in_cluster
from flexkv.config.hosts import HostsSettings, hosts_options, hosts_problems
from flexkv.config.remote import RemoteSettings, remote_options, remote_problems
from flexkv.config.setting import (
    IgnoredEntry,
    Setting,
    Status,
    choice,
    directories,
    integer,
    number,
    number_or_zero,
    setting,
    size,
    size_choice,
    switch,
    text,
)
from flexkv.config.ssd import default_ssd_dirs, ssd_options, ssd_problems

POLICIES = ("adaptive", "lru", "lfu", "slru", "fifo", "mru", "filo", "s3fifo")
_MODES = ("embedded", "external")
_LOG_LEVELS = ("debug", "info", "warning", "error")
_LOG_SYNONYMS = {"warn": "warning", "critical": "error", "fatal": "error", "trace": "debug"}
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"
_PATH = text("a path", r".{1,4096}")
_ENDPOINT = text("tcp://ADDRESS:PORT, `*` for all addresses, or ipc:///PATH", r"(tcp://[^/ ]+:\d{1,5}|ipc:///.{1,100})?")
_DEFAULT_PORT = "ipc:///tmp/flexkv_server"
_HOUR_MS = 3_600_000


def default_runtime_dir() -> str:
    """Where nodes listen unless told otherwise. The core creates it (0700) and refuses one that is not ours."""
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    if session and os.path.isdir(session):
        return os.path.join(session, "flexkv")
    return "/run/flexkv" if os.geteuid() == 0 else f"/tmp/flexkv-{os.geteuid()}"


def _auto() -> sizes.AutoSize:
    return sizes.auto_cache_size(sizes.read_host_memory())


@dataclass(frozen=True)
class NodeTarget:
    """Which node an engine uses: its own ("embedded"), one that the first process of the machine hosts and the others
    join ("shared"), or a running daemon ("daemon"). `socket` is where it listens."""

    mode: str
    name: str
    runtime_dir: str

    @property
    def socket(self) -> str:
        return os.path.join(self.runtime_dir, f"{self.name}.sock")


@dataclass(frozen=True, kw_only=True)
class Settings(ClusterSettings, RemoteSettings, HostsSettings):
    """The effective configuration of this process. Immutable; made by `load`. Sizes in bytes, times as named."""

    # ---- general
    enable_flexkv: bool = setting(
        switch(),
        True,
        "Off: the connector does nothing and every lookup is a miss.",
        topic="General",
        env=("ENABLE_FLEXKV", "FLEXKV_ENABLE_FLEXKV"),
    )
    config_path: str = setting(
        _PATH,
        "",
        "File with settings, YAML (.yml, .yaml) or JSON (.json). What it says wins over the environment.",
        topic="General",
        default_text="none",
        in_file=False,
    )
    namespace: str = setting(
        text("printable text, at most 256 characters", r".{0,256}"),
        "",
        "Part of every key: processes with different namespaces never see each other's blocks.",
        topic="General",
        default_text="empty",
    )
    log_level: str = setting(
        choice(*_LOG_LEVELS, synonyms=_LOG_SYNONYMS), "info", "Least severity that is logged.", topic="General"
    )
    logging_prefix: str = setting(
        text("printable text, at most 64 characters", r".{0,64}"),
        "FLEXKV",
        "Begins every log line of the Python part.",
        topic="General",
    )
    cuda_library: str = setting(
        _PATH,
        "",
        "The CUDA device library to load instead of the one in the package.",
        topic="General",
        default_text="the package's",
    )

    # ---- host memory
    cpu_cache_bytes: int = setting(
        size(sizes.GIB, sizes.MIB, sizes.PIB, auto=_auto),
        16 * sizes.GIB,
        "Host memory of one node's cache; not given, and 16 GiB do not fit: what fits. `auto`: 0.8 x (available memory, "
        "bounded by the control group's limit, less a reserve of 10 GiB or of half where there is little), in whole GiB, at "
        "least 1 GiB.",
        topic="Host memory",
        key="cpu_cache_gb",
    )
    use_hugepage_cpu_buffer: bool = setting(
        switch(),
        False,
        "Take the pool from huge pages; falls back to ordinary ones, and says so, if there are too few.",
        topic="Host memory",
    )
    hugepage_size_bytes: int = setting(
        size_choice(2 * sizes.MIB, sizes.GIB), 2 * sizes.MIB, "Size of a huge page.", topic="Host memory"
    )

    # ---- SSD tier
    ssd_cache_bytes: int = setting(
        size(sizes.GIB, 0, sizes.PIB),
        0,
        "Space on drives for blocks, over all directories of ssd_cache_dir; never exceeded. 0: no SSD tier. Blocks "
        "there outlive restarts.",
        topic="SSD tier",
        key="ssd_cache_gb",
    )
    ssd_cache_dir: tuple[str, ...] = setting(
        directories(),
        default_ssd_dirs,
        "Directories of the SSD tier, one per drive, for one node at a time. Made (0700) if missing; those above only of "
        "the default.",
        topic="SSD tier",
        default_text="/var/cache/flexkv for root; else $XDG_CACHE_HOME/flexkv (~/.cache/flexkv)",
    )
    ssd_strict: bool = setting(
        switch(),
        False,
        "A block counts as written only when it is on stable storage (fdatasync). Not needed for correctness: what a "
        "power cut tears is found by its checksum. Then fewer blocks are lost by it.",
        topic="SSD tier",
    )
    ssd_admission: bool = setting(
        switch(),
        True,
        "Write only blocks that are likely enough to be used again, as far as that costs at most 3 % of all hits. Off: "
        "write every block.",
        topic="SSD tier",
    )
    ssd_dwpd: float = setting(
        number(0, 1000),
        0.0,
        "Endurance of each drive: so many times its capacity may be written in a day (drive writes per day). Never "
        "crossed in any 24 hours. 0: no such limit.",
        topic="SSD tier",
    )
    ssd_capacity_gb: float = setting(
        number_or_zero(0.001, 1e9),
        0.0,
        "Capacity of each drive in units of 1,000,000,000 bytes, as on its label; for ssd_dwpd. 0: the size of the "
        "file system.",
        topic="SSD tier",
    )
    ssd_tbw: float = setting(
        number(0, 1e9),
        0.0,
        "Endurance of each drive: so many times 10^12 bytes (terabytes) may be written in ssd_years, an equal part of "
        "them on each day. 0: no such limit.",
        topic="SSD tier",
    )
    ssd_years: float = setting(
        number_or_zero(0.1, 1000),
        0.0,
        "Years that each drive is to last: needed for ssd_tbw. With ssd_dwpd the years that it holds for, which tell "
        "the days of life left; then 0 stands for 5.",
        topic="SSD tier",
    )
    ssd_direct_io: bool = setting(
        switch(),
        True,
        "Read and write blocks past the page cache where the file system can. Off: through it; for memory file systems "
        "and some network file systems.",
        topic="SSD tier",
    )
    ssd_load_policy: str = setting(
        choice("auto", "always"),
        "auto",
        "auto: what the engine is expected to compute faster than the drives deliver it is computed. always: what is "
        "kept is loaded.",
        topic="SSD tier",
    )

    enable_gds: bool = setting(
        switch(),
        False,
        "Asks for GPUDirect Storage, which this version has no path for: a line at the node's start says so.",
        topic="SSD tier",
    )

    # ---- eviction
    eviction_policy: str = setting(
        choice(*POLICIES), "adaptive", "Which blocks leave a full tier first.", topic="Eviction"
    )
    hit_reward_seconds: float = setting(
        number(0, 1e9),
        0.0,
        "LRU only: each hit counts as if the block had been used this much later.",
        topic="Eviction",
    )
    slru_protected_threshold: int = setting(
        integer(1, 1_000_000), 2, "SLRU only: hits after which a block is protected.", topic="Eviction"
    )
    evict_ratio: float = setting(
        number(0, 1), 0.0, "Least share of a tier that is freed each time blocks are evicted.", topic="Eviction"
    )
    evict_start_threshold: float = setting(
        number(0.01, 1), 1.0, "Share of a tier in use above which eviction begins.", topic="Eviction"
    )

    # ---- node
    node: str = setting(
        text(
            "`embedded`, a daemon's name (letters, digits, `.`, `_`, `-`, at most 64) or the path of its .sock file",
            rf"{_NAME}|/(.{{0,4000}}/)?{_NAME}\.sock",
        ),
        "",
        "Which node to use: `embedded` (in the engine's process) or a daemon (`flexkv serve`). Not given: what "
        "server_client_mode, server_launch_mode and instance_num ask for, else embedded.",
        topic="Node",
        default_text="see meaning",
    )
    runtime_dir: str = setting(
        text("an absolute path", r"/.{1,4096}"),
        default_runtime_dir,
        "Private directory (0700) of the sockets by which processes of one machine meet.",
        topic="Node",
        default_text="$XDG_RUNTIME_DIR/flexkv; /run/flexkv for root; else /tmp/flexkv-UID",
    )
    server_client_mode: bool = setting(
        switch(),
        False,
        "Several engine processes share one node, which the first of them hosts unless server_launch_mode is external.",
        topic="Node",
    )
    server_launch_mode: str = setting(
        choice(*_MODES),
        "embedded",
        "external: the shared node is a daemon that someone started with `flexkv serve`.",
        topic="Node",
    )
    server_recv_port: str = setting(
        text(
            "ipc:///path whose last part is a name (letters, digits, `.`, `_`, `-`, at most 64)",
            rf"ipc:///(.{{0,4000}}/)?{_NAME}",
        ),
        _DEFAULT_PORT,
        "Names the shared node: the last part of the path becomes its name in runtime_dir (the default: `default`).",
        topic="Node",
    )
    instance_num: int = setting(
        integer(1, 4096), 1, "Engine replicas on this machine; more than one share a node.", topic="Node"
    )
    instance_id: int = setting(
        integer(0, 4095), 0, "Which of the instance_num replicas this process belongs to.", topic="Node"
    )

    # ---- transfers
    load_timeout_ms: int = setting(
        integer(1, _HOUR_MS),
        10_000,
        "Deadline of a load; after it the engine recomputes. Milliseconds.",
        topic="Transfers",
    )
    save_timeout_ms: int = setting(
        integer(1, _HOUR_MS),
        30_000,
        "Deadline of a save; after it the blocks are not kept. Milliseconds.",
        topic="Transfers",
    )
    min_load_tokens: int = setting(
        integer(0, 1 << 30), 0, "A shorter match is not worth loading: the engine recomputes it.", topic="Transfers"
    )
    sync_load_max_bytes: int = setting(
        size(sizes.MIB, 0, sizes.TIB),
        4 * sizes.MIB,
        "A load up to this size runs within the engine's step; a larger one does if there is no other request, and else "
        "beside it while the request waits. 0: always beside it.",
        topic="Transfers",
        key="sync_load_max_mb",
    )
    gpu_stage_below_bytes: int = setting(
        size(sizes.KIB, 0, 16 * sizes.MIB),
        64 * sizes.KIB,
        "Blocks that lie on the GPU in pieces shorter than this, on average, are loaded through a buffer of 16 MiB there, so "
        "that whole blocks cross the link; not while the model keeps the GPU too busy for that. 0: all are copied where they "
        "lie. `flexkv bench transfer` measures what this setting makes of it.",
        topic="Transfers",
        key="gpu_stage_below_kb",
    )

    # ---- metrics
    enable_metrics: bool = setting(switch(), False, "Serve Prometheus metrics.", topic="Metrics")
    metrics_host: str = setting(
        text("an IPv4 address of this machine, or a name for it", r"[A-Za-z0-9._-]{1,200}"),
        "127.0.0.1",
        "Where: the default for this machine only, 0.0.0.0 for all that reach it. They name models and engines, and say "
        "nothing of prompts.",
        topic="Metrics",
    )
    metrics_port: int = setting(
        integer(0, 65535),
        8081,
        "The one port for all metrics; 0 takes a free one and logs it.",
        topic="Metrics",
        env=("FLEXKV_METRICS_PORT", "FLEXKV_CPP_METRICS_PORT", "FLEXKV_PY_METRICS_PORT"),
        aliases=("cpp_metrics_port", "py_metrics_port"),
    )

    # ---- events
    kv_events: bool = setting(
        switch(),
        True,
        "An engine that publishes KV events publishes those of the cache, too: blocks with medium CPU and DISK.",
        topic="Events for routers",
        env=("FLEXKV_KV_EVENTS", "DYNAMO_USE_FLEXKV"),
        aliases=("dynamo_use_flexkv",),
    )
    kv_events_endpoint: str = setting(
        _ENDPOINT,
        "",
        "Where `flexkv serve` publishes KV events itself, in the form of vLLM's publisher. Not given: nowhere.",
        topic="Events for routers",
        default_text="none",
    )
    kv_events_replay_endpoint: str = setting(
        _ENDPOINT,
        "",
        "Where it repeats them to subscribers that come late or have missed some.",
        topic="Events for routers",
        default_text="none",
    )
    kv_events_topic: str = setting(
        text("printable text, at most 256 characters", r".{0,256}"),
        "",
        "Topic of those events; llm-d wants `kv@POD@MODEL`.",
        topic="Events for routers",
        default_text="empty",
    )

    # ---- how these values came about
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    ignored: tuple[IgnoredEntry, ...] = field(default=(), repr=False, compare=False)
    warnings: tuple[str, ...] = field(default=(), repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "origins", MappingProxyType(dict(self.origins)))

    def origin(self, name: str) -> str:
        """Where the value of this key (or attribute) came from: a variable, a file and line, an argument, `default`."""
        return self.origins.get(BY_NAME[name].key, "default")

    def value(self, name: str) -> Any:
        return getattr(self, BY_NAME[name].attribute)

    def show(self, name: str) -> str:
        return BY_NAME[name].show(self.value(name)) or "''"

    def as_dict(self) -> dict[str, Any]:
        """All active settings by key; sizes as bytes."""
        return {one.key: self.value(one.key) for one in ACTIVE}

    @property
    def node_target(self) -> NodeTarget:
        if self.node.startswith("/"):
            path = Path(self.node)
            return NodeTarget("daemon", path.name.removesuffix(".sock"), str(path.parent))
        if self.node and self.node != "embedded":
            return NodeTarget("daemon", self.node, self.runtime_dir)
        shared = self.server_client_mode or self.instance_num > 1 or self.server_launch_mode == "external"
        if self.node == "embedded" or not shared:
            return NodeTarget("embedded", f"embedded-{os.getpid()}", self.runtime_dir)
        name = "default" if self.server_recv_port == _DEFAULT_PORT else self.server_recv_port.rpartition("/")[2]
        return NodeTarget("daemon" if self.server_launch_mode == "external" else "shared", name, self.runtime_dir)

    @property
    def reaches_beyond_memory(self) -> bool:
        """The node may have blocks that are not in its host memory, or that others than this process have stored: of a
        daemon, on drives, in a cluster, in a store that many share."""
        elsewhere = self.ssd_cache_bytes > 0 or in_cluster(self) or bool(self.remote_url)
        return self.node_target.mode != "embedded" or elsewhere

    def node_options(self) -> dict[str, bool | int | float | str | list[str]]:
        """What the core's Node takes, as plain values."""
        target = self.node_target
        return {
            "pool_bytes": int(self.cpu_cache_bytes),
            "huge_pages": self.use_hugepage_cpu_buffer,
            "huge_page_bytes": self.hugepage_size_bytes,
            **ssd_options(self),
            **cluster_options(self),
            **remote_options(self),
            **hosts_options(self),
            "policy": self.eviction_policy,
            "hit_reward_seconds": self.hit_reward_seconds,
            "slru_protected_hits": self.slru_protected_threshold,
            "evict_ratio": self.evict_ratio,
            "evict_start_threshold": self.evict_start_threshold,
            "load_timeout_ms": self.load_timeout_ms,
            "save_timeout_ms": self.save_timeout_ms,
            "runtime_dir": target.runtime_dir,
            "node_name": target.name,
            "metrics_enabled": self.enable_metrics,
            "metrics_port": self.metrics_port,
            "log_level": self.log_level,
        }

    def problems(self) -> list[str]:
        """What is wrong with values that are fine each on its own."""
        found = []
        if self.instance_id >= self.instance_num:
            found.append(
                f"instance_id: wrong value {self.instance_id} from {self.origin('instance_id')}; "
                f"allowed: less than instance_num, which is {self.instance_num} ({self.origin('instance_num')})"
            )
        if self.kv_events_replay_endpoint and not self.kv_events_endpoint:
            found.append("kv_events_replay_endpoint: there is nothing to repeat; give kv_events_endpoint, too")
        return found + ssd_problems(self) + cluster_problems(self) + remote_problems(self) + hosts_problems(self)


def env_name(key: str) -> str:
    return f"FLEXKV_{key.upper()}"


def _active() -> tuple[Setting, ...]:
    table = []
    inherited = {one.name for part in (ClusterSettings, RemoteSettings, HostsSettings) for one in fields(part)}
    for one in sorted(fields(Settings), key=lambda one: one.name in inherited):
        if "spec" in one.metadata:
            spec = dict(one.metadata["spec"])
            spec["key"] = spec["key"] or one.name
            spec["env"] = spec["env"] or (env_name(spec["key"]),)
            table.append(Setting(**spec, status=Status.ACTIVE, attribute=one.name))
    return tuple(table)


ACTIVE = _active()
BY_NAME: Mapping[str, Setting] = {name: one for one in ACTIVE for name in (one.attribute, one.key, *one.aliases)}
