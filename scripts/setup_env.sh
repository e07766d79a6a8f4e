#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm_sparse project
#
# Make .venv ready: vLLM for CPU, the given extras of pyproject.toml (default: cpu bench),
# and this project, built and installed in place. Nothing is done when nothing changed.
#
#   scripts/setup_env.sh [extra...]
#
# Other scripts source it, which also gives them .venv on the PATH and the environment in
# which vLLM's CPU engine is quick.
#
#   TORCH_INDEX_URL  index of PyTorch's CPU wheels, where pip is not set up for one
#   PYTHON           interpreter of a new .venv, 3.11 or later (default: python3)
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
if [ $# -eq 0 ]; then set -- cpu bench; fi
extras="$(IFS=,; echo "$*")"

started=$SECONDS
say() { printf '[setup %3ds] %s\n' "$((SECONDS - started))" "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

check_tools() {
  local python="${PYTHON:-python3}"
  command -v "$python" >/dev/null || die "no $python found; install Python 3.11 or later, or set PYTHON"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("$python" --version) is too old; install Python 3.11 or later, or set PYTHON"
  "$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    die "Python.h is missing; install Python's headers (Debian, Ubuntu: python3-dev)"
  command -v "${CXX:-c++}" >/dev/null ||
    die "no C++ compiler (${CXX:-c++}); install one (Debian, Ubuntu: g++), or set CXX"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" ||
    die "could not create .venv (Debian, Ubuntu: install python3-venv)"
}

# Everything that decides what is installed. The folder is part of it because an
# editable install points there.
fingerprint() {
  { source_fingerprint; echo "$extras"
    cat "$root/scripts/setup_env.sh" "$root/scripts/torchvision_on_cpu.py"; } | sha256sum
}

source_fingerprint() {
  cd "$root"
  { echo "$root"; cat pyproject.toml setup.py scripts/nvcc.py
    find csrc -type f -print0 | LC_ALL=C sort -z | xargs -0 cat; } | sha256sum
}

# uv reads none of pip's configuration: print the options that say the same, one a line.
pip_options_for_uv() {
  "$venv/bin/python" - <<'PY'
import ast, subprocess, sys

listing = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
).stdout
# Later wins, as in pip: files first, then the environment.
lines = sorted(listing.splitlines(), key=lambda line: line.startswith(":env:"))
values = {}
for line in lines:
    key, _, value = line.partition("=")
    values[key.rpartition(".")[2]] = ast.literal_eval(value).split()
names = {
    "index-url": "--index-url",
    "extra-index-url": "--extra-index-url",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}
for key, option in names.items():
    for value in values.get(key, []):
        print(option, value, sep="\n")
PY
}

# Requirements of vLLM for sound and video, which do not load beside a CPU torch.
unused=(torchaudio torchcodec)

install_with_uv() {
  command -v uv >/dev/null || "$venv/bin/pip" install --quiet --quiet uv || return 1
  local options=()
  mapfile -t options < <(pip_options_for_uv)
  printf '%s\n' "${unused[@]}" >"$venv/unused.txt"
  # uv prefers one index to another where pip compares them all; do as pip does.
  uv pip install --quiet --python "$venv/bin/python" --index-strategy unsafe-best-match \
    --excludes "$venv/unused.txt" "${options[@]}" "$@"
}

install_with_pip() {
  "$venv/bin/pip" install --quiet --no-compile "$@" &&
    "$venv/bin/pip" uninstall --quiet --yes "${unused[@]}"
}

install() {
  local index=()
  if [ -n "${TORCH_INDEX_URL:-}" ]; then index=(--extra-index-url "$TORCH_INDEX_URL"); fi
  # uv takes a tenth of pip's time; pip remains for where uv cannot be had.
  install_with_uv "${index[@]}" "$@" || { say "uv failed, trying pip"
    install_with_pip "${index[@]}" "$@"; } ||
    die "installation failed. If no CPU build of torch was found: set TORCH_INDEX_URL to
       PyTorch's index of CPU wheels (the selector at pytorch.org, Get Started, names it)."
}

# The packages that the extras name, one a line.
requirements() {
  "$venv/bin/python" - "$root/pyproject.toml" "$@" <<'PY'
import sys, tomllib

with open(sys.argv[1], "rb") as file:
    groups = tomllib.load(file)["project"]["optional-dependencies"]
for extra in sys.argv[2:]:
    print(*groups[extra], sep="\n")
PY
}

set_up() {
  check_tools
  say "installing $extras (about 1 GB of packages the first time)"
  local packages=()
  mapfile -t packages < <(requirements "$@")
  # setuptools first and torch before the project: its build imports both.
  install setuptools wheel ninja "${packages[@]}"
  "$venv/bin/python" "$root/scripts/torchvision_on_cpu.py" || say "vision models will not load"
  # Other extras need no new build.
  local built="$venv/.built" sources
  sources="$(source_fingerprint)"
  if [ "$(cat "$built" 2>/dev/null)" = "$sources" ]; then return; fi
  say "building the C++ ops (a minute or two)"
  local build=("$venv/bin/pip" install --quiet)
  if command -v uv >/dev/null; then build=(uv pip install --quiet --python "$venv/bin/python"); fi
  (cd "$root" && "${build[@]}" --no-build-isolation --no-deps --editable .) ||
    die "building the C++ ops failed; the compiler's message stands above"
  echo "$sources" >"$built"
}

export PATH="$venv/bin:$PATH"
stamp="$venv/.setup-$extras"
fingerprint="$(fingerprint)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$fingerprint" ]; then
  set_up "$@"
  echo "$fingerprint" >"$stamp"
  say "ready"
fi

# Python compiles modules when first imported; without keeping that, every start of
# vLLM takes 20 seconds longer.
unset PYTHONDONTWRITEBYTECODE
# Large tensors on huge pages: selection reads lines scattered over the whole cache.
export THP_MEM_ALLOC_ENABLE="${THP_MEM_ALLOC_ENABLE:-1}"
# With GNU's OpenMP a decode step can take ten times as long on a busy machine; vLLM
# asks for Intel's to be loaded first (its CPU installation page).
if [ -e "$venv/lib/libiomp5.so" ]; then
  export LD_PRELOAD="$venv/lib/libiomp5.so${LD_PRELOAD:+:$LD_PRELOAD}"
fi
# Sourced by hand: a failing command must not end the user's shell.
case $- in *i*) set +eu +o pipefail ;; esac
