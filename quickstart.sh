#!/usr/bin/env bash
# The whole story on a laptop, with nothing to download but the Python packages: an AR model is trained, converted,
# adapted and fine-tuned, beside diffusion models from scratch. 8 to 15 minutes on 2 CPU cores after the install.
#
#   bash quickstart.sh           # tables and pictures appear in out/; run it again and it goes on where it was
#   ACTS=1 bash quickstart.sh   # only the first act
#
# Two trainings run side by side, one core each: at this size that is faster than one training on two cores.
set -euo pipefail
cd "$(dirname "$0")"
ACTS=${ACTS:-12}   # which acts to play: 1, 2 or 12

if [ -z "${VIRTUAL_ENV:-}" ]; then
  echo "making a virtual environment in .venv"
  [ -d .venv ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -c "import torch, numpy, tiktoken, tqdm, safetensors, matplotlib, sacrebleu" 2>/dev/null || python -m pip install -q -r requirements-dev.txt
exec python -m runs.quickstart --acts="$ACTS"
