#!/usr/bin/env bash
# What ptxas says of the kernels for compute capability 9.0, where they are measured: none spills registers, and none has
# its wgmma run one by one, which ptxas does without a warning where registers are short (a tenth of the speed).
set -euo pipefail
log=${1:?usage: check_kernels.sh LOG, of a build with NVCC_APPEND_FLAGS="-Xptxas -v"}
said=$(grep -A 2 "Compiling entry function .* for 'sm_90a\?'" "$log" | grep -c "bytes spill stores" || true)
if [ "$said" -eq 0 ]; then echo "$log: nothing about kernels for sm_90" >&2; exit 1; fi
if grep -A 2 "Compiling entry function .* for 'sm_90a\?'" "$log" | grep -B 2 -E "[1-9][0-9]* bytes spill"; then
  echo "a kernel spills registers" >&2; exit 1
fi
if grep "wgmma.mma_async instructions are serialized" "$log"; then
  echo "the products of a kernel run one by one" >&2; exit 1
fi
echo "$said kernels for sm_90: no spills, no wgmma one by one"
