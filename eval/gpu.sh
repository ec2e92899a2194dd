#!/usr/bin/env bash
# Everything that waits for a GPU. Each part takes under nine minutes and can be repeated.
#
#   bash eval/gpu.sh          # all parts
#   bash eval/gpu.sh cuda     # one of: cuda, speed, mfu, quality
#
# The results are in results/gpu/. It uses the torch that is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p results/gpu out/gpu

cuda() { # CUDA computes what the CPU computes: same random numbers, same greedy texts
  python -m pytest -q tests/test_rng.py tests/test_model.py tests/test_logits.py tests/test_fast_decode.py
  python train.py config/toy_copy_ar.py --device=cuda --out_dir=out/gpu/toy_ar --overwrite
  python train.py config/toy_copy_diffusion.py --device=cuda --compile --dtype=bfloat16 \
    --out_dir=out/gpu/toy --overwrite
  for device in cpu cuda; do
    for run in toy_ar toy; do
      python -m eval.exact_match --init_from=out/gpu/$run/ckpt.pt --device=$device \
        --json=results/gpu/${run}_$device.json
    done
  done
}

speed() { # decoding by length, training step, unrolled step, loop; run again to continue
  timeout 540 python -m eval.speed --device=cuda --json=results/gpu/speed.jsonl || [ $? = 124 ]
  python -m eval.plots --speed=results/gpu/speed.jsonl --out=results/gpu/speed.png
}

mfu() { # tokens per second and MFU of train.py at the size of GPT-2 small, from its log
  python -m data.mini --out=out/gpu/data
  local shape="--data=out/gpu/data/mini --n_layer=12 --n_head=12 --n_embd=768 --batch_size=256"
  local steps="--max_steps=60 --eval_interval=60 --dtype=bfloat16 --overwrite"
  local diffusion="--paradigm=diffusion --prefix_attention=joint --target_attention=bidirectional"
  for compile in false true; do
    python train.py $shape $steps --compile=$compile --out_dir=out/gpu/mfu_ar_$compile
    python train.py $shape $steps $diffusion --self_conditioning --compile=$compile \
      --out_dir=out/gpu/mfu_diffusion_$compile
  done
  for run in out/gpu/mfu_*; do cp "$run/log.jsonl" "results/gpu/$(basename "$run").jsonl"; done
}

quality() { # cost and quality of the quickstart's checkpoints: run quickstart.sh first
  local json=results/gpu/translation
  python -m eval.translation --init_from=out/ar_finetune/ckpt.pt --device=cuda --json=${json}_ar.json
  for steps in 4 10 20 50; do
    python -m eval.translation --init_from=out/ar2diff_3_finetune/ckpt.pt --device=cuda \
      --steps=$steps --json=${json}_$steps.json
  done
}

for part in ${*:-cuda speed mfu quality}; do
  "$part"
done
