# Self-speculation, 2 of 2: fine-tuning on one task. A minute and a quarter on one CPU core; held-out 0.087 nats a slot
# (diffusion) and 0.0011 (AR). The same weights are then decoded in three ways:
#   python -m eval.exact_match --init_from=out/speculative_2_finetune/ckpt.pt --n=200 --sampler=ar
#   python -m eval.exact_match --init_from=out/speculative_2_finetune/ckpt.pt --n=200 --sampler=speculative
#   python -m eval.exact_match --init_from=out/speculative_2_finetune/ckpt.pt --n=200 --temperature=0 --candidates=1
# To expect (200 held-out items, pretraining with seed 1): 97.5% exact left to right, in 25.0 network calls a text;
# the same 200 texts by speculation in 3.7 calls, 6.7 slots a call (4.6 with --draft_steps=1, 4.2 with 3); 98.0% by
# diffusion in up to 10 steps, 3.4 calls. Each of those calls reads all slots and AR's one, so calls are not time: one
# text at a time speculation takes half of AR's (12 ms against 23 ms on one core), 64 at a time as long (4.3 ms).
# Both files with --ar_weight=0: the same diffusion decoding gets 99.0% of them, AR decoding 42.5%, and speculation
# takes 11.9 calls a text. One run each.
init_from = "out/speculative_1_adapt/ckpt.pt"
data = "out/data/mini_translation"
out_dir = "out/speculative_2_finetune"
max_steps = 200
ar_weight = 1.0
