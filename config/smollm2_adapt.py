# Stage 2 for SmolLM2-135M: general text with the diffusion loss. 33 steps are 0.1M target tokens.
# First the conversion in config/smollm2_squad_0.py, then a stream of your own text:
#   python -m data.text_file --input=TEXT.txt --tokenizer=out/smol_ar/tokenizer.json \
#     --name=text_smollm2 --target_length=193
init_from = "out/smol_start/ckpt.pt"
data = "out/data/text_smollm2"
out_dir = "out/smollm2_adapt"
optimizer = "adamw"
learning_rate = 1e-4
warmup_steps = 10
max_steps = 33
schedule = "constant"
batch_size = 16
grad_accum_steps = 8
dtype = "auto"
full_noise_prob = 0.5  # few steps need practice with pure noise
anneal_steps = 16
eval_interval = 33
eval_batches = 1
sample_interval = 33
save_interval = 33
