"""The settings of the remote tier: what the node gets, what is wrong and how that is said."""

from __future__ import annotations

import sys

import pytest
from flexkv.config import ConfigError, load

URL = "s3://bucket/prefix"


def options(**extra: object) -> dict[str, object]:
    return load(environ={}, extra=extra).node_options()


def test_nothing_is_kept_elsewhere_unless_told_so() -> None:
    assert not [key for key in options() if "remote" in key]
    assert not load(environ={}).reaches_beyond_memory


def test_what_the_node_gets() -> None:
    settings = load(
        environ={"FLEXKV_REMOTE_URL": URL, "FLEXKV_REMOTE_SECRET_KEY": "hidden"},
        extra={
            "remote_endpoint": "http://10.0.0.1:9000",
            "remote_region": "eu-central-1",
            "remote_access_key": "key",
            "cluster_name": "blue",
        },
    )
    assert {key: value for key, value in settings.node_options().items() if "remote" in key} == {
        "remote_url": URL,
        "remote_endpoint": "http://10.0.0.1:9000",
        "remote_region": "eu-central-1",
        "remote_access_key": "key",
        "remote_secret_key": "hidden",
        "remote_cluster": "blue",
        "remote_secret_file": "",
        "remote_mooncake_helper": [],
    }
    assert settings.reaches_beyond_memory
    assert options(remote_url="file:///mnt/shared/kv")["remote_url"] == "file:///mnt/shared/kv"


@pytest.mark.parametrize("url", ["/mnt/shared", "file://mnt/shared", "https://bucket.s3.amazonaws.com", "s3://", "s3:///x", "mooncake:///x"])
def test_a_wrong_url_is_told(url: str) -> None:
    with pytest.raises(ConfigError, match="remote_url: wrong value .*file:///DIRECTORY, s3://BUCKET/PREFIX or mooncake://HOST:PORT/PREFIX"):
        options(remote_url=url)


def test_mooncake_store_is_for_clusters_only_and_runs_in_a_process_with_the_same_python() -> None:
    url = "mooncake://10.0.0.1:50051/prefix"
    with pytest.raises(ConfigError, match=r"remote_url: mooncake:// .*cluster only.*enable_p2p_cpu=1, redis_host and"):
        options(remote_url=url)
    given = options(remote_url=url, enable_p2p_cpu=True, cluster_secret_file="/etc/secret")
    assert given["remote_url"] == url
    assert given["remote_mooncake_helper"] == [sys.executable, "-P", "-m", "flexkv.mooncake.store"]


def test_what_does_not_go_together_is_told() -> None:
    with pytest.raises(ConfigError, match="remote_secret_key: needed with remote_access_key"):
        options(remote_url=URL, remote_access_key="key")
    with pytest.raises(ConfigError, match="remote_access_key: needed with remote_secret_key"):
        options(remote_url=URL, remote_secret_key="key")
    with pytest.raises(ConfigError, match="remote_endpoint: there is no remote_url"):
        options(remote_endpoint="http://10.0.0.1:9000")


def test_secrets_are_never_shown() -> None:
    settings = load(environ={"FLEXKV_REMOTE_URL": URL}, extra={"remote_access_key": "whoami", "remote_secret_key": "hush"})
    assert settings.show("remote_secret_key") == settings.show("remote_access_key") == "***"
    assert "hush" not in repr(settings) and "whoami" not in repr(settings)
    with pytest.raises(ConfigError) as error:
        options(remote_url=URL, remote_access_key="who ami", remote_secret_key="hu sh")
    assert "hu sh" not in str(error.value) and "who ami" not in str(error.value)
