# Self-speculation, 1 of 2: adaptation as in config/ar2diff_2_adapt.py, with the AR loss kept beside the diffusion loss,
# so that the weights go on reading both ways: all slots at once, and from left to right. It starts where that one does:
#   python ar2diff.py --init_from=out/ar2diff_1_ar/ckpt.pt --out_dir=out/ar2diff_start --check
# Two minutes on one CPU core. Held-out: 0.21 nats per slot (diffusion, mean over rates), 0.018 (AR).
init_from = "out/ar2diff_start/ckpt.pt"
data = "out/data/mini"
out_dir = "out/speculative_1_adapt"
max_steps = 300
schedule = "constant"
anneal_steps = 150  # of the diffusion passes only
ar_weight = 1.0
