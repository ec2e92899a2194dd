#!/usr/bin/env bash
# Everything that waits for a GPU. Each part takes under nine minutes and can be repeated.
#
#   bash eval/gpu.sh          # all parts
#   bash eval/gpu.sh cuda     # or: cuda, speed
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p results/gpu

cuda() { # CUDA computes what the CPU computes: same random numbers, same greedy texts
  python -m pytest -q tests/test_rng.py tests/test_model.py tests/test_logits.py tests/test_fast_decode.py
  for kind in ar diffusion; do
    python train.py config/toy_copy_$kind.py --device=cuda --out_dir=out/gpu/$kind --overwrite
    for device in cpu cuda; do
      python -m eval.exact_match --init_from=out/gpu/$kind/ckpt.pt --device=$device \
        --json=results/gpu/${kind}_$device.json
    done
  done
}

speed() { # decoding by length, training step, unrolled step, loop; run again to continue
  timeout 540 python -m eval.speed --device=cuda --lengths=64,256,1024,4096 \
    --json=results/gpu/speed.jsonl || [ $? = 124 ]
}

for part in ${*:-cuda speed}; do
  "$part"
done
