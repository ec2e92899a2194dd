"""What any trainer needs: random numbers, checkpoints, processes, optimizers, device, FLOPs.

Everything may import it. It imports only model.py, configurator.py and data/tokenizer.py.
"""
