"""All settings: the active ones, and the names of the original that have no effect here or not yet."""

from __future__ import annotations

from collections.abc import Mapping

from flexkv.config.setting import Setting, Status, anything
from flexkv.config.settings import ACTIVE, env_name


def _inactive(status: Status, topic: str, rows: str) -> tuple[Setting, ...]:
    """One setting a line: `key[, another key][ @ VARIABLE]: meaning or reason`."""
    table = []
    for row in rows.strip().splitlines():
        names, _, doc = row.strip().partition(": ")
        keys_text, _, variable = names.partition(" @ ")
        key, *aliases = keys_text.split(", ")
        env = (variable,) if variable else tuple(env_name(name) for name in (key, *aliases))
        secret = "password" in key
        table.append(Setting(key, env, tuple(aliases), anything(), "", doc, topic, status, secret=secret))
    return tuple(table)


_PLANNED = (
    *_inactive(
        Status.PLANNED,
        "SSD tier",
        """
        enable_nixl: the NIXL library for those reads
        nixl_backend_plugin: the NIXL plugin to use
        """,
    ),
    *_inactive(
        Status.PLANNED,
        "GPU transfers",
        """
        enable_layerwise_transfer: loading layer by layer while the model runs
        layerwise_notify_mode: how a loaded layer is announced
        layerwise_eventfd_socket: where SGLang's workers fetch the layer events
        layerwise_eventfd_connect_max_retries: tries to reach that socket
        layerwise_wait_timeout_s: longest wait for a layer
        use_ce_transfer_h2d: copy engines instead of a kernel, to the GPU
        use_ce_transfer_d2h: copy engines instead of a kernel, from the GPU
        transfer_num_cta_h2d: thread blocks of the copy kernel, to the GPU
        transfer_num_cta_d2h: thread blocks of the copy kernel, from the GPU
        enable_nvcomp: compression on the GPU
        nvcomp_batch_size: chunks per compression batch
        nvcomp_ssd_packed_write_threads: writers of compressed SSD blocks
        nvcomp_ssd_packed_read_threads: readers of compressed SSD blocks
        """,
    ),
    *_inactive(
        Status.PLANNED,
        "Models with several kinds of cache",
        """
        swa_multi_group: state rows that travel with sliding-window pages
        enable_swa_transfer: separate pages for sliding-window layers
        """,
    ),
    *_inactive(
        Status.PLANNED,
        "Remote tiers and cluster",
        """
        mooncake_config_path @ MOONCAKE_CONFIG_PATH: configuration file of Mooncake's transfer engine
        mc_redis_password @ MC_REDIS_PASSWORD: password for Mooncake's metadata in Redis
        """,
    ),
    *_inactive(
        Status.PLANNED,
        "Engines and tracing",
        """
        maybe_skip_put: saves are skipped on demand
        enable_trace: recording of requests for replay
        trace_file_path: file of that recording
        trace_max_file_size_mb: its largest size
        trace_max_files: number of files kept
        trace_flush_interval_ms: interval of writing it out
        """,
    ),
)

_NOT_NEEDED = (
    *_inactive(
        Status.NOT_NEEDED,
        "Index and layout",
        """
        index_accel: there is one index, in C++
        cpu_layout: host blocks have one form, all layers of a block in one piece
        ssd_layout: as cpu_layout
        remote_layout: as cpu_layout
        gds_layout: as cpu_layout
        kv_cache_dtype: read from the engine's tensors
        swa_multi_layer: dropped by the original too
        kv_shared_across_ranks_mode, mla_d2h_mode: blocks that all ranks share are stored once
        mooncake_store_pp_rank: derived from the engine's ranks
        mooncake_store_pp_size: derived from the engine's ranks
        mooncake_store_node_layer_start: derived from the engine's ranks
        mooncake_store_node_layer_end: derived from the engine's ranks
        mooncake_store_total_layers: derived from the engine's ranks
        """,
    ),
    *_inactive(
        Status.NOT_NEEDED,
        "SSD tier",
        """
        ssd_io_opt: each block is one read or write already
        iouring_entries: the depth of the queues is bounded by bytes and requests in flight
        iouring_flags: io_uring is used where the system allows it, else threads
        max_file_size_gb: a model has one file of blocks per directory; ssd_cache_gb bounds all of them
        """,
    ),
    *_inactive(
        Status.NOT_NEEDED,
        "Memory and copies",
        """
        use_hugepage_tmp_buffer: there is no second buffer beside the pool
        hugetlbfs_dir: huge pages come from a memfd, no mount is needed
        cudahost_chunk_size_gb: the pool is pinned in pieces in the background
        vmm_fd_sock_dir: GPU memory is never exported, each rank copies its own
        ce_path_opt: copies are planned from the layout
        ce_segment_threshold: copies are planned from the layout
        enable_ce_memcpy2d: copies are planned from the layout
        ce_gather_threads: copies are planned from the layout
        ce_gather_nt: copies are planned from the layout
        sync_get: loads are ordered on the GPU's streams, the scheduler never waits; see sync_load_max_mb
        """,
    ),
    *_inactive(
        Status.NOT_NEEDED,
        "Processes",
        """
        enable_mps: there are no worker processes, so MPS is neither needed nor started
        enable_collective_sync: ranks agree through the node
        idle_sleep_ms: nothing polls
        reset_barrier_poll_ms: nothing polls
        lt_pool_initial_capacity: lease records are not preallocated
        worker_shutdown_timeout_s: there are no worker processes
        transfer_manager_shutdown_timeout_s: there is no transfer manager process
        tensorrt_llm_use_flexkv @ TENSORRT_LLM_USE_FLEXKV: TensorRT-LLM's kv_connector_config is the switch
        trt_subprocess_host: ranks copy their own blocks, there is no subprocess
        trt_subprocess_ports: as trt_subprocess_host
        sglang_scheduler_shutdown_wait_s @ SGLANG_SCHEDULER_SHUTDOWN_WAIT_S: nothing has to be waited for
        """,
    ),
    *_inactive(
        Status.NOT_NEEDED,
        "Cluster",
        """
        master_host: the scheduler finds the nodes of an engine's other machines, see engine_hosts
        master_ports: as master_host
        enable_3rd_remote: a shared file system is used where remote_url names it
        use_mooncake_store_backend: Mooncake Store is used where remote_url names its master
        mooncake_store_config_path: as use_mooncake_store_backend
        local_zmq_ip: requests between nodes take the connection that their blocks take, see local_ip
        local_zmq_port: as local_zmq_ip, see peer_port
        lease_ttl_ms: a block is lent for as long as its reader waits
        renew_lease_ms: as lease_ttl_ms
        safety_ttl_ms: clocks of two machines are never compared
        refresh_batch_size: only what changes is told, in batches
        rebuild_interval_ms: nothing is rebuilt
        reset_barrier_timeout_ms: nobody waits for all nodes at a reset
        """,
    ),
    *_inactive(
        Status.NOT_NEEDED,
        "Metrics and logs",
        """
        prometheus_multiproc_dir @ PROMETHEUS_MULTIPROC_DIR: one process serves all metrics
        transfer_trace: latency histograms are always kept, see `flexkv status`
        num_log_interval_requests: counters are always kept, see `flexkv status`
        eviction_log_interval_s: counters are always kept, see `flexkv status`
        """,
    ),
    *_inactive(
        Status.NOT_NEEDED,
        "Building and testing the original",
        """
        mooncake_fault_mode: faults are injected in the simulated tiers of the tests
        mooncake_fault_prob: as mooncake_fault_mode
        mooncake_fault_op: as mooncake_fault_mode
        mooncake_fault_seed: as mooncake_fault_mode
        mooncake_fault_tail_n: as mooncake_fault_mode
        mooncake_fault_random_ratio: as mooncake_fault_mode
        enable_p2p: a switch of the original's build
        enable_cfs: a switch of the original's build
        enable_cputest: a switch of the original's build
        debug: a switch of the original's build
        git_commit: a switch of the original's build
        """,
    ),
)

TABLE: tuple[Setting, ...] = (*ACTIVE, *_PLANNED, *_NOT_NEEDED)
BY_KEY: Mapping[str, Setting] = {key: one for one in TABLE for key in (one.key, *one.aliases)}
BY_ENV: Mapping[str, Setting] = {name: one for one in TABLE for name in one.env}
