#!/usr/bin/env bash
# Packs SGLang 0.5.23, as it is, for a Hopper machine with Python 3.12 and torch 2.11 (docs/gpu.md) that has neither it nor a
# network, in 64 MiB. usage: tests/gpu/pack_sglang.sh DIRECTORY (usually carry_sglang); downloads about 1 GB.
# Left out: what serves images, video and gRPC, FlashAttention, FlashInfer, DeepGEMM and CuTe DSL (attention is Triton's).
# The compiled kernels are those of sglang-kernel 0.4.5, the last that fits torch 2.11, under the Python of 0.4.10.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$(realpath -m "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/site"
fetch() { # DIRECTORY PACKAGE...
  local platforms=()
  for platform in manylinux1 manylinux2014 manylinux_2_5 manylinux_2_17 manylinux_2_24 manylinux_2_26 manylinux_2_27 \
    manylinux_2_28 manylinux_2_34; do
    platforms+=(--platform "${platform}_x86_64")
  done
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 \
    --abi none --platform any "${platforms[@]}" -d "$@"
}
fetch "$work/wheels" sglang==0.5.23 \
  aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-doc==0.0.7 annotated-types==0.8.0 anyio==4.16.0 \
  apache-tvm-ffi==0.1.15.post2 attrs==26.1.0 click==8.5.1 cloudpickle==3.1.2 compressed-tensors==0.20.0 cuda-pathfinder==1.9.0 \
  dill==0.4.1 distro==1.9.0 dnspython==2.9.2 einops==0.8.2 email-validator==2.4.0 fastapi==0.136.3 frozenlist==1.8.0 \
  gguf==0.19.0 h11==0.16.0 httpcore==1.0.9 httpcore2==2.16.2 httpx==0.28.1 httpx2==2.16.2 interegular==0.3.3 jiter==0.19.0 \
  jsonschema==4.26.0 jsonschema-specifications==2025.9.1 kernels==0.17.2 lark==1.2.2 loguru==0.7.3 msgspec==0.22.0 \
  multidict==7.2.1 nvidia-ml-py==13.615.71 openai==3.54.0 opentelemetry-api==1.45.2 orjson==3.13.0 \
  partial-json-parser==0.2.1.1.post7 propcache==0.5.4 protobuf==7.36.2 psutil==7.2.2 pybase64==1.5.1 pydantic==2.14.3 \
  pydantic-core==2.50.4 pydantic-extra-types==2.11.1 pydantic-settings==2.16.3 pygments==2.21.0 python-dotenv==1.2.4 \
  python-multipart==0.0.34 pyzmq==27.3.0 referencing==0.37.0 rpds-py==2026.9.1 setproctitle==1.3.8 sniffio==1.3.1 \
  starlette==1.10.0 torch-memory-saver==0.0.10 traitlets==5.16.1 truststore==0.10.5 typing-inspection==0.4.5 uvicorn==0.54.0 \
  uvloop==0.23.0 watchfiles==1.3.0 xgrammar==0.2.8 yarl==1.25.1 zstandard==0.25.0
fetch "$work/kernels" sglang-kernel==0.4.10
fetch "$work/compiled" sglang-kernel==0.4.5
cd "$work/site"
for wheel in "$work"/wheels/*.whl; do
  unzip -qo "$wheel" -x 'sglang/multimodal_gen/*' 'sglang/test/*' 'sglang/srt/rust_extensions/_server*' \
    'sglang/srt/rust_extensions/_bench*' 'sglang/srt/rust_extensions/_grpc*' '*_cu12*' 2>/dev/null || [ $? = 11 ]
done
unzip -qo "$work"/kernels/*.whl 'sgl_kernel/*.py' 'sglang_kernel-*'
unzip -qo "$work"/compiled/*.whl 'sgl_kernel/sm90/*' 'sgl_kernel/spatial_ops*'
cp "$here"/sglang_site/sitecustomize.py .
find . -name '*.so' -exec strip {} + 2>/dev/null || true
cd "$work"
tar cf - site | xz -T0 -3 >"$out/sglang0523.tar.xz.00"
ls -l "$out"
