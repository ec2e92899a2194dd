# Stage 2 of 3: train the converted model with the diffusion loss on the same data.
# This is the N of AR2Diff_N. First convert the model of stage 1:
#   python ar2diff.py --init_from=out/ar2diff_1_ar/ckpt.pt --out_dir=out/ar2diff_start --check
# The checkpoint already holds the attention masks, the shift and self-conditioning.
# It takes a minute and a half on one CPU core.
init_from = "out/ar2diff_start/ckpt.pt"
data = "out/data/mini"
out_dir = "out/ar2diff_2_adapt"
max_steps = 300
schedule = "constant"
anneal_steps = 150  # the causal mask opens edge by edge; the paper opens it at once
