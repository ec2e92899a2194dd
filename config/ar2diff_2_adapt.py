# Stage 2 of 3: go on from the converted model, as a diffusion model, on the same data: the N steps of AR2Diff_N.
# First convert stage 1:
#   python ar2diff.py --init_from=out/ar2diff_1_ar/ckpt.pt --out_dir=out/ar2diff_start --check
# The attention, the shift and self-conditioning are in that checkpoint already: nothing of the model is set here.
# A minute on one CPU core.
init_from = "out/ar2diff_start/ckpt.pt"
data = "out/data/mini"
out_dir = "out/ar2diff_2_adapt"
max_steps = 300
schedule = "constant"
anneal_steps = 150  # the mask opens edge by edge over the first half; the paper opens it at once
