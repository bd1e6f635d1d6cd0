"""`flexkv cluster`: what this machine's nodes know of their clusters, and resetting one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from flexkv.cli import cells
from flexkv.cli.cluster_resets import cluster_of, not_told, other_machines_not_reset, reset_node
from flexkv.cli.cluster_tables import cluster_lines, peer_table
from flexkv.cli.common import EXIT_FAILED, EXIT_NO_NODE, console, fail, load_settings, print_json
from flexkv.cli.no_node import no_node, sockets_of_nodes
from flexkv.cli.show_status import ask_all
from flexkv.status_fields import CLUSTER_OFF, mapping, messages


def show(as_json: bool, name: str | None, config: Path | None) -> None:
    runtime_dir = load_settings(config).node_target.runtime_dir
    report = ask_all(runtime_dir, name)
    for one in report.unreachable:
        typer.echo(f"flexkv: {one['socket']}: {one['error']}", err=True)
    names = [mapping(status, "node").get("name") for status in report.nodes]
    in_cluster = [(node, mapping(status, "cluster")) for node, status in zip(names, report.nodes, strict=True)]
    in_cluster = [(node, cluster) for node, cluster in in_cluster if cluster]
    off = {node: why for node, status in zip(names, report.nodes, strict=True) for why in messages(status, CLUSTER_OFF)}
    if as_json:
        print_json({"nodes": [{"node": node, "cluster": cluster} for node, cluster in in_cluster], "off": off})
    else:
        for node, cluster in in_cluster:
            console().print(_view(str(node), cluster))
    for node, why in off.items():
        typer.echo(f"flexkv: node {node}: {CLUSTER_OFF}{why}", err=True)
    if not in_cluster and not off and not report.unreachable:
        if names:
            which = f"node {name}" if name else f"no node in {runtime_dir}"
            fail(
                f"{which} is {'in no' if name else 'in a'} cluster (enable_p2p_cpu, docs/operations/cluster.md)",
                EXIT_NO_NODE,
            )
        fail(no_node(runtime_dir, name), EXIT_NO_NODE)
    raise typer.Exit(EXIT_FAILED if report.unreachable or off else 0)


def reset(name: str | None, config: Path | None) -> None:
    runtime_dir = load_settings(config).node_target.runtime_dir
    paths = sockets_of_nodes(runtime_dir, name)
    failed = False
    asked: set[str] = set()
    for path in paths:
        try:
            cluster = cluster_of(path)
            if not cluster and name is None:
                continue  # another one is meant
            if not cluster:
                raise RuntimeError("this node is in no cluster")
            again = cluster["name"] in asked
            reset = None if again else reset_node(path)
            asked.add(cluster["name"])
            problems = other_machines_not_reset(path)
            if reset is not None and (why := not_told(path, reset)):
                problems.append(why)
            if problems:
                raise RuntimeError("; ".join(problems))
            if again:
                continue
        except (RuntimeError, ValueError) as error:
            typer.echo(f"flexkv: {path}: {error}", err=True)
            failed = True
        else:
            typer.echo(f"node {path.stem} has told its cluster to forget all blocks; each node does once it hears it")
    if not asked and not failed:
        fail(f"no node in {runtime_dir} is in a cluster (enable_p2p_cpu, docs/operations/cluster.md)", EXIT_NO_NODE)
    raise typer.Exit(EXIT_FAILED if failed else 0)


def _view(node: str, cluster: Mapping[str, Any]) -> RenderableType:
    who, of = cluster.get("node", cells.DASH), cluster.get("name", cells.DASH)
    where = cluster.get("address") or "nowhere"
    title = Text.assemble("node ", (node, "bold"), f"  is {who} of cluster {of}, listens at {where}")
    parts = peer_table(cluster), Group(*cluster_lines(cluster))
    return Group(title, *(Padding(part, (1, 0, 0, 0)) for part in parts), "")
