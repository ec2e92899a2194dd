# Self-speculation, 2 of 2: fine-tuning on one task. A minute and a quarter on one CPU core.
# Held-out loss: 0.087 nats per position (diffusion), 0.0011 (AR).
# The same weights decode in three ways, by --sampler=ar, --sampler=speculative or --temperature=0:
#   python -m eval.exact_match --init_from=out/speculative_2_finetune/ckpt.pt --n=200 --sampler=ar
# Expect, on 200 held-out items after pretraining with seed 1 (one run):
#   ar            97.5% exact match, 25.0 network calls a text
#   speculative   the same 200 texts, 3.7 calls, 6.7 positions a call
#   diffusion     98.0%, 3.4 calls
# With --ar_loss_weight=0 in both files diffusion reaches 99.0%, but AR only 42.5%.
init_from = "out/speculative_1_adapt/ckpt.pt"
data = "out/data/mini_translation"
out_dir = "out/speculative_2_finetune"
max_steps = 200
ar_loss_weight = 1.0
