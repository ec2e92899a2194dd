# Stage 1 of 3: pretrain an autoregressive model on the three mini tasks mixed.
# About a minute and a half on one CPU core; held-out loss about 0.05 nats per slot.
data = "out/data/mini"
out_dir = "out/ar2diff_1_ar"
n_layer = 3
n_embd = 128
max_steps = 500
