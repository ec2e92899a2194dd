# Act 2, stage 2: adaptation. First convert:
#   python ar2diff.py --init_from=out/python_1_ar/ckpt.pt --out_dir=out/python_start --check
init_from = "out/python_start/ckpt.pt"
data = "out/data/python_code"
out_dir = "out/python_2_adapt"
batch_size = 16
max_steps = 80
schedule = "constant"
anneal_steps = 40
