"""Goes into the site of `pack_sglang.sh`: stands in for packages that SGLang imports and a plain text model never uses,
where they are not installed."""

import enum
import importlib.abc
import importlib.machinery
import sys
import types

_UNUSED = {"IPython", "cv2", "decord", "grpc", "mistral_common", "pycountry", "soundfile", "outlines_core"}


class _Module(types.ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in _UNUSED:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Module(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.append(_Finder())

# Needs NVIDIA's CuTe DSL, which is too large to carry. SGLang asks it whether it can be used.
_dual_gemm = types.ModuleType("sglang.kernels.ops.gemm.cutedsl_dual_gemm")
_dual_gemm.MAX_DUAL_GEMM_DECODE_TOKENS = 0
_dual_gemm.DualGemmQuantMode = enum.Enum("DualGemmQuantMode", "UNQUANT DYNAMIC_PER_TOKEN STATIC_PER_TENSOR")
_dual_gemm.can_use_dual_gemm = lambda *_arguments: False
sys.modules[_dual_gemm.__name__] = _dual_gemm
