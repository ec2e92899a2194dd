#!/usr/bin/env bash
# The whole story on a laptop: train an AR model, convert it, adapt it, fine-tune it, and compare it
# with diffusion models from scratch. 6 minutes on 2 CPU cores after the install.
#
#   bash quickstart.sh    # table and pictures appear in out/; run it again to resume
#
# Two trainings run side by side with one thread each: a small model is faster so.
set -euo pipefail
cd "$(dirname "$0")"
begin=$SECONDS

# 1. Install. Skipped if the packages are there.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -d .venv ] || python3 -m venv .venv
  source .venv/bin/activate
fi
python -c "import torch, numpy, tiktoken, tqdm, matplotlib" 2>/dev/null ||
  python -m pip install -q -r requirements-dev.txt

mkdir -p out/logs out/quickstart
run() { # run NAME COMMAND: print the command, write its output to out/logs/NAME.log
  echo "$((SECONDS - begin)) s  \$ ${*:2}"
  "${@:2}" >"out/logs/$1.log" 2>&1 || { echo "FAILED, see out/logs/$1.log"; exit 1; }
}
train() { # train NAME CONFIG FLAGS: the first call starts out/NAME, a later one resumes it
  run "$1" python train.py "config/$2.py" --out_dir="out/$1" "${@:3}" --init_from=resume
}
judge() { # judge NAME ITEMS SUFFIX FLAGS: exact match on held-out items
  local json="out/quickstart/$1$3.json"
  [ -s "$json" ] || run "judge_$1$3" python -m eval.exact_match \
    --init_from="out/$1/ckpt.pt" --n="$2" --json="$json" "${@:4}"
}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

# 2. Data: three generated tasks (translation of numbers, questions, small functions).
[ -e out/data/mini/meta.json ] || run data python -m data.mini

# 3. Train. On one core: AR, conversion, adaptation, fine-tuning. On the other: the baselines.
ar2diff() {
  train ar2diff_1_ar ar2diff_1_ar
  [ -e out/ar2diff_start/ckpt.pt ] || run convert python ar2diff.py \
    --init_from=out/ar2diff_1_ar/ckpt.pt --out_dir=out/ar2diff_start --check
  train ar2diff_2_adapt ar2diff_2_adapt
  train ar2diff_3_finetune ar2diff_3_finetune
  train zero_finetune ar2diff_3_finetune --init_from=out/ar2diff_start/ckpt.pt
  judge ar2diff_3_finetune 528 "" --steps=10
  judge zero_finetune 528 "" --steps=10
  for steps in 1 2 4 20; do judge ar2diff_3_finetune 200 "_$steps" --steps=$steps; done
}
baselines() {
  train scratch_diffusion scratch_diffusion
  train scratch_finetune ar2diff_3_finetune --init_from=out/scratch_diffusion/ckpt.pt
  [ -e out/scratch_longer/ckpt.pt ] || cp -r out/scratch_diffusion out/scratch_longer
  train scratch_longer scratch_diffusion --max_steps=600
  train longer_finetune ar2diff_3_finetune --init_from=out/scratch_longer/ckpt.pt
  train ar_finetune ar2diff_3_finetune --init_from=out/ar2diff_1_ar/ckpt.pt
  judge ar_finetune 528 ""
  judge scratch_finetune 528 "" --steps=10
  judge longer_finetune 528 "" --steps=10
  for steps in 1 2 4 20; do judge longer_finetune 200 "_$steps" --steps=$steps; done
}
ar2diff & first=$!
baselines & second=$!
failed=0
wait $first || failed=1
wait $second || failed=1
[ $failed = 0 ] || exit 1

# 4. The table, and pictures of the losses and of one canvas.
run tables python -m eval.tables --quickstart
run plots python -m eval.plots out/ar2diff_1_ar out/ar2diff_2_adapt out/ar2diff_3_finetune --out=out/loss.png
run canvas python -m eval.plots --canvas=out/ar2diff_3_finetune/ckpt.pt \
  --prompt="fr nine hundred eighty-one" --out=out/canvas.svg
python sample.py --init_from=out/ar2diff_3_finetune/ckpt.pt --prompt="fr nine hundred eighty-one" --show --pause=0.05
echo
cat out/quickstart.md
echo "$((SECONDS - begin)) s. Table: out/quickstart.md. Pictures: out/loss.png, out/canvas.svg"
