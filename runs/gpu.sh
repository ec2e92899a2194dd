#!/usr/bin/env bash
# Every measurement that waits for a GPU, one name each; every one takes under nine minutes and can be repeated.
#
#   bash runs/gpu.sh            # the list
#   bash runs/gpu.sh cuda       # one of them
#
# It uses the torch that is installed. Results land in results/gpu/ with the hardware's name in them.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p results/gpu out/gpu

cuda() { # CUDA agrees with the CPU: same draws, same greedy texts; compiled and bf16 training run and learn
  python -m pytest -q tests/test_draws.py tests/test_model.py tests/test_encdec.py tests/test_cross_entropy.py tests/test_ahead.py
  python train.py config/toy_copy_ar.py --device=cuda --out_dir=out/gpu/toy_ar --overwrite
  python train.py config/toy_copy_diffusion.py --device=cuda --compile --dtype=bfloat16 --out_dir=out/gpu/toy --overwrite
  for device in cpu cuda; do
    python -m eval.exact_match --init_from=out/gpu/toy_ar/ckpt.pt --device=$device --json=results/gpu/toy_ar_$device.json
    python -m eval.exact_match --init_from=out/gpu/toy/ckpt.pt --device=$device --candidates=1 --json=results/gpu/toy_$device.json
  done
}

mfu() { # training speed of GPT-2 small, AR and unrolled diffusion, compiled and not: tokens/s and MFU from the log
  python -m data.mini --out=out/gpu/data # MFU counts FLOPs as cost.py does, against a matmul measured in the same run
  local shape="--data=out/gpu/data/mini --n_layer=12 --n_head=12 --n_embd=768 --batch_size=256 --max_steps=60 --eval_interval=60"
  local diffusion="--paradigm=diffusion --prefix_attention=joint --target_attention=bidirectional --self_conditioning"
  for compile in false true; do
    python train.py $shape --compile=$compile --dtype=bfloat16 --out_dir=out/gpu/mfu_ar_$compile --overwrite
    python train.py $shape $diffusion --compile=$compile --dtype=bfloat16 --out_dir=out/gpu/mfu_diffusion_$compile --overwrite
  done
  for run in out/gpu/mfu_*; do cp "$run/log.jsonl" "results/gpu/$(basename "$run").jsonl"; done
}

decode() { # decode speed, 64 to 4,096 tokens, batch 1, 8 and 32: a part of it; repeat until nothing is left
  python -m eval.speed --device=cuda --minutes=4 --out=results/gpu/speed_decode.json
}

quality() { # the same of the quickstart's two checkpoints (bash quickstart.sh), quality beside speed
  python -m eval.speed --device=cuda --init_from=out/ar2diff_3_finetune/ckpt.pt --ar_from=out/ar_finetune/ckpt.pt \
    --task=translation --out=results/gpu/speed_quality.json
}

study() { # nine minutes of the three tables at small scale; repeat until the status is 0
  bash runs/ar2diff.sh
}

pair() { # the pair of pair/, trained five times as long; repeat until the status is 0
  timeout 530 python -m runs.pair --scale=5 --device=cuda --dtype=bfloat16 --out=out/gpu/pair --kept=out/gpu/pair/kept \
    --results=results/gpu/pair
}

if [ $# -eq 0 ]; then
  grep -E '^[a-z]+\(\) \{' "$0"
else
  "$1"
fi
