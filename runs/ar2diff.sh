#!/usr/bin/env bash
# The study at a size for one GPU: GPT-2 small, pretrained on all the Python source of the machine, then SQuAD, MBPP,
# Multi30k and Python bodies; the paper's three tables by `python -m eval.tables --scale=small`. It uses the torch that
# is installed. Each call does at most nine minutes of work and goes on where the last one ended:
#
#   until bash runs/ar2diff.sh; do :; done                    # all of it; results in results/study/small_*.json
#   MINUTES=5000 SOURCES=FOLDER bash runs/ar2diff.sh          # in one go, with local copies of the real sets
#
# SOURCES: a folder as runs/study.py's sources_of describes it; without it the sets are fetched.
# Status 0: everything is done. Not yet run on a GPU: no figure in results/ comes from here.
set -uo pipefail
cd "$(dirname "$0")/.."
timeout --signal=TERM "$((${MINUTES:-9} * 60 - 20))" \
  python -m eval.tables --scale=small --seeds="${SEEDS:-1}" ${SOURCES:+--sources="$SOURCES"}
