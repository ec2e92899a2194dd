"""Exercise 2: noise that looks like text. Grade it: python -m docs.exercises.grade noise"""


def unigram_noise(uniform, counts, m):
    """A noise token for each number of uniform (B, T) in [0, 1), as often as counts say.

    counts (m.n_ordinary + 1,): how often each ordinary token stands in the data, and at the end how often pad does.
    What never stands there is never drawn, and no reserved id but m.pad_id is. It has the place of noise_tokens in
    draws.py, for which all tokens are alike.
    """
    raise NotImplementedError
