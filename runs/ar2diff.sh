#!/usr/bin/env bash
# The study at a size for one GPU: GPT-2 small on all the Python source of the machine, the same rows as runs/study.py.
# It uses the torch that is installed. Each call does at most nine minutes of work and goes on where the last one ended:
#
#   until bash runs/ar2diff.sh; do :; done      # all of it; results in results/study/gpu_*.json
#   MINUTES=500 bash runs/ar2diff.sh            # or in one go
#
# Status 0: everything is done. Not yet run on a GPU: no figure in results/ comes from here.
set -uo pipefail
cd "$(dirname "$0")/.."
minutes=${MINUTES:-9}
seeds=${SEEDS:-1}
if [ ! -e out/gpu/data/python_code/meta.json ]; then
  python -m data.python_code --source=all --tokenizer=gpt2 --out=out/gpu/data || exit 2
fi
timeout --signal=TERM "$((minutes * 60 - 20))" \
  python -m runs.study --part=gpu --seeds="$seeds" --lanes=1 --threads="$(nproc)" --out=out/gpu/study
