# Stage 3 of 3: fine-tune on one task, still with the diffusion loss. A minute on one CPU core.
# The AR baseline uses this file with another start:
#   --init_from=out/ar2diff_1_ar/ckpt.pt --out_dir=out/ar_finetune
init_from = "out/ar2diff_2_adapt/ckpt.pt"
data = "out/data/mini_translation"
out_dir = "out/ar2diff_3_finetune"
max_steps = 200
