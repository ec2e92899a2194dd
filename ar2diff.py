"""AR2Diff: turn an autoregressive model into a text diffusion model (arXiv 2401.17181, section 4.5).

    python ar2diff.py --init_from=out/ar/ckpt.pt --out_dir=out/start --check

The weights stay as they are. What changes is which token sees which, where a slot is predicted, and from here on the
loss. Then train.py goes on from OUT_DIR/ckpt.pt: N steps on the pretraining data (AR2Diff_N; none: AR2Diff_0), and
fine-tuning on the task. This file is the only place that converts.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

import autoregressive
import diffusion
from checkpoint import load_model, save
from configurator import configure, run
from data.loader import build_if_missing, open_set
from data.objectives import Batch
from draws import draws_for
from encdec import build_model
from model import ADDED_BY_CONVERSION, ModelConfig, Transformer


@dataclass
class ConvertConfig:
    """What the diffusion model is to be. The defaults did best on translation (results/README.md, what was tried)."""

    init_from: str = "out/ar2diff_1_ar/ckpt.pt"  # an AR checkpoint
    out_dir: str = "out/ar2diff_start"
    prefix_attention: str = "bidirectional"  # bidirectional | causal: a prefix that is read once | joint (the paper)
    noise: str = "uniform"  # uniform (the paper) | mask
    shift: bool = True  # predict slot i at position i - 1, as the AR weights do; the paper does not say
    lookahead: bool = False  # with shift: let position i - 1 read slot i's own token too
    self_conditioning: bool = True  # not in the paper
    check: bool = False  # run the conversion doctor; a failed line ends with status 1
    data: str = ""  # what the doctor reads; by default the set the AR model was trained on
    overwrite: bool = False
    seed: int = 0


def adapt(source: Transformer, **settings) -> Transformer:
    """The same weights under other settings: a new model; the source is left alone.

    Only layers of ADDED_BY_CONVERSION may be new, and they are zero, so the network computes what it did before where
    it sees the same tokens. Raises ValueError where a setting would need other parameters.
    """
    cfg = replace(source.cfg, **settings)
    model = build_model(cfg).to(source.tok.weight.device)
    weights = source.state_dict()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [name for name in missing if name.split(".")[0] not in ADDED_BY_CONVERSION]
    if missing or unexpected:
        raise ValueError(f"these settings need other parameters: missing {missing}, unexpected {unexpected}")
    return model.eval()


@torch.no_grad()
def check(source: Transformer, model: Transformer, batch: Batch, seed: int = 0) -> list[tuple[str, str, bool]]:
    """The conversion doctor: (claim, what was measured, whether it holds) per line.

    batch: real text that the AR model has not seen. Nothing here depends on luck: the claims hold for any weights,
    except that a trained AR model is expected to be better than guessing.
    """
    prefix, target = batch.prefix, batch.target
    ar_again = _as_source(model, source.cfg)
    before = source(prefix, target)
    difference = (ar_again(prefix, target) - before).abs().max().item()

    new = [n for n, _ in model.named_parameters() if n.split(".")[0] in ADDED_BY_CONVERSION]
    added = sum(model.get_parameter(name).abs().max().item() for name in new)

    logits = model(prefix, target)
    moved = target.clone()
    moved[:, -1] = (moved[:, -1] + 1) % model.cfg.n_ordinary
    future = (model(prefix, moved) - logits)[:, 0].abs().max().item()
    future_before = (source(prefix, moved) - before)[:, :-1].abs().max().item()

    clean, dirty = _spied_prefixes(model, batch, seed)
    guess = math.log(model.cfg.n_ordinary + 1)
    ar_loss = autoregressive.loss(source, batch, None, None).item()
    # Causal attention and clean tokens: the readout that fits the weights is the one that costs what the AR loss does.
    aligned = {shift: _clean_loss(ar_again, batch, shift) for shift in (True, False)}
    draws = draws_for(seed, batch.example)
    rates = diffusion.loss_by_rate(model, batch, diffusion.LossConfig(), draws, [0.0, 0.5, 1.0])
    return [
        ("under the old mask the logits are the source's", f"max difference {difference:.1e}", difference < 1e-4),
        ("new layers are zero", f"{', '.join(new) or 'no new layer'}: largest {added:.1e}", added == 0),
        (
            "the source does not see the future",
            f"a later token moves earlier logits by {future_before:.1e}",
            future_before == 0,
        ),
        ("the converted model does", f"the last token moves the first logits by {future:.1e}", future > 0),
        ("prefix ids are untouched in every pass", f"{dirty} of {clean + dirty} reads changed", clean > 0 == dirty),
        (
            "the readout that fits AR weights is the slot before",
            f"clean loss {aligned[True]:.3f} read at i - 1, {aligned[False]:.3f} at i; AR loss {ar_loss:.3f}",
            abs(aligned[True] - ar_loss) < 1e-3 * max(1.0, ar_loss),
        ),
        ("loss before: AR, nats per slot", f"{ar_loss:.3f} (guessing costs {guess:.3f})", ar_loss < guess),
        (
            f"loss after: L(1) at corruption 0 / 0.5 / 1, shift={model.cfg.shift}",
            " / ".join(f"{value:.3f}" for value in rates.values()),
            all(math.isfinite(value) for value in rates.values()),
        ),
    ]


def _as_source(model: Transformer, cfg: ModelConfig) -> Transformer:
    """The converted weights under the source's settings, without what the conversion added."""
    back = build_model(cfg).to(model.tok.weight.device)
    back.load_state_dict({k: v for k, v in model.state_dict().items() if k.split(".")[0] not in ADDED_BY_CONVERSION})
    return back.eval()


def _clean_loss(model: Transformer, batch: Batch, shift: bool) -> float:
    logits = diffusion.readout(model(batch.prefix, batch.target), shift)
    return F.cross_entropy(logits.flatten(0, 1), batch.target[:, 1:].flatten()).item()


def _spied_prefixes(model: Transformer, batch: Batch, seed: int) -> tuple[int, int]:
    """(reads of the prefix that found it clean, reads that did not) during a two-pass loss and a generation."""
    first, seen, T = Batch(*(part[:2] for part in batch)), [], model.cfg.target_length
    if first.prefix.shape[1] == T:  # reads are told apart by their width: the target, or the prefix with or without it
        first = first._replace(prefix=first.prefix[:, :-1])
    hook = model.tok.register_forward_hook(lambda module, ids, out: seen.append(ids[0]))
    diffusion.loss(model, first, diffusion.LossConfig(), draws_for(seed, first.example))
    diffusion.generate(model, first.prefix, diffusion.SamplerConfig(steps=2, candidates=1), seed)
    hook.remove()
    reads = [ids[:, : first.prefix.shape[1]] for ids in seen if ids.shape[1] != T]
    dirty = sum(not torch.equal(ids, first.prefix) for ids in reads)
    return len(reads) - dirty, dirty


def main(argv: list[str]) -> None:
    """Convert, and check where asked; exits with status 1 where a claim fails."""
    cfg = configure(ConvertConfig, argv)
    source, tokenizer, state = load_model(cfg.init_from)
    if source.cfg.paradigm != "ar":
        raise ValueError(f"{cfg.init_from} is a diffusion model already; --init_from wants an AR checkpoint")
    out = Path(cfg.out_dir) / "ckpt.pt"
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} is there already; name another --out_dir, or say --overwrite")
    settings = {
        k: v for k, v in asdict(cfg).items() if k in ("prefix_attention", "noise", "shift", "self_conditioning")
    }
    settings |= {"paradigm": "diffusion", "target_attention": "bidirectional", "lookahead": cfg.lookahead}
    model = adapt(source, **settings)
    if cfg.check:
        data = cfg.data or state.get("train_config", {}).get("data", "")
        if not data:
            raise ValueError(f"{cfg.init_from} does not say what it was trained on; name a held-out set with --data")
        held_out = open_set(build_if_missing(data), "valid")
        if held_out.tokenizer_name != tokenizer.name:
            raise ValueError(
                f"{data} is made with tokenizer {held_out.tokenizer_name!r}, the model with {tokenizer.name!r}"
            )
        rows = check(source, model, held_out.batch(cfg.seed, 0, 16), cfg.seed)
        for claim, measured, holds in rows:
            print(f"{'ok  ' if holds else 'FAIL'}  {claim:<52} {measured}")
        if not all(holds for *_, holds in rows):
            raise SystemExit(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    train_config = {"data": state.get("train_config", {}).get("data", "")}
    save(
        out, model, 0, tokenizer.name, train_config=train_config, converted_from=f"{cfg.init_from} step {state['step']}"
    )
    new = sum(p.numel() for n, p in model.named_parameters() if n.split(".")[0] in ADDED_BY_CONVERSION)
    print(
        f"{out}: {cfg.init_from} (step {state['step']}) as a diffusion model, {settings}, {new:,} new weights, all zero"
    )


if __name__ == "__main__":
    run(main)
