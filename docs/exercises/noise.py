"""Exercise 2: noise that looks like text."""


def unigram_noise(uniform, counts, model_cfg):
    """Map numbers in [0, 1), uniform (B, T), to noise tokens in proportion to counts.

    counts (n_ordinary + 1,): how often each ordinary token occurs in the data; the last entry is
    for pad. A token that never occurs is never drawn, and pad is the only reserved id that may be.
    It could replace sample_noise in diffusion.py, which gives all tokens the same probability.
    """
    raise NotImplementedError
