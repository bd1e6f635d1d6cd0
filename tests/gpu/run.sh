#!/usr/bin/env bash
# What needs a GPU, in one go (docs/gpu.md). usage: tests/gpu/run.sh OUT [PART...]; parts: device doctor equality ssd paired
# paired_graphs sglang (from carry_sglang/). A part may take FLEXKV_GPU_SECONDS.
# Uses cuda_device_test, a flexkv wheel and, if there, a packed vLLM (vllm026.tar.xz.*, reassemble.py) from carry/.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
out=$1
shift
parts=${*:-device doctor equality ssd paired}
site=/tmp/site
failed=0
if [ ! -d $site/flexkv ]; then
  [ ! -f carry/reassemble.py ] || python3 carry/reassemble.py carry vllm026 $site
  python3 - $site carry/*.whl <<'P'
import sys, zipfile
for wheel in sys.argv[2:]:
    zipfile.ZipFile(wheel).extractall(sys.argv[1])
P
  chmod -f +x $site/flexkv/bin/* # zipfile forgets it
fi
export PYTHONPATH=$site VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_ENABLE_V1_MULTIPROCESSING=0 HF_HUB_OFFLINE=1 \
  VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-WARNING} FLEXKV_RUNTIME_DIR=/tmp/flexkv-gpu
run() {
  local name=$1
  shift
  echo "== $name: $*"
  timeout "${FLEXKV_GPU_SECONDS:-400}" "$@" >"$out/$name.log" 2>&1
  local code=$?
  grep -E "RESULT|engine started|PASSED|FAILED|GB/s" "$out/$name.log"
  [ $code = 0 ] || { failed=1; echo "$name: exit code $code"; tail -25 "$out/$name.log"; }
}
for part in $parts; do
  case $part in
    device) run device carry/cuda_device_test ;;
    doctor)
      mkdir -m 700 /tmp/flexkv-ssd
      export FLEXKV_CPU_CACHE_GB=8 FLEXKV_SSD_CACHE_GB=8 FLEXKV_SSD_CACHE_DIR=/tmp/flexkv-ssd
      run doctor python3 -m flexkv.cli doctor --measure
      cat "$out/doctor.log"
      # cuFile asks udev what lies on the drive, and nobody runs one there.
      record=/run/udev/data/b$(findmnt -no MAJ:MIN -T /tmp/flexkv-ssd | tr -d ' ')
      if [ ! -e "$record" ]; then
        mkdir -p /run/udev/data
        printf 'E:ID_FS_USAGE=filesystem\nE:ID_FS_TYPE=%s\n' "$(findmnt -no FSTYPE -T /tmp/flexkv-ssd)" >"$record"
        run doctor_udev python3 -m flexkv.cli doctor --measure --json
        cat "$out/doctor_udev.log"
      fi
      unset FLEXKV_CPU_CACHE_GB FLEXKV_SSD_CACHE_GB FLEXKV_SSD_CACHE_DIR
      rm -rf /tmp/flexkv-ssd
      ;;
    equality)
      for load in sync async; do
        run equality_stock_$load python3 tests/gpu/vllm_equality.py --load $load
      done
      run equality_full_sleep python3 tests/gpu/vllm_equality.py --connector full --sleep
      ;;
    paired) run paired python3 tests/gpu/vllm_paired.py --logs "$out" ;;
    paired_graphs) run paired_graphs python3 tests/gpu/vllm_paired.py --logs "$out" --graphs ;;
    sglang)
      python3 carry/reassemble.py carry_sglang sglang0523 /tmp/sglang
      for door in alone switch linker hicache; do
        # SGLang's tree in Rust is built for another torch, and crashes with this one.
        run "sglang_$door" env PYTHONPATH="/tmp/sglang:$site" SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND=python \
          python3 tests/gpu/sglang_equality.py "$door" ${FLEXKV_GPU_SGLANG:-}
      done
      ;;
    ssd)
      for policy in always auto; do
        run ssd_$policy python3 tests/gpu/vllm_ttft.py --connector full --cpu-cache 8GB --ssd /tmp/flexkv-ssd --load-policy $policy
        rm -rf /tmp/flexkv-ssd
      done
      ;;
  esac
done
exit $failed
