# Act 2 of the quickstart, stage 1: an AR model of the Python source on this machine (the standard library). A
# demonstration at this length; runs/study.py has the longer form. Half a minute on one CPU core.
data = "out/data/python_code"
out_dir = "out/python_1_ar"
n_layer = 3
n_embd = 96
block_size = 384  # room for the pairs of stage 3: signature and docstring, then the body
batch_size = 16
max_steps = 160
schedule = "constant"
