"""What --enable-flexkv makes of SGLang's configuration, and what it refuses. The engine itself: tests/e2e/test_sglang.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("flexkv._core")

from flexkv.integration.config import FlexKVConfig  # noqa: E402
from flexkv.manager import RankInfo  # noqa: E402
from flexkv.manager.place import rank_of  # noqa: E402
from flexkv.transfer.layerwise import build_layerwise_eventfd_socket_path  # noqa: E402
from flexkv.transfer_manager import TransferManagerOnRemote  # noqa: E402

pytestmark = pytest.mark.usefixtures("clean_environment")


def server_args(**fields: Any) -> SimpleNamespace:
    defaults = {"tp_size": 2, "pp_size": 1, "dp_size": 1, "attn_dp_size": 1, "attn_cp_size": 1, "port": 30000}
    return SimpleNamespace(**defaults | {"model_path": "/m", "load_format": "auto", "random_seed": 1} | fields)


def complete(
    args: SimpleNamespace, tp_rank: int = 0, pp_rank: int = 0, mla: bool = False, page_size: int = 16
) -> tuple[FlexKVConfig, RankInfo]:
    model = SimpleNamespace(
        num_hidden_layers=4,
        head_dim=64,
        dtype=torch.bfloat16,
        get_total_num_kv_heads=lambda: 8,
        attention_arch=SimpleNamespace(name="MLA" if mla else "MHA"),
        hf_config=SimpleNamespace(to_json_string=lambda: "{}"),
    )
    config = FlexKVConfig.from_env()
    rank = config.post_init_from_sglang_config(
        sglang_config=model,
        server_args=args,
        page_size=page_size,
        tp_rank=tp_rank,
        pp_rank=pp_rank,
        dp_rank=0,
        attn_cp_rank=0,
    )
    return config, rank


def test_all_that_sglang_reads_is_there() -> None:
    config, rank = complete(server_args(), tp_rank=1)
    model, cache = config.model_config, config.cache_config
    assert (model.pp_size, model.attn_tp_size, model.attn_cp_size, model.nnodes, model.tp_size_per_node) == (1, 2, 1, 1, 2)
    assert model.use_mla is False and model.master_host and model.master_ports
    assert (cache.num_cpu_blocks, cache.num_ssd_blocks, cache.num_remote_blocks) == (None, None, None)
    assert not (cache.enable_ssd or cache.enable_remote or cache.enable_kv_sharing)
    assert (rank.pp_rank, rank.attn_tp_rank, rank.attn_cp_rank, rank.node_rank, rank.local_rank) == (0, 1, 0, 0, 1)
    assert (rank.dp_client_id, rank.tp_rank_per_node, rank.pp_size_per_node, rank.num_layers_per_pp_stage) == (0, 1, 1, 4)
    assert rank.model_config is model
    assert complete(server_args(), mla=True)[0].model_config.use_mla is True


def test_ranks_of_one_engine_meet_and_know_their_numbers() -> None:
    made = [complete(server_args(), tp_rank=rank)[0] for rank in range(2)]
    assert len({config.server_recv_port for config in made}) == 1
    assert [rank_of(config.gpu_register_port) for config in made] == [(0, 2), (1, 2)]
    assert complete(server_args(port=30001))[0].server_recv_port != made[0].server_recv_port


def test_each_group_of_attention_ranks_is_an_engine_of_its_own() -> None:
    made = [complete(server_args(tp_size=4, attn_dp_size=2), tp_rank=rank) for rank in range(4)]
    assert [rank.dp_client_id for _, rank in made] == [0, 0, 1, 1]
    assert [rank_of(config.gpu_register_port) for config, _ in made] == [(0, 2), (1, 2)] * 2


def test_other_weights_and_other_arguments_are_another_identity() -> None:
    def identity(**fields: Any) -> str:
        return complete(server_args(**fields))[0].model_config.identity

    first = identity()
    assert identity() == first and identity(random_seed=2) == first
    for other in {"model_path": "/n"}, {"quantization": "fp8"}, {"kv_cache_dtype": "fp8_e5m2"}, {"revision": "x"}:
        assert identity(**other) != first
    assert identity(load_format="dummy") != identity(load_format="dummy", random_seed=2)


@pytest.mark.parametrize(
    ("fields", "environment", "said"),
    [
        ({"enable_lora": True}, {}, "cannot be used with LoRA"),
        ({"lora_paths": ["a"]}, {}, "cannot be used with LoRA"),
        ({"nnodes": 2}, {}, "several machines"),
        ({}, {"ENABLE_FLEXKV": "0"}, "without --enable-flexkv"),
        ({}, {"FLEXKV_ENABLE_LAYERWISE_TRANSFER": "1"}, "FLEXKV_ENABLE_LAYERWISE_TRANSFER=1 is not supported"),
    ],
)
def test_what_the_door_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        complete(server_args(**fields))


def test_salts_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    complete(server_args())
    assert "cache_salt" in caplog.text and "--page-size" not in caplog.text


def test_pages_of_few_tokens_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    config, _ = complete(server_args(), page_size=1)
    assert config.cache_config.tokens_per_block == 1 and "--page-size 16 or more" in caplog.text


def test_what_only_several_machines_need_says_so() -> None:
    with pytest.raises(RuntimeError, match="several machines"):
        TransferManagerOnRemote.create_process(master_host="a", master_ports=("1",))


def test_the_event_descriptors_socket_differs_by_stage_and_manager() -> None:
    paths = {
        build_layerwise_eventfd_socket_path(dp_client_id=dp, pp_rank=pp, model_config=SimpleNamespace(pp_size=2, dp_size=2))
        for dp in range(2)
        for pp in range(2)
    }
    assert len(paths) == 4
