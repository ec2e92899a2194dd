# The rival: a diffusion model from scratch, on the same data. 300 steps are as many as AR2Diff's adaptation has; going
# on to 600 costs the FLOPs of AR pretraining and adaptation together (an unrolled step costs two AR steps):
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
