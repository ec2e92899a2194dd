# The same task, all letters at once: the smallest test of the diffusion half, without an AR model.
# Under a minute on one CPU core; all of 500 held-out strings are exact, in 10 network calls.
#   python train.py config/toy_copy_diffusion.py
#   python -m eval.exact_match --init_from=out/toy_copy_diffusion/ckpt.pt
data = "out/data/toy_copy"
out_dir = "out/toy_copy_diffusion"
paradigm = "diffusion"
prefix_attention = "joint"
target_attention = "bidirectional"
self_conditioning = True
n_layer = 2
n_embd = 64
max_steps = 1000
