#!/usr/bin/env bash
# SGLang with FlexKV behind its external linker: examples/sglang/launch_linked.sh MODEL [more arguments of SGLang]
# FlexKV's own settings: FLEXKV_* (64 GB of host memory here), or the file that FLEXKV_CONFIG_PATH names.
set -euo pipefail

export FLEXKV_CPU_CACHE_GB=${FLEXKV_CPU_CACHE_GB:-64}
exec python -m sglang.launch_server --model-path "$1" --page-size 64 \
  --enable-unified-cache-external-linker --unified-cache-external-linker-backend dynamic \
  --unified-cache-external-linker-config \
  '{"linker": "FlexKVLinker", "linker_module_path": "flexkv.integration.sglang.linker"}' \
  "${@:2}"
