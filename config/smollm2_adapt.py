# Stage 2 for SmolLM2-135M: general text with the diffusion loss. 60 steps are 0.1M target tokens.
# First the conversion in config/smollm2_squad_0.py, then a stream of your own text:
#   python -m data.text_file --input=TEXT.txt --tokenizer=out/smol_ar/tokenizer.json \
#     --name=text_smollm2 --block_size=256 --target_length=65
init_from = "out/smol_start/ckpt.pt"
data = "out/data/text_smollm2"
out_dir = "out/smollm2_adapt"
optimizer = "adamw"
learning_rate = 1e-4
warmup_steps = 10
max_steps = 60
schedule = "constant"
batch_size = 26
grad_accum_steps = 2
dtype = "auto"
full_noise_prob = 0.5
anneal_steps = 30
eval_interval = 30
eval_batches = 1
sample_interval = 30
save_interval = 30
