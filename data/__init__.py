"""Data: text to ids (tokenizer.py), training pairs (objectives.py), files and batches (loader.py).

bpe.py trains a vocabulary. The other modules build data sets, one each: mini, toy, python_code and
text_file from what is on this machine; squad, mbpp and parallel from downloads (sources.py).

Everybody may import this package. The core imports loader, objectives and tokenizer only. It
imports configurator and infra; hf/ only inside a function, for tokenizers of other people.
"""
