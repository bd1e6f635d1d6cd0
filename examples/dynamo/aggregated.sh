#!/usr/bin/env bash
# NVIDIA Dynamo on one machine: a frontend that routes by KV, and vLLM workers that share one FlexKV node.
# Usage: examples/dynamo/aggregated.sh MODEL [WORKERS [OPTION OF vLLM...]]     then ask http://localhost:8000/v1; Ctrl-C ends all
# Needs flexkv and ai-dynamo[vllm] in the active environment. No etcd, no NATS: files and ZeroMQ do.
set -euo pipefail
model=${1:?a model: a folder or a name on the hub}
workers=${2:-2}

export DYN_DISCOVERY_BACKEND=file DYN_EVENT_PLANE=zmq
DYN_FILE_KV=${DYN_FILE_KV:-$(mktemp -d)}
export DYN_FILE_KV
export FLEXKV_CPU_CACHE_GB=${FLEXKV_CPU_CACHE_GB:-32}
trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT

# The one node of this machine. Workers that it is not there for run without it, and join it when it comes.
flexkv serve &

# A request whose worker dies is sent to another one, at most three times.
python -m dynamo.frontend --http-port "${HTTP_PORT:-8000}" --router-mode kv --migration-limit 3 &

for ((i = 0; i < workers; i++)); do
  # Each worker has a GPU, a port where it tells the router what it keeps, and one for /health and /metrics.
  FLEXKV_NODE=default CUDA_VISIBLE_DEVICES=$i DYN_SYSTEM_PORT=$((8081 + i)) python -m dynamo.vllm --model "$model" "${@:3}" \
    --kv-transfer-config '{"kv_connector":"FlexKVConnectorV1","kv_role":"kv_both","kv_load_failure_policy":"recompute"}' \
    --kv-events-config "{\"publisher\":\"zmq\",\"topic\":\"kv-events\",\"endpoint\":\"tcp://*:$((20080 + i))\",\"enable_kv_cache_events\":true}" &
done
wait
