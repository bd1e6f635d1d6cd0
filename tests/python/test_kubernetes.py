"""The manifests in examples/kubernetes: what Kubernetes' own schemas say of them, that they fit together, and that
FlexKV understands what they give it. No cluster runs here."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from flexkv.cli.app import app
from flexkv.config import Settings, load, untold
from typer.testing import CliRunner

pytestmark = pytest.mark.usefixtures("clean_environment")

_FILES = sorted((Path(__file__).parents[2] / "examples/kubernetes").glob("*.yaml"))
_OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    (one["kind"], one["metadata"]["name"]): one for file in _FILES for one in yaml.safe_load_all(file.read_text())
}
_WORKLOADS = [one for (kind, _), one in _OBJECTS.items() if kind in ("Deployment", "DaemonSet")]
_NODES = _OBJECTS["DaemonSet", "flexkv"]
_ENGINE = _OBJECTS["Deployment", "vllm"]
_OF_THE_POD = {"status.podIP": "10.1.2.3", "spec.nodeName": "worker-1.example"}


def pod(workload: dict[str, Any]) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def container(workload: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(workload)["containers"]
    return only


def environment(workload: dict[str, Any]) -> dict[str, str]:
    """As the container gets it, with a stand-in for what is secret."""
    variables = {}
    for one in container(workload)["env"]:
        source = one.get("valueFrom", {})
        field = source.get("fieldRef", {}).get("fieldPath")
        variables[one["name"]] = _OF_THE_POD[field] if field else "hidden" if "secretKeyRef" in source else one["value"]
    return variables


def host_directories(workload: dict[str, Any]) -> dict[str, str]:
    """Where in the container which directory of the machine is."""
    of_machine = {one["name"]: one["hostPath"]["path"] for one in pod(workload)["volumes"] if "hostPath" in one}
    mounts = container(workload)["volumeMounts"]
    return {one["mountPath"]: of_machine[one["name"]] for one in mounts if one["name"] in of_machine}


@pytest.fixture
def node_settings(tmp_path: Path) -> Settings:
    """Of the DaemonSet, from its ConfigMap where that is mounted."""
    variables = environment(_NODES)
    mounted, name = Path(variables["FLEXKV_CONFIG_PATH"]).parent, Path(variables["FLEXKV_CONFIG_PATH"]).name
    (volume,) = (one["name"] for one in container(_NODES)["volumeMounts"] if one["mountPath"] == str(mounted))
    (source,) = (one["configMap"]["name"] for one in pod(_NODES)["volumes"] if one["name"] == volume)
    file = tmp_path / name
    file.write_text(_OBJECTS["ConfigMap", source]["data"][name])
    return load(environ=variables | {"FLEXKV_CONFIG_PATH": str(file)})


@pytest.mark.parametrize("version", ["oldest", "newest"])
def test_kubernetes_knows_every_field(version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    which = {"oldest": "1.27", "newest": validator.latest_version()}[version]
    for one in _OBJECTS.values():
        validator.validate(one, which, strict=True)
    misspelt = json.loads(json.dumps(_NODES))
    misspelt["spec"]["template"]["spec"]["hostIpc"] = True
    with pytest.raises(validator.ValidationError, match="hostIpc"):
        validator.validate(misspelt, which, strict=True)


def test_flexkv_understands_the_settings(node_settings: Settings) -> None:
    assert list(untold(node_settings)) == []
    assert (node_settings.local_ip, node_settings.node_id) == ("10.1.2.3", "worker-1.example")
    ports = {one["name"]: one["containerPort"] for one in container(_NODES)["ports"]}
    assert ports == {"peers": node_settings.peer_port, "metrics": node_settings.metrics_port}
    assert (node_settings.enable_metrics, node_settings.metrics_host) == (True, "0.0.0.0")
    (redis,) = _OBJECTS["Service", node_settings.redis_host]["spec"]["ports"]
    assert redis["port"] == node_settings.redis_port
    assert node_settings.redis_password == "hidden"


def test_the_pool_fits_in_the_memory_of_its_container(node_settings: Settings) -> None:
    limit = container(_NODES)["resources"]["limits"]["memory"]
    assert node_settings.cpu_cache_bytes + (2 << 30) <= int(limit.removesuffix("Gi")) << 30
    assert container(_NODES)["resources"]["requests"]["memory"] == limit


def test_the_secret_is_private_and_where_it_is_looked_for(node_settings: Settings) -> None:
    file = Path(node_settings.cluster_secret_file)
    (volume,) = (one["name"] for one in container(_NODES)["volumeMounts"] if one["mountPath"] == str(file.parent))
    (source,) = (one["secret"] for one in pod(_NODES)["volumes"] if one["name"] == volume)
    assert source["defaultMode"] & 0o077 == 0
    assert [item["path"] for item in source["items"]] == [file.name]
    assert "fsGroup" not in str(_NODES)  # Kubernetes would let the group read it
    keys = _OBJECTS["Secret", source["secretName"]]["stringData"]
    references = [item["key"] for item in source["items"]]
    for one in (each for workload in _WORKLOADS for each in container(workload).get("env", [])):
        if reference := one.get("valueFrom", {}).get("secretKeyRef"):
            assert reference["name"] == source["secretName"]
            references.append(reference["key"])
    assert set(references) == set(keys)
    assert set(keys.values()) == {""}


def test_engines_find_the_node_of_their_machine(node_settings: Settings) -> None:
    engine = load(environ=environment(_ENGINE))
    assert engine.node_target.mode == "daemon"
    command = container(_NODES)["command"]
    name = command[command.index("--name") + 1]
    assert engine.node_target.socket == f"{node_settings.runtime_dir}/{name}.sock"
    assert host_directories(_ENGINE) == host_directories(_NODES) != {}
    (mounted,) = host_directories(_NODES)
    # The machine's directory is root's and open to look into; a node makes its own in it, which is not.
    assert Path(node_settings.runtime_dir).parent == Path(mounted)
    # Both have to run as one user.
    assert [("securityContext" in str(workload)) for workload in (_NODES, _ENGINE)] == [False, False]
    assert container(_ENGINE)["image"] == container(_NODES)["image"]


def test_commands_exist() -> None:
    name, *arguments = container(_NODES)["command"]
    assert name == "flexkv"
    assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 0
    probes = [probe for key, probe in container(_NODES).items() if key.endswith("Probe")]
    assert len(probes) == 3
    for probe in probes:
        name, *arguments = probe["exec"]["command"]
        assert name == "flexkv"
        assert CliRunner().invoke(app, arguments).exit_code == 3  # no such node here


def test_a_node_has_the_time_to_drain(node_settings: Settings) -> None:
    name, *arguments = container(_NODES)["lifecycle"]["preStop"]["exec"]["command"]
    assert name == "flexkv" and arguments[0] == "drain"
    assert CliRunner().invoke(app, arguments).exit_code == 3  # no such node here
    patience = float(arguments[arguments.index("--timeout") + 1]) + node_settings.drain_timeout_seconds
    assert pod(_NODES)["terminationGracePeriodSeconds"] >= patience + 5  # for what hangs at the end


def test_the_engine_is_given_our_connector() -> None:
    command = container(_ENGINE)["command"]
    connector = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert connector["kv_connector"] == "FlexKVConnector"
    assert connector["kv_load_failure_policy"] == "recompute"
    module = Path(__file__).parents[2] / "python" / (connector["kv_connector_module_path"].replace(".", "/") + ".py")
    assert "class FlexKVConnector" in module.read_text()


def test_redis_does_not_start_without_a_password() -> None:
    shell, option, script = container(_OBJECTS["Deployment", "redis"])["command"]
    assert shlex.split(script)[:2] == ["exec", "redis-server"]
    done = subprocess.run([shell, option, script], env={"REDIS_PASSWORD": ""}, capture_output=True, text=True)
    assert done.returncode != 0 and "the Secret has no redis-password" in done.stderr


def selected() -> Iterator[tuple[str, dict[str, str]]]:
    for (kind, name), one in _OBJECTS.items():
        if kind == "Service":
            yield name, one["spec"]["selector"]


@pytest.mark.parametrize(("service", "selector"), list(selected()))
def test_services_lead_somewhere(service: str, selector: dict[str, str]) -> None:
    ports = {one["targetPort"] for one in _OBJECTS["Service", service]["spec"]["ports"]}
    (workload,) = (one for one in _WORKLOADS if one["spec"]["template"]["metadata"]["labels"] == selector)
    assert workload["spec"]["selector"]["matchLabels"] == selector
    assert ports <= {one["name"] for one in container(workload)["ports"]}


def test_services_make_no_settings() -> None:
    """Of a Service called flexkv-redis, Kubernetes makes FLEXKV_REDIS_PORT=tcp://... in every pod that lets it."""
    assert all(pod(workload)["enableServiceLinks"] is False for workload in _WORKLOADS)
    assert all(
        one["metadata"].get("namespace") == "flexkv" for (kind, _), one in _OBJECTS.items() if kind != "Namespace"
    )
