# The paper's choices at laptop size, stage 1 of 3: AR pretraining.
# The network is the one of config/ar2diff_1_ar.py. The paper does not name its optimizer; AdamW
# replaces Adafactor, the default of T5X. The learning rate and the steps are not tuned.
data = "out/data/mini"
out_dir = "out/paper_1_ar"
n_layer = 3
n_embd = 96
optimizer = "adamw"
learning_rate = 3e-3
max_steps = 1200
schedule = "constant"
