import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
from flexkv.config import TABLE, ConfigError, Settings, Status, kvbm, load, untold
from flexkv.config.settings import ACTIVE
from flexkv.config.sizes import GIB, MIB
from flexkv.config.table import BY_ENV, BY_KEY


def write(tmp_path: Path, content: str, name: str = "flexkv.yml") -> Path:
    path = tmp_path / name
    path.write_text(content)
    return path


def problem(**arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**{"environ": {}, **arguments})  # type: ignore[arg-type]
    return str(caught.value)


# ---- precedence and origins


def test_defaults() -> None:
    settings = load(environ={})
    assert settings == Settings()
    assert settings.enable_flexkv
    assert settings.cpu_cache_bytes == 16 * GIB
    assert (settings.evict_ratio, settings.evict_start_threshold) == (0.0, 1.0)
    assert settings.origin("cpu_cache_gb") == settings.origin("cpu_cache_bytes") == "default"
    assert settings.warnings == ()


def test_extra_wins_over_file_over_environment(tmp_path: Path) -> None:
    file = write(tmp_path, "# comment\ncpu_cache_gb: 32\nevict_ratio: 0.1\n")
    environ = {
        "FLEXKV_CONFIG_PATH": str(file),
        "FLEXKV_CPU_CACHE_GB": "8",
        "FLEXKV_EVICT_RATIO": "0.2",
        "FLEXKV_EVICTION_POLICY": "S3FIFO",
    }
    settings = load(environ=environ, extra={"cpu_cache_gb": "64GB"})
    assert settings.cpu_cache_bytes == 64 * GIB
    assert settings.evict_ratio == 0.1
    assert settings.eviction_policy == "s3fifo"
    assert settings.origin("cpu_cache_gb") == "kv_connector_extra_config"
    assert settings.origin("evict_ratio") == f"{file}:3"
    assert settings.origin("eviction_policy") == "env FLEXKV_EVICTION_POLICY"
    assert settings.origin("node") == "default"
    assert settings.origin("config_path") == "env FLEXKV_CONFIG_PATH"


def test_json_file_with_lines(tmp_path: Path) -> None:
    file = write(tmp_path, '{\n "cpu_cache_gb": 32,\n "use_hugepage_cpu_buffer": true\n}', "flexkv.json")
    settings = load(environ={}, file=file)
    assert settings.use_hugepage_cpu_buffer
    assert settings.origin("use_hugepage_cpu_buffer") == f"{file}:3"
    assert settings.config_path == str(file)


def test_config_path_of_the_engine(tmp_path: Path) -> None:
    file = write(tmp_path, "instance_num: 3\n")
    assert load(environ={}, extra={"config_path": str(file)}).instance_num == 3


def test_the_argument_replaces_the_variable(tmp_path: Path) -> None:
    file = write(tmp_path, "instance_num: 3\n")
    settings = load(environ={"FLEXKV_CONFIG_PATH": "/does/not/exist.yml"}, file=file)
    assert (settings.instance_num, settings.config_path) == (3, str(file))


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "cpu_cache_gb:\n", "cpu_cache_gb: null\n"])
def test_nothing_said_is_the_default(tmp_path: Path, content: str) -> None:
    assert load(environ={"FLEXKV_EVICT_RATIO": ""}, file=write(tmp_path, content)) == dataclasses.replace(
        Settings(), config_path=str(tmp_path / "flexkv.yml")
    )


def test_settings_are_immutable() -> None:
    settings = load(environ={})
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.instance_num = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        settings.origins["node"] = "me"  # type: ignore[index]


# ---- unknown names


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    file = write(tmp_path, "evict_ratio: 0.1\ncpu_cache_bg: 3\n")
    assert problem(file=file) == f"'cpu_cache_bg': unknown key in {file}:2; did you mean cpu_cache_gb?"


def test_variable_name_in_a_file_is_recognised(tmp_path: Path) -> None:
    assert "did you mean cpu_cache_gb?" in problem(file=write(tmp_path, "FLEXKV_CPU_CACHE_GB: 3\n"))


def test_unknown_variable_is_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"FLEXKV_CPU_CASH_GB": "3", "OTHER": "1"}
    with caplog.at_level(logging.WARNING, "flexkv"):
        first, second = load(environ=environ), load(environ=environ)
        assert not caplog.records, "the caller shows them"
    expected = "FLEXKV_CPU_CASH_GB (environment) is not a setting; did you mean FLEXKV_CPU_CACHE_GB?"
    assert first.warnings == second.warnings == (expected,)
    assert untold(first) == [expected]
    assert untold(second) == []


def test_unknown_key_of_the_engine_is_a_warning() -> None:
    settings = load(environ={}, extra={"evict_ration": 1, "kv_something_else": {}})
    assert "did you mean evict_ratio?" in settings.warnings[0]
    assert len(settings.warnings) == 2


# ---- wrong values


def test_a_wrong_value_names_key_value_origin_and_what_is_allowed(tmp_path: Path) -> None:
    assert problem(environ={"FLEXKV_EVICTION_POLICY": "random"}) == (
        "eviction_policy: wrong value 'random' from env FLEXKV_EVICTION_POLICY; "
        "allowed: one of adaptive, lru, lfu, slru, fifo, mru, filo, s3fifo"
    )
    file = write(tmp_path, "\n\ncpu_cache_gb: 12x\n")
    assert f"cpu_cache_gb: wrong value '12x' from {file}:3; allowed: a size such as" in problem(file=file)
    assert "from kv_connector_extra_config;" in problem(extra={"evict_ratio": 1.5})


def test_all_problems_at_once(tmp_path: Path) -> None:
    file = write(tmp_path, "no_such: 1\nevict_ratio: 2\n")
    text = problem(file=file, environ={"FLEXKV_INSTANCE_NUM": "many"})
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cpu_cache_gb", "0"),
        ("cpu_cache_gb", -1),
        ("cpu_cache_gb", 17179869184),
        ("cpu_cache_gb", True),
        ("instance_num", 0),
        ("instance_num", "1.0"),
        ("instance_num", 1.5),
        ("instance_num", True),
        ("metrics_port", 65536),
        ("evict_ratio", "nan"),
        ("evict_ratio", "many"),
        ("evict_ratio", 10**400),
        ("evict_start_threshold", 0),
        ("enable_metrics", "maybe"),
        ("enable_metrics", 2),
        ("hugepage_size_bytes", 4096),
        ("log_level", "loud"),
        ("namespace", "a\nb"),
        ("namespace", 5),
        ("node", "a/b"),
        ("node", "../x"),
        ("node", "/run/x.socket"),
        ("runtime_dir", "relative"),
        ("server_recv_port", "tcp://127.0.0.1:5555"),
        ("server_recv_port", "ipc:///tmp/"),
        ("load_timeout_ms", 0),
        ("ssd_cache_gb", "-1"),
        ("ssd_cache_gb", "2048P"),
        ("ssd_cache_dir", "relative"),
        ("ssd_cache_dir", "/a;b"),
        ("ssd_cache_dir", "/a;/b;/a/"),
        ("ssd_cache_dir", "/a\n"),
        ("ssd_cache_dir", 5),
        ("ssd_cache_dir", ["/a", 5]),
        ("ssd_cache_dir", ";".join(f"/{number}" for number in range(65))),
        ("ssd_strict", "maybe"),
        ("ssd_dwpd", "-1"),
        ("ssd_dwpd", "nan"),
        ("ssd_tbw", "1T"),
        ("ssd_years", "many"),
        ("ssd_years", "1e-310"),
        ("ssd_years", 0.09),
        ("ssd_capacity_gb", "inf"),
        ("ssd_capacity_gb", 1e-10),
        ("ssd_direct_io", "sometimes"),
        ("ssd_load_policy", "never"),
    ],
)
def test_wrong_values(key: str, value: object) -> None:
    assert problem(extra={key: value}).startswith(f"{key}: wrong value ")


@pytest.mark.parametrize(
    ("key", "written", "value"),
    [
        ("enable_flexkv", "0", False),
        ("enable_flexkv", "On", True),
        ("enable_metrics", 1, True),
        ("cpu_cache_gb", "1.5T", 1536 * GIB),
        ("hugepage_size_bytes", 1 << 30, GIB),
        ("hugepage_size_bytes", "2MB", 2 * MIB),
        ("hit_reward_seconds", "2", 2.0),
        ("sync_load_max_mb", 8, 8 * MIB),
        ("sync_load_max_mb", "1GB", GIB),
        ("log_level", "WARN", "warning"),
        ("namespace", "tenant a/ü", "tenant a/ü"),
        ("ssd_cache_gb", "1.5T", 1536 * GIB),
        ("ssd_cache_gb", 0, 0),
        ("ssd_cache_dir", "/a; /b/;", ("/a", "/b")),
        ("ssd_cache_dir", ["/a", "/b/../c"], ("/a", "/c")),
        ("ssd_cache_dir", "~/x", (os.path.expanduser("~/x"),)),
        ("ssd_years", "0", 0.0),
    ],
)
def test_right_values(key: str, written: object, value: object) -> None:
    assert load(environ={}, extra={key: written}).value(key) == value


def test_a_yaml_number_to_the_base_of_60_is_text(tmp_path: Path) -> None:
    assert "instance_num: wrong value '1:30' from " in problem(file=write(tmp_path, "instance_num: 1:30\n"))
    assert "ssd_dwpd: wrong value '1:30.5' from " in problem(file=write(tmp_path, "ssd_dwpd: 1:30.5\n"))
    assert load(environ={}, file=write(tmp_path, "namespace: 1:30\n")).namespace == "1:30"


def test_values_that_contradict_each_other() -> None:
    text = problem(environ={"FLEXKV_INSTANCE_NUM": "2"}, extra={"instance_id": 2})
    assert "instance_id: wrong value 2 from kv_connector_extra_config" in text
    assert "env FLEXKV_INSTANCE_NUM" in text


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"ssd_cache_gb": 1, "ssd_cache_dir": ";"}, "ssd_cache_dir: wrong value '' from kv_connector_extra_config; "),
        (
            {"ssd_dwpd": 1, "ssd_tbw": 600, "ssd_years": 5},
            "ssd_tbw: wrong value 600 from kv_connector_extra_config; allowed: 0 beside ssd_dwpd, which is 1 (kv_conn",
        ),
        ({"ssd_tbw": 600}, "ssd_years: wrong value 0 from default; allowed: more than 0 with ssd_tbw, which is 600 ("),
        ({"ssd_years": 3}, "ssd_years: wrong value 3 from kv_connector_extra_config; allowed: 0 without ssd_dwpd or"),
        ({"ssd_capacity_gb": 960}, "ssd_capacity_gb: wrong value 960 from kv_connector_extra_config; allowed: 0 wit"),
        ({"ssd_tbw": 9, "ssd_years": 1, "ssd_capacity_gb": 9}, "ssd_capacity_gb: wrong value 9 from kv_connector_e"),
    ],
)
def test_ssd_values_that_contradict_each_other(extra: dict[str, object], expected: str) -> None:
    assert problem(extra=extra).startswith(expected)


def test_ssd_directories_that_are_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").symlink_to(tmp_path / "a")
    expected = f"{tmp_path}/a and {tmp_path}/b are the same directory"
    assert expected in problem(extra={"ssd_cache_dir": [str(tmp_path / "a"), str(tmp_path / "b")]})


def test_default_ssd_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert load(environ={}).ssd_cache_dir == ("/c/flexkv",)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert load(environ={}).ssd_cache_dir == ("/var/cache/flexkv",)


# ---- files that are no good


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.yml", "- 1\n- 2\n", "not a mapping"),
        ("a.yml", "just words", "not a mapping"),
        ("a.yml", "evict_ratio: 0.1\nredis_password: 'secret\n", "line "),
        ("a.yml", "evict_ratio: 0.1\nevict_ratio: 0.2\n", "line 2: 'evict_ratio' is given twice"),
        ("a.yml", "a: " + "[" * 5000, "nested too deeply"),
        ("a.yml", "a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor"),
        ("a.yml", "a: 2001-99-99\n", "month"),
        ("a.yml", "a: 1\n---\nb: 2\n", "single document"),
        ("a.yml", "#" * (1 << 20) + "\n", "larger than"),
        ("a.json", "[1]", "not an object"),
        ("a.json", '{"evict_ratio": NaN}', "NaN"),
        ("a.json", '{"evict_ratio": 1, "evict_ratio": 2}', "given twice"),
        ("a.json", "{", "line 1"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.toml", "a = 1", "must end in"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, reason: str) -> None:
    text = problem(file=write(tmp_path, content, name))
    assert text.startswith("config file ")
    assert reason in text
    assert "secret" not in text


def test_missing_file_folder_and_binary(tmp_path: Path) -> None:
    assert "No such file" in problem(environ={"FLEXKV_CONFIG_PATH": str(tmp_path / "x.yml")})
    (tmp_path / "folder.yml").mkdir()
    assert "not a regular file" in problem(file=tmp_path / "folder.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00a")
    assert "config file" in problem(file=tmp_path / "binary.yml")
    assert "path" in problem(environ={"FLEXKV_CONFIG_PATH": "a\0b.yml"})


def test_config_path_does_not_belong_in_a_file(tmp_path: Path) -> None:
    assert "FLEXKV_CONFIG_PATH" in problem(file=write(tmp_path, "config_path: /x.yml\n"))


# ---- names of the original

ORIGINAL_FILE_KEYS = (
    "cpu_cache_gb ssd_cache_gb ssd_cache_dir enable_gds enable_nixl use_hugepage_cpu_buffer "
    "use_hugepage_tmp_buffer hugepage_size_bytes enable_p2p_cpu enable_p2p_ssd enable_3rd_remote "
    "use_mooncake_store_backend mooncake_store_config_path mooncake_store_pp_rank mooncake_store_pp_size "
    "mooncake_store_node_layer_start mooncake_store_node_layer_end mooncake_store_total_layers local_zmq_ip "
    "local_zmq_port redis_host redis_port redis_password local_ip node_ttl_seconds kv_cache_dtype swa_multi_group "
)
ORIGINAL_ADVANCED = (
    "INSTANCE_NUM INSTANCE_ID SERVER_CLIENT_MODE SERVER_LAUNCH_MODE SERVER_RECV_PORT INDEX_ACCEL CPU_LAYOUT "
    "SSD_LAYOUT REMOTE_LAYOUT GDS_LAYOUT ENABLE_LAYERWISE_TRANSFER USE_CE_TRANSFER_H2D USE_CE_TRANSFER_D2H "
    "TRANSFER_NUM_CTA_H2D TRANSFER_NUM_CTA_D2H CE_PATH_OPT CE_SEGMENT_THRESHOLD ENABLE_CE_MEMCPY2D "
    "CE_GATHER_THREADS CE_GATHER_NT SSD_IO_OPT IOURING_ENTRIES IOURING_FLAGS MAX_FILE_SIZE_GB EVICT_RATIO "
    "EVICT_START_THRESHOLD HIT_REWARD_SECONDS EVICTION_POLICY SLRU_PROTECTED_THRESHOLD ENABLE_MPS "
    "ENABLE_COLLECTIVE_SYNC ENABLE_TRACE TRACE_FILE_PATH TRACE_MAX_FILE_SIZE_MB TRACE_MAX_FILES "
    "TRACE_FLUSH_INTERVAL_MS TRANSFER_TRACE ENABLE_METRICS CPP_METRICS_PORT PY_METRICS_PORT "
    "LT_POOL_INITIAL_CAPACITY REFRESH_BATCH_SIZE REBUILD_INTERVAL_MS IDLE_SLEEP_MS LEASE_TTL_MS SAFETY_TTL_MS "
    "RENEW_LEASE_MS RESET_BARRIER_TIMEOUT_MS RESET_BARRIER_POLL_MS KV_SHARED_ACROSS_RANKS_MODE "
    "LAYERWISE_NOTIFY_MODE NVCOMP_BATCH_SIZE WORKER_SHUTDOWN_TIMEOUT_S TRANSFER_MANAGER_SHUTDOWN_TIMEOUT_S "
)
ORIGINAL_ENV_ONLY = (
    "FLEXKV_LOG_LEVEL FLEXKV_LOGGING_PREFIX FLEXKV_NUM_LOG_INTERVAL_REQUESTS FLEXKV_EVICTION_LOG_INTERVAL_S "
    "FLEXKV_MASTER_HOST FLEXKV_MASTER_PORTS FLEXKV_TRT_SUBPROCESS_HOST FLEXKV_TRT_SUBPROCESS_PORTS "
    "FLEXKV_ENABLE_SWA_TRANSFER FLEXKV_LAYERWISE_EVENTFD_SOCKET FLEXKV_LAYERWISE_EVENTFD_CONNECT_MAX_RETRIES "
    "FLEXKV_LAYERWISE_WAIT_TIMEOUT_S FLEXKV_SYNC_GET FLEXKV_MAYBE_SKIP_PUT FLEXKV_HUGETLBFS_DIR "
    "FLEXKV_CUDAHOST_CHUNK_SIZE_GB FLEXKV_VMM_FD_SOCK_DIR FLEXKV_ENABLE_NVCOMP "
    "FLEXKV_NVCOMP_SSD_PACKED_WRITE_THREADS FLEXKV_NVCOMP_SSD_PACKED_READ_THREADS FLEXKV_NIXL_BACKEND_PLUGIN "
    "MOONCAKE_CONFIG_PATH MC_REDIS_PASSWORD FLEXKV_MOONCAKE_FAULT_MODE FLEXKV_MOONCAKE_FAULT_PROB "
    "FLEXKV_MOONCAKE_FAULT_OP FLEXKV_MOONCAKE_FAULT_SEED FLEXKV_MOONCAKE_FAULT_TAIL_N "
    "FLEXKV_MOONCAKE_FAULT_RANDOM_RATIO DYNAMO_USE_FLEXKV TENSORRT_LLM_USE_FLEXKV "
    "SGLANG_SCHEDULER_SHUTDOWN_WAIT_S PROMETHEUS_MULTIPROC_DIR FLEXKV_ENABLE_P2P FLEXKV_ENABLE_CFS "
    "FLEXKV_ENABLE_CPUTEST FLEXKV_DEBUG FLEXKV_GIT_COMMIT FLEXKV_SWA_MULTI_LAYER FLEXKV_MLA_D2H_MODE "
    "ENABLE_FLEXKV FLEXKV_CONFIG_PATH "
)


def test_every_name_of_the_original_is_understood() -> None:
    keys = {*ORIGINAL_FILE_KEYS.split(), *ORIGINAL_ADVANCED.lower().split(), "swa_multi_layer"}
    variables = {*ORIGINAL_ENV_ONLY.split(), *(f"FLEXKV_{key.upper()}" for key in keys)}
    assert keys <= BY_KEY.keys()
    assert variables <= BY_ENV.keys()


def test_no_name_means_two_settings() -> None:
    assert len(BY_KEY) == sum(1 + len(one.aliases) for one in TABLE)
    assert len(BY_ENV) == sum(len(one.env) for one in TABLE)
    assert {one.attribute for one in ACTIVE} <= {one.name for one in dataclasses.fields(Settings)}


@pytest.mark.parametrize("setting", [one for one in TABLE if one.status is not Status.ACTIVE], ids=lambda one: one.key)
def test_inactive_names_are_never_an_error(setting, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = write(tmp_path, json.dumps({setting.key: ["anything", {"at": "all"}]}), "flexkv.json")
    settings = load(environ={setting.env[0]: "1"}, file=file)
    assert [one.setting for one in settings.ignored] == [setting]
    assert len(settings.warnings) == (setting.status is Status.PLANNED)
    assert load(environ={setting.env[0]: "0"}).warnings == ()


def test_variables_of_other_programs_give_no_warning() -> None:
    environ = {"MOONCAKE_CONFIG_PATH": "/m.json", "MC_REDIS_PASSWORD": "x", "PROMETHEUS_MULTIPROC_DIR": "/tmp/p"}
    assert load(environ=environ).warnings == ()


def test_one_metrics_port_of_three_names() -> None:
    settings = load(environ={"FLEXKV_PY_METRICS_PORT": "8080", "FLEXKV_CPP_METRICS_PORT": "8082"})
    assert settings.metrics_port == 8082
    assert "FLEXKV_PY_METRICS_PORT" in settings.warnings[0]
    assert load(environ={"FLEXKV_PY_METRICS_PORT": "8080"}).metrics_port == 8080
    assert load(environ={}, extra={"py_metrics_port": 1, "metrics_port": 2}).metrics_port == 2


# ---- what the core gets


def test_node_options_are_plain_values() -> None:
    options = load(environ={}, extra={"cpu_cache_gb": "auto", "runtime_dir": "/run/x"}).node_options()
    assert all(type(value) in (bool, int, float, str, list) for value in options.values())
    assert options["ssd_bytes"] == 0
    assert options["ssd_make_parents"] is True  # of the default directory
    assert options["runtime_dir"] == "/run/x"
    assert options["node_name"] == f"embedded-{os.getpid()}"
    assert options["slru_protected_hits"] == 2


def test_ssd_node_options() -> None:
    environ = {
        "FLEXKV_SSD_CACHE_GB": "100",
        "FLEXKV_SSD_CACHE_DIR": "/a;/b",
        "FLEXKV_SSD_STRICT": "1",
        "FLEXKV_SSD_ADMISSION": "off",
        "FLEXKV_SSD_DWPD": "0.8",
        "FLEXKV_SSD_CAPACITY_GB": "3840",
        "FLEXKV_SSD_DIRECT_IO": "off",
    }
    options = load(environ=environ).node_options()
    assert {key: value for key, value in options.items() if key.startswith("ssd_")} == {
        "ssd_bytes": 100 * GIB,
        "ssd_directories": ["/a", "/b"],
        "ssd_make_parents": False,
        "ssd_strict": True,
        "ssd_admission": False,
        "ssd_dwpd": 0.8,
        "ssd_capacity_bytes": 3_840_000_000_000,
        "ssd_tbw": 0.0,
        "ssd_years": 5.0,
        "ssd_direct_io": False,
    }


@pytest.mark.parametrize(
    ("extra", "mode", "name"),
    [
        ({}, "embedded", f"embedded-{os.getpid()}"),
        ({"node": "prod"}, "daemon", "prod"),
        ({"node": "/run/y/prod.sock"}, "daemon", "prod"),
        ({"server_client_mode": 1}, "shared", "default"),
        ({"instance_num": 2}, "shared", "default"),
        ({"instance_num": 2, "server_recv_port": "ipc:///tmp/flexkv_server_3"}, "shared", "flexkv_server_3"),
        ({"server_launch_mode": "external"}, "daemon", "default"),
        ({"server_launch_mode": "external", "node": "embedded"}, "embedded", f"embedded-{os.getpid()}"),
        ({"server_recv_port": "ipc:///tmp/flexkv_server_3"}, "embedded", f"embedded-{os.getpid()}"),
    ],
)
def test_which_node(extra: dict[str, object], mode: str, name: str) -> None:
    target = load(environ={}, extra={"runtime_dir": "/run/x", **extra}).node_target
    assert (target.mode, target.name) == (mode, name)
    assert target.socket == ("/run/y" if extra.get("node", "").startswith("/") else "/run/x") + f"/{name}.sock"  # type: ignore[attr-defined]


def test_runtime_dir_follows_the_session(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert load(environ={}).runtime_dir == str(tmp_path / "flexkv")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert load(environ={}).runtime_dir in ("/run/flexkv", f"/tmp/flexkv-{os.geteuid()}")


def test_as_dict_has_every_active_key() -> None:
    assert list(load(environ={}).as_dict()) == [one.key for one in ACTIVE]


# ---- variables of NVIDIA's KVBM


def test_what_was_said_to_kvbm_is_understood() -> None:
    environ = {
        "DYN_KVBM_CPU_CACHE_GB": "100",
        "DYN_KVBM_DISK_CACHE_GB": "2.5",
        "DYN_KVBM_DISK_CACHE_DIR": "/mnt/nvme",
        "DYN_KVBM_DISK_DISABLE_O_DIRECT": "true",
        "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER": "0",
        "DYN_KVBM_METRICS": "1",
        "DYN_KVBM_METRICS_PORT": "6880",
        "DYN_KVBM_MAX_CONCURRENT_TRANSFERS": "8",
    }
    settings = load(environ=environ)
    assert (settings.cpu_cache_bytes, settings.ssd_cache_bytes) == (100 * 10**9, 2_500_000_000)
    assert settings.ssd_cache_dir == ("/mnt/nvme/flexkv",)
    assert (settings.ssd_direct_io, settings.ssd_admission) == (False, True)
    assert (settings.enable_metrics, settings.metrics_port) == (True, 6880)
    assert settings.origin("cpu_cache_gb") == "env DYN_KVBM_CPU_CACHE_GB"
    assert settings.warnings == ()


def test_our_own_variable_wins_over_kvbms() -> None:
    settings = load(environ={"DYN_KVBM_CPU_CACHE_GB": "100", "FLEXKV_CPU_CACHE_GB": "8"})
    assert settings.cpu_cache_bytes == 8 * GIB
    assert settings.warnings == ("env DYN_KVBM_CPU_CACHE_GB is ignored: FLEXKV_CPU_CACHE_GB sets the same",)


def test_what_was_said_to_kvbm_in_vain_is_told() -> None:
    (warning,) = load(environ={"DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS": "1000"}).warnings
    assert "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS" in warning and "cpu_cache_gb" in warning


@pytest.mark.parametrize("name", ["CPU_CACHE_GB", "DISK_DISABLE_O_DIRECT", "METRICS_PORT"])
@pytest.mark.parametrize("value", ["much", "inf", "-1e400"])
def test_a_wrong_value_for_kvbm_names_its_variable(name: str, value: str) -> None:
    assert f"from env DYN_KVBM_{name}" in problem(environ={f"DYN_KVBM_{name}": value})


def test_every_counterpart_of_kvbm_is_an_active_setting() -> None:
    assert {one.key for one in kvbm.TABLE} - {""} <= {one.key for one in ACTIVE}
