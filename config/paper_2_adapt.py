# The paper's choices, stage 2 of 3: adaptation with L(1) + L(2) on the pretraining data.
# The conversion sets full attention, no shift and no self-conditioning:
#   python ar2diff.py --init_from=out/paper_1_ar/ckpt.pt --out_dir=out/paper_start --check \
#       --prefix_attention=joint --shift=false --self_conditioning=false
init_from = "out/paper_start/ckpt.pt"
data = "out/data/mini"
out_dir = "out/paper_2_adapt"
optimizer = "adamw"
learning_rate = 3e-3
max_steps = 1000
schedule = "constant"
