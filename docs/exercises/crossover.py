"""Exercise 4: settings by which diffusion is cheaper than AR. Grade it: python -m docs.exercises.grade crossover"""

from samplers import SamplerConfig


def settings():
    """One SamplerConfig for texts of 16, 64 and 256 tokens: each must come out right, for less than AR pays.

    The network is a stand-in that sees eight slots further each time: it says a slot right when all slots but the
    last seven before it stand right on the canvas, and is sure of something wrong otherwise. A call over R rows of S
    slots costs max(1, R S / 64): up to 64 tokens at once nothing but reading the weights, beyond them the computing.
    AR makes S calls at 1 each.
    """
    return SamplerConfig()
