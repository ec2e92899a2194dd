# AR2Diff_N: as config/smollm2_squad_0.py, after the adaptation of config/smollm2_adapt.py.
init_from = "out/smollm2_adapt/ckpt.pt"
data = "out/data/squad_smollm2"
out_dir = "out/smollm2_squad_n"
optimizer = "adamw"
learning_rate = 1e-4
warmup_steps = 10
max_steps = 240
batch_size = 16
grad_accum_steps = 8
dtype = "auto"
eval_interval = 60
eval_batches = 1
sample_interval = 60
save_interval = 60
full_noise_prob = 0.5  # few steps need practice with pure noise
