#!/usr/bin/env bash
# Replays the beginning of a Mooncake trace at a running Dynamo (aggregated.sh), at the trace's own times, with aiperf.
# Usage: examples/dynamo/replay_trace.sh TRACE MODEL [REQUESTS [SHRINK [OPTION OF aiperf...]]]
# MODEL: as it was given to the workers. SHRINK divides prompts and answers, for a model whose context is too small for
# them; prompts share what they share in the trace, as its blocks of 512 tokens shrink with them (so 1 to 32).
# Needs aiperf in PATH. Its files are in ./artifacts.
set -euo pipefail
trace=${1:?a trace: JSON lines with timestamp, input_length, output_length, hash_ids}
model=${2:?the model that is served}
requests=${3:-200}
shrink=${4:-1}

scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT
slice=$scratch/slice.jsonl
head -n "$requests" "$trace" | python -c '
import json, sys
block, shrink = 512, int(sys.argv[1])
for line in sys.stdin:
    request = json.loads(line)
    # The last block of a prompt is a part of one: at least a token of it has to be left.
    begun = (len(request["hash_ids"]) - 1) * (block // shrink)
    request["input_length"] = max(request["input_length"] // shrink, begun + 1)
    request["output_length"] = max(request["output_length"] // shrink, 1)
    print(json.dumps(request))
' "$shrink" >"$slice"

tokenizer=$model
if [ -d "$model" ]; then
  # aiperf (0.13) looks for the tokenizer of a trace in the hub's cache only: the folder is shown to it there.
  tokenizer=local/model
  cached=$scratch/hub/models--local--model
  mkdir -p "$cached/refs" "$cached/snapshots"
  printf 0 >"$cached/refs/main"
  ln -s "$(realpath "$model")" "$cached/snapshots/0"
  export HF_HUB_CACHE=$scratch/hub HF_HUB_OFFLINE=1
fi

aiperf profile --model "$model" --tokenizer "$tokenizer" --url "http://localhost:${HTTP_PORT:-8000}" --endpoint-type completions \
  --streaming --input-file "$slice" --custom-dataset-type mooncake_trace --isl-block-size $((512 / shrink)) \
  --fixed-schedule --extra-inputs ignore_eos:true --use-server-token-count --random-seed 0 "${@:5}"
