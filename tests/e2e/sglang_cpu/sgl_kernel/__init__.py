"""Stands in, on machines without a GPU, for what SGLang 0.5.23 takes from CUDA even when it runs on the CPU.

No sgl_kernel for CPUs is on PyPI: functions exist and raise. FlexKVRadixCache makes CUDA streams and waits for them; on
the CPU a stream is the thread that computes, so there is nothing to wait for.
"""

import contextlib

import torch


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_args, **_kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}")

    return missing


class _Stream:
    def synchronize(self):
        pass


if not torch.cuda.is_available():
    torch.cuda.Stream = _Stream
    torch.cuda.stream = lambda _stream: contextlib.nullcontext()
