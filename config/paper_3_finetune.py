# The paper's choices, stage 3 of 3: fine-tuning on one task at a constant learning rate.
# The paper samples 10 steps at temperature 0.2 and keeps the best of 8 candidates:
#   python -m eval.exact_match --init_from=out/paper_3_finetune/ckpt.pt --steps=10 \
#       --temperature=0.2 --candidates=8
init_from = "out/paper_2_adapt/ckpt.pt"
data = "out/data/mini_translation"
out_dir = "out/paper_3_finetune"
optimizer = "adamw"
learning_rate = 1e-3
max_steps = 400
schedule = "constant"
