# Stage 1 of 3: pretrain an autoregressive model on the mixture of the three mini tasks.
# It takes a minute and a half on one CPU core. Held-out loss: about 0.06 nats per position.
data = "out/data/mini"
out_dir = "out/ar2diff_1_ar"
n_layer = 3
n_embd = 96
max_steps = 600
schedule = "constant"  # with a constant rate a longer run begins with the same steps
