#!/usr/bin/env bash
# Make the two models of the demonstration: checkpoints/ar.pt and checkpoints/diffusion.pt.
# They are the AR model and the adapted diffusion model of quickstart.sh, both fine-tuned on the three
# mini tasks together. Run quickstart.sh first; this takes five minutes on one CPU core. Exact match on
# 400 held-out items of translation, questions and functions: AR 95.5, 93.0, 91.5%; diffusion, 10 steps,
# 98.2, 99.8, 93.8%.
set -euo pipefail
cd "$(dirname "$0")/.."

tune() { # tune SOURCE KIND
  python train.py config/ar2diff_3_finetune.py --data=out/data/mini --max_steps=600 \
    --init_from="out/$1/ckpt.pt" --out_dir="out/demo_$2" --init_from=resume
}
tune ar2diff_1_ar ar
tune ar2diff_2_adapt diffusion

python - <<'END' # the weights, without the state of the optimizer
from infra.checkpoint import load_model, save

for kind in ("ar", "diffusion"):
    model, _, state = load_model(f"out/demo_{kind}/ckpt.pt")
    rest = {"train_config": state["train_config"]}
    save(f"checkpoints/{kind}.pt", model, state["step"], state["tokenizer"], **rest)
END

for kind in ar diffusion; do
  for task in translation qa code; do
    python -m eval.exact_match --init_from="checkpoints/$kind.pt" --data="out/data/mini_$task" --n=400
  done
done
