"""The settings of engines whose ranks are on several machines (docs/operations/several_machines.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexkv.config.setting import Kind, WrongValue, setting, show_value, text

if TYPE_CHECKING:
    from flexkv.config.settings import Settings

_TOPIC = "Engines on several machines"
_ADDRESS = r"(\[[0-9A-Fa-f:.%]{2,64}\]|[A-Za-z0-9._-]{1,200}):\d{1,5}"
_HOSTS_MAX = 255


def _addresses() -> Kind:
    allowed = f"HOST:PORT, separated by commas, none twice, at most {_HOSTS_MAX}"

    def parse(value: object) -> tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or len(parts) > _HOSTS_MAX:
            raise ValueError(value)
        addresses = [part.strip() if isinstance(part, str) else part for part in parts if part != ""]
        for address in addresses:
            if not isinstance(address, str) or not _is_address(address):
                raise WrongValue(f"{show_value(address)} is not HOST:PORT")
            if addresses.count(address) > 1:
                raise WrongValue(f"{show_value(address)} is given twice")
        return tuple(addresses)

    return Kind(allowed, parse, ",".join)


def _is_address(address: str) -> bool:
    return re.fullmatch(_ADDRESS, address) is not None and 0 < int(address.rpartition(":")[2]) <= 65535


@dataclass(frozen=True, kw_only=True)
class HostsSettings:
    """The part of Settings by which an engine on several machines finds the node of each."""

    engine_hosts: tuple[str, ...] = setting(
        _addresses(),
        (),
        "Where the nodes of an engine's other machines listen for its scheduler (their engine_listen), in the order of the "
        "engine's ranks, without the scheduler's own machine. For the scheduler, of vLLM only. Needs cluster_secret_file.",
        topic=_TOPIC,
        default_text="none",
    )
    engine_listen: str = setting(
        text("HOST:PORT, an address of this machine", rf"{_ADDRESS}"),
        "",
        "Where this node lets schedulers of other machines in, whose ranks are here. Who knows the cluster's secret may "
        "attach. Needs cluster_secret_file.",
        topic=_TOPIC,
        default_text="none",
    )


def hosts_options(settings: Settings) -> dict[str, str]:
    """What the core's Node takes; nothing if only engines of its own machine use it."""
    if not settings.engine_listen:
        return {}
    return {
        "engine_listen": settings.engine_listen,
        "engine_secret_file": settings.cluster_secret_file,
        "engine_cluster": settings.cluster_name,
    }


def hosts_problems(settings: Settings) -> list[str]:
    if settings.cluster_secret_file:
        return []
    return [
        f"cluster_secret_file: needed with {asked} ({settings.origin(asked)}): nodes let in only who knows the cluster's "
        "secret. Make one with `(umask 077; openssl rand -base64 48 > FILE)` and give the same file to all machines"
        for asked in ("engine_hosts", "engine_listen")
        if settings.value(asked)
    ]
