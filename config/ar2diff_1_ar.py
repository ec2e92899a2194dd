# Stage 1 of 3: pretrain an autoregressive model on the three mini tasks mixed.
# Under a minute on one CPU core; held-out loss about 0.08 nats per slot, and less once stage 3 decays the rate.
data = "out/data/mini"
out_dir = "out/ar2diff_1_ar"
n_layer = 3
n_embd = 96
max_steps = 600
schedule = "constant"  # a longer run is then the same run, longer; stage 3 has the decay
