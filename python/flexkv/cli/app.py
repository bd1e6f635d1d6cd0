"""The commands and their options; what they do is in the modules beside this one."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from flexkv.cli import (
    bench_cluster,
    bench_ssd,
    bench_transfer,
    check_machine,
    cluster_nodes,
    config_show,
    disk_files,
    drain_node,
    reset_nodes,
    run_bench,
    serve_node,
    show_status,
    versions,
)
from flexkv.cli.help import App
from flexkv.config.reference import reference_page

app = App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="KV cache for LLM engines: keeps what a GPU has computed, in host memory and beyond, and brings it back.\n\n"
    "An engine needs no daemon: its own process holds the cache unless it is told to share one.\n\n"
    "Exit codes: 0 done, 1 failed, 2 wrong usage (a command line or a setting that cannot be used), 3 no node is "
    "running, or none in a cluster.",
)
config_app = App(no_args_is_help=True, help="Settings: their values, where they came from, what they mean.")
app.add_typer(config_app, name="config")
disk_app = App(no_args_is_help=True, help="The files of the SSD tier: check them, remove them.")
app.add_typer(disk_app, name="disk")
cluster_app = App(no_args_is_help=True, help="Nodes of several machines that read each other's blocks.")
app.add_typer(cluster_app, name="cluster")
bench_app = App(
    no_args_is_help=True,
    help="Measure this machine, each figure beside its target or what plain copies do in the same run.",
)
app.add_typer(bench_app, name="bench")

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "--file", "-c", help="Settings file instead of FLEXKV_CONFIG_PATH.")
]
Directories = Annotated[
    list[str] | None, typer.Argument(metavar="[DIR]...", help="Directories of the SSD tier. (default: ssd_cache_dir)")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flexkv {versions.package_version()}")
        raise typer.Exit


@app.callback()
def flexkv(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    del version  # its callback has answered


@app.command()
def version(as_json: Json = False) -> None:
    """Versions of the package, its compiled part and what they run on."""
    versions.run(as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "flexkv serve --cpu-cache 64\n\n"
    "flexkv serve --cpu-cache auto --name prod  [dim]# for engines with FLEXKV_NODE=prod[/dim]\n\n"
    "flexkv serve --cpu-cache 64 --ssd-cache 2T --ssd-dir /mnt/nvme0/flexkv --ssd-dir /mnt/nvme1/flexkv\n\n"
    "flexkv serve --cpu-cache 64 --ssd-cache 2T --ssd-dwpd 1  [dim]# so that the drives last[/dim]\n\n"
    "flexkv serve --cpu-cache 64 --events 'tcp://*:5558' --events-replay 'tcp://*:5559'\n\n"
    "FLEXKV_ENABLE_METRICS=1 flexkv serve -c /etc/flexkv.yml"
)
def serve(
    name: Annotated[
        str | None,
        typer.Option(help="Name that engines give as FLEXKV_NODE. (default: from the settings, else `default`)"),
    ] = None,
    cpu_cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Host memory of the cache: 16 (GiB), 512MB, 1.5T, auto.")
    ] = None,
    ssd_cache: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Space on drives, over all directories: 500 (GiB), 2T. 0: none.")
    ] = None,
    ssd_dir: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="Directory on a drive; once for each, or separated by `;`.")
    ] = None,
    ssd_dwpd: Annotated[
        str | None, typer.Option(metavar="N", help="Write at most N times each drive's capacity in a day.")
    ] = None,
    ssd_tbw: Annotated[
        str | None, typer.Option(metavar="N", help="Write at most N terabytes to each drive in --ssd-years.")
    ] = None,
    ssd_years: Annotated[
        str | None, typer.Option(metavar="N", help="Years that each drive is to last, for --ssd-tbw.")
    ] = None,
    ssd_direct_io: Annotated[
        bool | None, typer.Option(help="Read and write past the page cache. (default: yes)", show_default=False)
    ] = None,
    events: Annotated[
        str | None,
        typer.Option(metavar="ENDPOINT", help="Publish KV events for routers: tcp://*:5558, or ipc:///PATH."),
    ] = None,
    events_replay: Annotated[
        str | None, typer.Option(metavar="ENDPOINT", help="Repeat them to subscribers that come late.")
    ] = None,
    config: ConfigFile = None,
    foreground: Annotated[bool, typer.Option("--foreground", hidden=True)] = False,
) -> None:
    """Run a node that several engines share and that outlives them, until SIGTERM or SIGINT.

    It stays in the foreground: use systemd, a container or `&` to put it in the background."""
    del foreground  # the only mode; the name is accepted because unit files like to say it
    given = serve_node.Options(
        name, cpu_cache, ssd_cache, ssd_dir or [], ssd_dwpd, ssd_tbw, ssd_years, ssd_direct_io, events, events_replay
    )
    serve_node.run(given, config)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "flexkv status                [dim]# all nodes of this machine, embedded ones too[/dim]\n\n"
    "flexkv status --watch 2      [dim]# anew every 2 seconds, with rates[/dim]\n\n"
    "flexkv status --json         [dim]# for scripts; see docs/reference/status.md[/dim]"
)
def status(
    as_json: Json = False,
    watch: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.1, help="Repeat at this interval until Ctrl-C.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only the node of this name.")] = None,
    config: ConfigFile = None,
) -> None:
    """What the nodes of this machine hold and do: occupancy, hits, misses and their reasons, transfers, engines."""
    show_status.run(as_json, watch, name, config)


@app.command(
    epilog="[bold]Examples[/bold]\n\nflexkv reset  [dim]# after a weight update[/dim]\n\nflexkv reset --name prod"
)
def reset(
    name: Annotated[str | None, typer.Option(help="Only the node of this name.")] = None,
    config: ConfigFile = None,
) -> None:
    """Make the nodes of this machine, and their clusters, forget all blocks: after a model's weights changed."""
    reset_nodes.run(name, config)


@app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "flexkv drain --name prod                [dim]# before this node is stopped, or its machine is[/dim]\n\n"
    "flexkv drain --name prod --timeout 600  [dim]# when much waits to be written[/dim]"
)
def drain(
    name: Annotated[str | None, typer.Option(help="Only the node of this name.")] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, max=86400, help="Wait so long. (default: drain_timeout_seconds)"),
    ] = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Have the nodes of this machine end their work without a loss, and wait for that.

    A node tells its cluster that it gives nothing more, takes nothing more from engines, which go on as without a cache, and writes what waits for
    drives and the remote tier. Then it stays until it is stopped: it serves again only once it was started anew. Exit
    code 1 if something is left when the time is over."""
    drain_node.run(name, timeout, as_json, config)


@app.command(
    epilog="[bold]Examples[/bold]\n\nflexkv doctor\n\n"
    "flexkv doctor --measure      [dim]# copies, drives, GPUDirect Storage: up to a minute[/dim]\n\n"
    "flexkv doctor --cluster      [dim]# Redis, the other nodes, the remote tier[/dim]\n\n"
    "flexkv doctor -c /etc/flexkv.yml --json"
)
def doctor(
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure, too: makes files of up to 512 MiB in the SSD directories, which go."),
    ] = False,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Look at the secret, Redis, the nodes and the remote tier instead."),
    ] = False,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Whether this machine can run FlexKV well with these settings, and what to change.

    Changes nothing; --cluster writes a key to Redis, which goes after a second, and 16 bytes to the store. Exit code 1
    if something is wrong."""
    if cluster and measure:
        raise typer.BadParameter("--cluster measures the cluster, --measure this machine: give one", param_hint="--measure")
    check_machine.run(as_json, measure, cluster, config)


@disk_app.command(
    epilog="[bold]Examples[/bold]\n\n"
    "flexkv disk check               [dim]# of the directories in ssd_cache_dir[/dim]\n\n"
    "flexkv disk check --rate 500MB /mnt/nvme0/flexkv"
)
def check(
    directories: Directories = None,
    rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most to read in a second: 500MB. (default: as fast as it goes; 100MB while a node uses it)")
    ] = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Read every block in the directories and verify its checksum. Exit code 1 if one is bad.

    Changes nothing in a directory that no node uses. A node that runs does it itself, in all its directories, behind
    what it has to do otherwise, and forgets the bad ones; Ctrl-C ends that."""
    disk_files.check(directories or [], rate, as_json, config)


@disk_app.command(
    epilog="[bold]Examples[/bold]\n\nflexkv disk clear\n\nflexkv disk clear --yes /mnt/nvme0/flexkv"
)
def clear(
    directories: Directories = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    config: ConfigFile = None,
) -> None:
    """Remove all blocks from the directories. A directory that a node uses is refused."""
    disk_files.clear(directories or [], yes, config)


@cluster_app.command(name="status")
def cluster_status(
    as_json: Json = False,
    name: Annotated[str | None, typer.Option(help="Only the node of this name.")] = None,
    config: ConfigFile = None,
) -> None:
    """What the nodes of this machine know of the others: who is there, how many blocks, what is read and lent."""
    cluster_nodes.show(as_json, name, config)


@cluster_app.command(name="reset")
def cluster_reset(
    name: Annotated[str | None, typer.Option(help="Only the cluster of the node of this name.")] = None,
    config: ConfigFile = None,
) -> None:
    """Make all nodes of a cluster forget all blocks, this machine's and the others'."""
    cluster_nodes.reset(name, config)


@config_app.command(
    epilog="[bold]Examples[/bold]\n\nflexkv config show --changed\n\nflexkv config show --file flexkv.yml --json"
)
def show(
    as_json: Json = False,
    file: ConfigFile = None,
    changed: Annotated[bool, typer.Option("--changed", help="Only what is not a default.")] = False,
) -> None:
    """Each setting, its effective value and where that came from."""
    config_show.run(as_json, file, changed)


@config_app.command()
def reference() -> None:
    """The reference page of all settings, in Markdown."""
    print(reference_page(), end="")


@bench_app.command(name="index")
def bench_index(as_json: Json = False) -> None:
    """The prefix index alone: match, insert and evict in trees of up to 10 million blocks, memory a block.

    Takes some minutes."""
    run_bench.run("index", as_json)


@bench_app.command(name="keys")
def bench_keys(as_json: Json = False) -> None:
    """Keys of blocks: from tokens, and from the hashes that an engine has made. Takes about 10 s."""
    run_bench.run("keys", as_json)


@bench_app.command(name="host")
def bench_host(as_json: Json = False) -> None:
    """The data path of host memory: copies by layout, start of a pool, round trips through node, agent and client.

    Takes about a minute."""
    run_bench.run("host", as_json)


@bench_app.command(
    name="replay",
    epilog="[bold]The trace[/bold]\n\nOf Mooncake's FAST'25 release (12,031 requests in an hour, Apache-2.0), for which "
    "alone there are targets: github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl\n\n"
    "[bold]Examples[/bold]\n\nflexkv bench replay conversation_trace.jsonl --json\n\n"
    "flexkv bench replay TRACE --host-blocks 10000 --ssd-blocks 30000 --ssd-blocks 100000  [dim]# drives only[/dim]",
)
def bench_replay(
    trace: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="Lines of JSON with timestamp, input_length and hash_ids."),
    ],
    host_blocks: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Host memory of the replay with drives, in blocks of 512 tokens. May be repeated."),
    ] = None,
    ssd_blocks: Annotated[
        list[int] | None, typer.Option(min=4, help="The same for the drives. Every pair of both is replayed.")
    ] = None,
    drive_gbs: Annotated[float, typer.Option(min=0.001, help="Bandwidth of each of the four drives, in GB/s.")] = 6,
    as_json: Json = False,
) -> None:
    """A trace of requests, as Mooncake publishes them, on virtual time.

    Requests a second; hits by policy and at best possible; with drives: hits by tier, what is missed and why, bytes
    written with admission and without. Takes a minute or two with Mooncake's trace."""
    options = [f"--drive-gbs={drive_gbs:g}"]
    for name, sizes in (("host-blocks", host_blocks), ("ssd-blocks", ssd_blocks)):
        if sizes:
            options.append(f"--{name}={','.join(map(str, sizes))}")
    run_bench.run("replay", as_json, trace, options)


@bench_app.command(
    name="cluster",
    epilog="[bold]Examples[/bold]\n\nflexkv bench cluster conversation_trace.jsonl\n\n"
    "flexkv bench cluster TRACE --nodes 64 --blocks 31250 --block-tokens 512 --router prefix --json",
)
def bench_cluster_(
    trace: Annotated[
        Path,
        typer.Argument(exists=True, dir_okay=False, help="As for `flexkv bench replay`; every node gets as much load."),
    ],
    nodes: Annotated[int, typer.Option(min=1, max=1000, help="Nodes of the cluster.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, max=100_000_000, help="Of each node's host memory.")] = 1_000_000,
    block_tokens: Annotated[int, typer.Option(min=1, max=512, help="Tokens of a block; divides 512.")] = 16,
    router: Annotated[
        str, typer.Option(help="round-robin, or prefix: what begins with the same 1,024 tokens goes to one node.")
    ] = "round-robin",
    replicas: Annotated[
        int | None, typer.Option(min=1, help="Nodes that follow all others, which takes memory here. (default: up to 8)")
    ] = None,
    minutes: Annotated[int, typer.Option(min=1, max=1440, help="Of the trace.")] = 60,
    seed: Annotated[int, typer.Option(min=1, max=2**32 - 1, help="The same one gives the same figures.")] = 1,
    as_json: Json = False,
) -> None:
    """A simulated cluster of real nodes and directories that serves a trace, on virtual time.

    Hits beside those of one cache with the memory of all; what the directory sends; how soon all agree, also after a
    node died and Redis lost everything. docs/operations/scale.md explains it. Takes minutes and 3 GB as it is."""
    options = {
        "nodes": nodes,
        "blocks": blocks,
        "block-tokens": block_tokens,
        "router": router,
        "replicas": replicas,
        "minutes": minutes,
        "seed": seed,
    }
    bench_cluster.run(trace, options, as_json)


@bench_app.command(
    name="transfer",
    epilog="[bold]Examples[/bold]\n\nflexkv bench transfer\n\n"
    "flexkv bench transfer --geometry mla16 --layout apart --tokens 1024 --tokens 21000\n\n"
    "flexkv bench transfer --ssd /mnt/nvme0 --ssd /mnt/nvme1  [dim]# from drives through host memory[/dim]",
)
def bench_transfer_(
    device: Annotated[str, typer.Option(help="auto, cuda:N or host.")] = "auto",
    geometry: Annotated[
        list[str] | None, typer.Option(help="mha16, mla16, mha64, mla64: model and tokens a block. (default: all)")
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="planes, apart, whole: where a block's parts lie. (default: all)")
    ] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens a transfer. (default: 16 to 21,000)")] = None,
    ssd: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            exists=True,
            file_okay=False,
            help="Measure loads from drives instead; one directory for each, 2 GiB are written. May be repeated.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """KV blocks between device and host memory, beside plain copies in the same run: rates, latency, what it costs the
    GPU's other work. Needs torch and a few GiB on both sides; checks every byte of the first transfer of each size.
    Takes minutes; some of it with --geometry, --layout and --tokens takes less.

    With --ssd: blocks that lie on drives only, to the device, beside the drives' own rate (the program of `flexkv bench
    ssd`) and plain copies, in turns."""
    bench_transfer.run(device, geometry or [], layout or [], tokens or [], [str(one) for one in ssd or []], as_json)


@bench_app.command(
    name="recovery", epilog="[bold]Examples[/bold]\n\nflexkv bench recovery /mnt/nvme0 --blocks 10000000 --drives 1"
)
def bench_recovery(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", exists=True, file_okay=False, help="Where the files are made, 65 bytes a block, and removed."
        ),
    ],
    blocks: Annotated[int, typer.Option(min=1, max=2**32 - 1, help="Blocks of the store.")] = 10_000_000,
    drives: Annotated[int, typer.Option(min=1, max=64, help="Directories of the store, all below DIR.")] = 2,
    as_json: Json = False,
) -> None:
    """Start over full drives: from files to an index that finds every block. Payload is not written, only records.

    Takes about a minute for 10 million blocks."""
    run_bench.run("recovery", as_json, directory, [f"--blocks={blocks}", f"--drives={drives}"])


@bench_app.command(
    name="ssd",
    epilog="[bold]Examples[/bold]\n\nflexkv bench ssd /mnt/nvme0\n\n"
    "flexkv bench ssd /mnt/nvme0 /mnt/nvme1 --size 8G --seconds 5",
)
def bench_ssd_(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", exists=True, file_okay=False, help="Where to measure; one for each drive."),
    ],
    size: Annotated[
        str, typer.Option(metavar="SIZE", help="Of the file in each directory: 2 (GiB), 512M; at least 256M.")
    ] = "2G",
    seconds: Annotated[float, typer.Option(min=0.01, help="For each figure, over all its rounds.")] = 3.0,
    as_json: Json = False,
) -> None:
    """Reads and writes of the SSD tier, in turns with fio and a loop of 32 threads on the same files.

    Makes files in the directories, fills them, writes to them as fast as it can, and removes them at the end.
    Takes about 3 minutes with one directory, 6 with several, at 3 s for each figure, and as long as filling the files."""
    bench_ssd.run([str(directory) for directory in directories], size, seconds, as_json)


def main() -> None:
    """Entry point of the `flexkv` script."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("flexkv: %(levelname)s: %(message)s"))
    logging.getLogger("flexkv").addHandler(handler)
    app(prog_name="flexkv")
