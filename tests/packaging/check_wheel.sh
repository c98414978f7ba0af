#!/usr/bin/env bash
# Install the one wheel in the folder $1 into a clean environment and use it from outside the tree.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
wheel=$(ls "$1"/kvkernels-*.whl)
wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "wheel: $(basename "$wheel"), $(stat -c %s "$wheel") bytes"
"${PYTHON:-python3}" -m venv "$work/env"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
  -c "$here/constraints.txt" torch "$wheel"
cd "$work"
"$work/env/bin/python" - <<'PYTHON'
import sys
import time

import torch  # its own import time is not ours

started = time.perf_counter()
import kvkernels

print(f"import kvkernels: {1e3 * (time.perf_counter() - started):.1f} ms after torch")
assert "triton" not in sys.modules, "kvkernels imported triton"
assert kvkernels.native.is_available, "the wheel lacks the extension"

import prefixstore.index
import prefixstore.store

pool = kvkernels.KVPool(kvkernels.KVLayout(1, 1, 64, 16, torch.float32), num_blocks=2)
key = torch.randn(5, 1, 64)
kvkernels.store_kv(key, key, pool.key_cache(0), pool.value_cache(0), torch.arange(16, 21))
out = kvkernels.paged_attention(
    key[-1:],
    pool.key_cache(0),
    pool.value_cache(0),
    torch.tensor([[1]], dtype=torch.int32),
    torch.tensor([5], dtype=torch.int32),
)
exact = torch.nn.functional.scaled_dot_product_attention(
    key[None, -1:, 0], key[None, :, 0], key[None, :, 0]
)
assert torch.allclose(out[:, 0], exact[0], atol=1e-5), "wrong attention"
print("clean environment: imported and ran")
PYTHON
