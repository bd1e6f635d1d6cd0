#!/bin/sh
# An OpenAI server with FlexKV. The cache is a process of its own, so that it outlives the server, and others on this machine share it.
# usage: examples/vllm/serve.sh MODEL [vLLM's options]        (without a GPU: VLLM_CPU_KVCACHE_SPACE=4 before it)
set -e
if [ $# -eq 0 ] || [ "$1" = --help ] || [ "$1" = -h ]; then
  sed -n 's/^# usage:/usage:/p' "$0" >&2
  [ $# -gt 0 ] && exit 0
  exit 2
fi
model=$1
shift

flexkv serve --cpu-cache "${CPU_CACHE:-16GB}" & # add: --ssd-cache 1TB --ssd-dir /mnt/nvme0/flexkv

export FLEXKV_NODE=default
exec python -m vllm.entrypoints.openai.api_server --model "$model" "$@" --kv-transfer-config '{
  "kv_connector": "FlexKVConnector",
  "kv_connector_module_path": "flexkv.integration.vllm.connector",
  "kv_role": "kv_both",
  "kv_load_failure_policy": "recompute"
}'
