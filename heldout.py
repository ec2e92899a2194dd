"""What is seen of a run while it trains: its loss on held-out text, and a sample.

Looking changes nothing: the same examples, the same noise and no random state every time.
"""

import torch

import autoregressive
import diffusion
from data.tokenizer import get_tokenizer
from device import autocast
from draws import draws_for

RATES = [0.1, 0.3, 0.5, 0.7, 0.9]  # corruption rates of the held-out loss


@torch.no_grad()
def evaluate(model, valid_set, cfg, world) -> dict:
    """Held-out loss, nats per slot: the AR loss, or the mean of L(1) over fixed corruption rates, and each of them.
    val_ar_loss: beside it, where ar_weight keeps that loss.

    The same examples and the same noise every time, so that points of one curve and of two runs compare. Each process
    of a world takes its slice of every batch.
    """
    model.eval()
    device, found = model.tok.weight.device, {}
    for step in range(cfg.eval_batches):
        batch = valid_set.batch(0, step, cfg.batch_size, world.rows(cfg.batch_size, 1, 0))
        batch = type(batch)(*(part.to(device) for part in batch))
        draws = draws_for(0, batch.example, step)
        with autocast(device, cfg.dtype):
            if cfg.paradigm == "ar":
                terms = {"val_loss": float(autoregressive.loss(model, batch, cfg, draws))}
            else:
                terms = diffusion.loss_by_rate(model, batch, cfg, draws, RATES)
                if cfg.ar_weight:
                    terms["ar"] = float(diffusion.causal_loss(model, batch))
        for name, value in terms.items():
            found[name] = found.get(name, 0.0) + value / cfg.eval_batches
    found = world.mean(found)
    if cfg.paradigm == "ar":
        return found
    ar = {"val_ar_loss": found.pop("ar")} if cfg.ar_weight else {}
    return {"val_loss": sum(found.values()) / len(found), "val_loss_by_rate": found} | ar


def sample_line(model, paradigm, valid_set, step: int) -> str:
    """One held-out prefix and what the model makes of it. paradigm: the module autoregressive or diffusion."""
    model.eval()
    tokenizer = get_tokenizer(valid_set.tokenizer_name)
    prefix = valid_set.batch(0, 0, 8).prefix[:1].to(model.tok.weight.device)
    tokens = paradigm.generate(model, prefix, paradigm.SamplerConfig()).tokens[0].tolist()
    tokens = tokens[: tokens.index(tokenizer.pad_id)] if tokenizer.pad_id in tokens else tokens
    return f"step {step} sample: {tokenizer.decode(prefix[0].tolist())!r} -> {tokenizer.decode(tokens)!r}"
