"""A cluster on one machine: Redis, a store, three nodes, and two engines, of which the second finds what the first computed.

usage: python examples/cluster/cluster.py [--store s3 | file:///DIRECTORY]

Everything that it starts ends with it, also on Ctrl-C. README.md says what is what.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

NODES = ("a", "b", "c")
PYTHON = (sys.executable, "-P")  # -P: the working directory must not stand in for the installed package
FLEXKV = (*PYTHON, "-m", "flexkv.cli")


class Processes:
    """What runs in the background, and ends in the opposite order."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *command: str, **variables: str) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C is for this script, which then ends one after the other.
        with (self._directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | variables, start_new_session=True
            )
        self._running.append(process)
        return process

    def start_server(self, name: str, port: int, *command: str) -> None:
        """Returns once it listens."""
        process = self.start(name, *command)
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return
            time.sleep(0.05)
        raise RuntimeError(self.explain(name))

    def explain(self, name: str) -> str:
        return f"{name} ended; it said:\n{(self._directory / f'{name}.log').read_text(errors='replace')[-2000:]}"

    def end(self) -> None:
        for process in reversed(self._running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_redis(processes: Processes, directory: Path) -> dict[str, str]:
    """The settings by which nodes are one cluster."""
    port = free_port()
    processes.start_server("redis", port, "redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "")
    secret = directory / "cluster.secret"
    secret.touch(mode=0o600)
    secret.write_text(secrets.token_urlsafe(48))
    return {
        "FLEXKV_ENABLE_P2P_CPU": "1",
        "FLEXKV_CLUSTER_SECRET_FILE": str(secret),
        "FLEXKV_REDIS_PORT": str(port),
    }


def start_store(processes: Processes, url: str) -> dict[str, str]:
    """The settings of the remote tier: a directory, or an S3-compatible server that is started here."""
    if url != "s3":
        Path(url.removeprefix("file://")).mkdir(parents=True, exist_ok=True)
        return {"FLEXKV_REMOTE_URL": url}
    port = free_port()
    processes.start_server("moto", port, *PYTHON, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port))
    endpoint = f"http://127.0.0.1:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/blocks", method="PUT")).close()  # the bucket
    return {
        "FLEXKV_REMOTE_URL": "s3://blocks/example",
        "FLEXKV_REMOTE_ENDPOINT": endpoint,
        "AWS_ACCESS_KEY_ID": "example",
        "AWS_SECRET_ACCESS_KEY": "example",
    }


def start_node(processes: Processes, name: str) -> None:
    """Returns once the others know of it."""
    process = processes.start(f"node {name}", *FLEXKV, "serve", "--name", name)
    while process.poll() is None:
        status = subprocess.run([*FLEXKV, "cluster", "status", "--name", name, "--json"], capture_output=True)
        if status.returncode == 0 and json.loads(status.stdout)["nodes"][0]["cluster"]["directory"]["joined"]:
            return
    raise RuntimeError(processes.explain(f"node {name}"))


def run_engines(processes: Processes, directory: Path) -> bool:
    """One on node a, which computes, and one on node b, which waits until it has. Whether that was found."""
    from flexkv.demo.model import TINY_SHAPE, make_model

    model = make_model(directory / "model", TINY_SHAPE)
    engine = Path(__file__).with_name("engine.py")
    running = {}
    for name, role in (("a", "compute"), ("b", "find")):
        command = (*PYTHON, str(engine), str(model), role, str(directory / f"{name}.json"))
        running[name] = processes.start(f"engine {name}", *command, FLEXKV_NODE=name)
    results = {}
    for name, process in running.items():
        if process.wait() != 0:
            raise RuntimeError(processes.explain(f"engine {name}"))
        results[name] = json.loads((directory / f"{name}.json").read_text())
        cached, asked = results[name]["cached"], results[name]["asked"]
        print(f"engine on node {name}: {cached} of {asked} prompt tokens were not computed again", flush=True)
    same = results["a"]["answer"] == results["b"]["answer"]
    print(f"their answers are {'the same' if same else 'DIFFERENT'}", flush=True)
    return same and results["a"]["cached"] == 0 and results["b"]["cached"] > results["b"]["asked"] // 2


def show(*command: str) -> bool:
    print(f"\n$ flexkv {' '.join(command)}", flush=True)
    return subprocess.run([*FLEXKV, *command]).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="s3", help="s3 (a server that is started, the default) or file:///DIRECTORY")
    store = parser.parse_args().store
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="flexkv-cluster-") as name:
        directory = Path(name)
        processes = Processes(directory)
        try:
            runtime = directory / "run"
            runtime.mkdir(mode=0o700)
            os.environ |= {"FLEXKV_RUNTIME_DIR": str(runtime), "FLEXKV_CPU_CACHE_GB": "256MB"}
            # So small a model computes as fast as anything is read: left to itself, a node might let it.
            os.environ["FLEXKV_SSD_LOAD_POLICY"] = "always"
            os.environ |= start_redis(processes, directory) | start_store(processes, store)
            for node in NODES:
                start_node(processes, node)
            good = show("doctor", "--cluster")
            print()
            if importlib.util.find_spec("vllm"):
                good = run_engines(processes, directory) and good
            else:
                print("vLLM is not installed: no engines")
            return 0 if show("cluster", "status") and good else 1
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            return 130
        except (OSError, RuntimeError) as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would leave some of it behind
            processes.end()


if __name__ == "__main__":
    sys.exit(main())
