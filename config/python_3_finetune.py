# Act 2, stage 3: signature and docstring -> body.
init_from = "out/python_2_adapt/ckpt.pt"
data = "out/data/python_pairs"
out_dir = "out/python_3_finetune"
batch_size = 8
max_steps = 60
