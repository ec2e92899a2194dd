"""Exercise 4: settings with which diffusion is cheaper than AR.

Grade it: python -m docs.exercises.grade crossover
"""

from diffusion import SamplerConfig


def settings():
    """Return one SamplerConfig for texts of 16, 64 and 256 tokens.

    Each text must be correct and cost less than AR, which makes S calls at a cost of 1 each.
    The network is a stand-in that sees eight slots further each time. It predicts a slot correctly
    if all slots before it, except the last seven, are correct on the canvas; else it is sure of a
    wrong token. A call over R rows of S slots costs max(1, R S / 64): up to 64 tokens, reading the
    weights dominates; beyond them, the arithmetic.
    """
    return SamplerConfig()
