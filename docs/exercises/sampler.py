"""Exercise 1: a sampler that trusts a slot by its margin. Grade it: python -m docs.exercises.grade sampler"""


def margin(logits, state, step, cfg, draws, m):
    """One step, with the signature of all samplers (samplers.py); returns the State after it.

    The margin of a slot is the probability of its likeliest token less that of the second. Of the free slots the
    ceil(free * (step + 1) / cfg.steps) of largest margin keep their likeliest token; the others become noise again:
    noise_tokens(draws.uniform(RENOISE, S)[0], m). Given slots stay. answer and judged are the likeliest tokens, the
    given ones in their places. No row settles.
    """
    raise NotImplementedError
