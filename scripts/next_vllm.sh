#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#
# Run tests on a vLLM that has no CPU distribution yet: its Python tree over the compiled CPU
# libraries of the one in .venv. That is no vLLM to serve with (mixtures of experts, among
# others, may need newer libraries), but it shows whether our seams hold.
#
#   scripts/next_vllm.sh VERSION [pytest arguments; default: unit, backend and engine tests]
#   scripts/next_vllm.sh 0.33.0
set -euo pipefail

version="${1:?which vLLM, as in 0.33.0}"
shift
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/setup_env.sh
. "$here/setup_env.sh" cpu bench dev ray
site="$root/.venv/next-$version"

if [ ! -e "$site/ready" ]; then
  wheels="$(mktemp -d)"
  python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp --abi abi3 --platform manylinux_2_28_x86_64 \
    --platform manylinux_2_31_x86_64 --platform manylinux1_x86_64 -d "$wheels" "vllm==$version"
  rm -rf "$site"
  mkdir -p "$site"
  python - "$wheels"/vllm-*.whl "$site" <<'PY'
import shutil, sys, zipfile
from pathlib import Path

import vllm

wheel, site = sys.argv[1], Path(sys.argv[2])
with zipfile.ZipFile(wheel) as archive:
    names = [n for n in archive.namelist() if not n.endswith((".so", "/vllm-rs"))]
    archive.extractall(site, [n for n in names if "third_party/deep_gemm" not in n])
ours = Path(vllm.__file__).parent
for library in ours.rglob("*.so"):
    target = site / "vllm" / library.relative_to(ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, target)
# vLLM takes itself for a CPU build by the name of its version.
(info,) = site.glob("vllm-*.dist-info")
metadata = info / "METADATA"
metadata.write_text(
    "\n".join(
        f"{line}+cpu" if line.startswith("Version: ") and "+" not in line else line
        for line in metadata.read_text().splitlines()
    )
)
PY
  rm -rf "$wheels"
  # What it imports beyond .venv's packages.
  for package in orjson; do
    python -c "import $package" 2>/dev/null ||
      python -m pip install --quiet --no-deps --target "$site" "$package"
  done
  touch "$site/ready"
fi

export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
python -c 'import vllm; print("vLLM", vllm.__version__)'
python "$here/get_model.py" >/dev/null
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}" VLLM_NO_USAGE_STATS=1
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
cd "$root"
if [ $# -eq 0 ]; then set -- tests/unit tests/backend tests/e2e; fi
exec python -m pytest -q --durations=5 "$@"
