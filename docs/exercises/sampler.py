"""Exercise 1: a sampler that ranks slots by their margin."""


def margin(logits, state, step, cfg, rng, model_cfg):
    """Take one step, as all samplers in diffusion.py do, and return the new SamplerState.

    The margin of a slot is the probability of its most probable token minus that of the second.
    Of the editable slots, the ceil(n_editable * (step + 1) / cfg.steps) with the largest margin get
    their most probable token. The others become noise again:
    sample_noise(rng.uniform(RENOISE, S)[0], model_cfg). Slots that are not editable never change.
    output and scored are the most probable tokens, except at slots that are not editable.
    No row converges.
    """
    raise NotImplementedError
