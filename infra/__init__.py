"""What any trainer needs: random numbers, checkpoints, run folder, processes, optimizers, device, FLOPs.

The core, data/, eval/ and extras/ import it. It imports model.py, configurator.py and data/tokenizer.py only.
"""
