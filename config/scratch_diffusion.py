# The baseline: a diffusion model from scratch on the same data, for the N steps of AR2Diff_N.
# An unrolled diffusion step costs two AR steps. So 600 steps cost the FLOPs of AR pretraining and
# adaptation together:
#   python train.py config/scratch_diffusion.py --init_from=resume --max_steps=600
data = "out/data/mini"
out_dir = "out/scratch_diffusion"
paradigm = "diffusion"
prefix_attention = "bidirectional"
target_attention = "bidirectional"
self_conditioning = True
n_layer = 3
n_embd = 96
max_steps = 300
schedule = "constant"
