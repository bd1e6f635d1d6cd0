"""Reads of other nodes' memory, and others' reads of this one's, through Mooncake's Transfer Engine.

    python -m flexkv.mooncake.reader HOST

The node starts it (src/flexkv/peer/mooncake_reads.cc, which decides everything) and orders reads: the bytes, and once
they are there, the word of the lease. Mooncake can be asked how far a read is, but does not tell: this process looks
every 0.1 to 10 ms while reads are under way, and sleeps otherwise.
"""

from __future__ import annotations

import os
import struct
import sys
import time
from dataclasses import dataclass

from flexkv.mooncake.process import PACKAGE, TEXT_MAX, Node, map_given, text

_ORDER = struct.Struct(f"=6Q{TEXT_MAX + 1}s")
_ANSWER = struct.Struct(f"=3Q{TEXT_MAX + 1}s")
_READY, _ENDED, _ALIVE, _TROUBLE = range(1, 5)
_LOOK_MIN, _LOOK_MAX = 0.0001, 0.01  # seconds
_SIGN_EVERY = 1.0
_NO_BATCH = (0, 2**64 - 1)
_WORD_BYTES = 8


@dataclass
class _Read:
    order: int
    owner: str
    batch: int
    word: tuple[int, int] | None  # where it lies and where it goes; None: it is what is being read


class _Reader:
    def __init__(self, node: Node, host: str) -> None:
        # Whatever cards there are: RDMA would need memory that others can write to.
        os.environ["MC_FORCE_TCP"] = "1"
        os.environ.setdefault("MC_TCP_BIND_ADDRESS", host)
        os.environ.setdefault("MC_TCP_STATUS_TIMEOUT_SEC", "5")
        os.environ.setdefault("MC_TCP_PROGRESS_TIMEOUT_SEC", "5")
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        from mooncake.engine import TransferEngine

        self._node = node
        self._engine = TransferEngine()
        if self._engine.initialize(host, "P2PHANDSHAKE", "tcp", "") != 0:
            raise OSError(f"Mooncake's Transfer Engine does not start on {host} (its log says why)")
        pool, words = map_given(0, writable=False), map_given(1, writable=False)
        for memory in (pool, words):
            if self._engine.register_memory(*memory) != 0:
                raise OSError(f"Mooncake does not take {memory[1]} bytes of memory (its log says why)")
        # Not registered, so that nobody else can write there.
        self._landing, self._landing_bytes = map_given(2, writable=True)
        self._reads: list[_Read] = []
        self._say(_READY, pool[0], words[0], f"{host}:{self._engine.get_rpc_port()}")

    def run(self) -> None:
        pause = _LOOK_MIN
        sign_at = 0.0
        while True:
            orders = list(self._node.frames(_ORDER.size, pause if self._reads else None))
            for order in orders:
                self._begin(*_ORDER.unpack(order))
            before = len(self._reads)
            self._reads = [read for read in self._reads if self._look(read)]
            pause = _LOOK_MIN if orders or len(self._reads) < before else min(2 * pause, _LOOK_MAX)
            if self._reads and time.monotonic() >= sign_at:
                self._say(_ALIVE)
                sign_at = time.monotonic() + _SIGN_EVERY

    def _begin(
        self, order: int, address: int, word_address: int, offset: int, word_offset: int, size: int, owner: bytes
    ) -> None:
        if max(offset + size, word_offset + _WORD_BYTES) > self._landing_bytes:
            sys.exit("the node ordered a read to where there is no memory")
        name = owner.rstrip(b"\0").decode()
        batch = self._start(name, address, offset, size)
        if batch is None:
            self._say(_ENDED, order, 0)
        else:
            self._reads.append(_Read(order, name, batch, (word_address, word_offset)))

    def _start(self, owner: str, address: int, offset: int, size: int) -> int | None:
        batch = self._engine.batch_transfer_async_read(owner, [self._landing + offset], [address], [size])
        return None if batch in _NO_BATCH else batch

    def _look(self, read: _Read) -> bool:
        """Whether it is still under way."""
        state = self._engine.transfer_check_status(read.batch)
        if state == 1 and read.word is not None:
            batch = self._start(read.owner, *read.word, _WORD_BYTES)
            read.word = None
            if batch is not None:
                read.batch = batch
                return True
            state = -1
        if state in {1, -1}:
            self._say(_ENDED, read.order, int(state == 1))
        return state not in {1, -1}

    def _say(self, kind: int, first: int = 0, second: int = 0, words: str = "") -> None:
        self._node.say(_ANSWER.pack(kind, first, second, text(words)))


def main() -> None:
    node = Node()
    try:
        reader = _Reader(node, sys.argv[1])
    except ImportError as error:
        trouble = f"Mooncake cannot be used: {error} (tested with: pip install {PACKAGE}==0.3.13.post1)"
    except OSError as error:
        trouble = str(error)
    else:
        reader.run()
    node.say(_ANSWER.pack(_TROUBLE, 0, 0, text(trouble)))


if __name__ == "__main__":
    main()
