"""AR2Diff: convert an AR model into a text diffusion model (arXiv 2401.17181).

    python ar2diff.py --init_from=out/ar/ckpt.pt --out_dir=out/start --check
    python ar2diff.py --init_from=Qwen/Qwen2.5-0.5B --out_dir=out/qwen --check
    python ar2diff.py --init_from=out/qwen/ckpt.pt --export=out/qwen_hf  # and back

The weights stay. The mask, the predicting position and the loss change. train.py
continues from ckpt.pt: N steps (AR2Diff_N), then fine-tuning.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import autoregressive
import diffusion
from configurator import configure, needs, require, run, setting, validate
from data.loader import build_if_missing, open_dataset
from data.objectives import Batch
from data.tokenizer import Tokenizer
from infra.checkpoint import load_model, save
from infra.rng import EDGES, make_rng
from model import NEW_MODULES, PREFIXES, Transformer, model_from_state_dict


@dataclass
class ConvertConfig:
    """What to convert, and into what."""

    init_from: str = setting("out/ar2diff_1_ar/ckpt.pt", "or folder, hub, .gguf", path=True)
    out_dir: str = setting("out/ar2diff_start", "folder of ckpt.pt", path=True)
    paradigm: str = setting("diffusion", "ar: import only", ("diffusion", "ar"))
    export: str = setting("", "write a Hugging Face folder", path=True)
    block_size: int = setting(0, "of imports; 0: at most 4,096")
    target_length: int = setting(0, "of imports; 0: at most 128")
    prefix_attention: str = setting("bidirectional", "paper: joint", PREFIXES)
    noise: str = setting("uniform", "paper: uniform", ("uniform", "mask"))
    shift: bool = setting(True, "position i - 1 predicts slot i")
    self_conditioning: bool = setting(True, "not in the paper")
    check: bool = setting(False, "verify; status 1 if it fails")
    data: str = setting("", "for --check; default: the model's", path=True)
    prompt: str = setting("", "for --check of imports")
    overwrite: bool = setting(False, "replace a checkpoint")
    seed: int = setting(0, "of --check")

    __post_init__ = validate


class Check(NamedTuple):
    """A claim, what was measured, whether it holds."""

    claim: str
    measured: str
    ok: bool


def convert(source: Transformer, copy: bool = True, **settings) -> Transformer:
    """Return a model with the weights of source and other settings."""
    weights = source.state_dict()
    if copy:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    return model_from_state_dict(replace(source.cfg, **settings), weights)


def new_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the weights that AR models do not have."""
    weights = model.state_dict().items()
    return {name: w for name, w in weights if name.startswith(NEW_MODULES)}


def open_edges(batch, step: int, seed: int, steps: int, joint: bool) -> Tensor:
    """Return random open edges (T, T), more each step (arXiv 2410.17891)."""
    P = batch.prefix.shape[1] if joint else 0
    T = batch.target.shape[1]
    # The target comes first: its edges do not depend on the prefix length.
    row = torch.arange(P + T, device=batch.target.device).roll(P)
    uniform, _ = make_rng(seed, row, step).uniform(EDGES, P + T)
    return uniform[:, row] < (step + 1) / steps


@torch.no_grad()
def verify(source, model, batch, seed=0, knows_text=True) -> list[Check]:
    """Compare model and source. knows_text: the source beats guessing."""
    weights = model.state_dict()
    new = new_weights(model)
    old = {name: weights[name] for name in weights.keys() - new.keys()}
    as_source = model_from_state_dict(source.cfg, old)
    texts = (batch.prefix, batch.target)
    error = (as_source(*texts) - source(*texts)).abs().max().item()
    largest = max((w.abs().max().item() for w in new.values()), default=0.0)
    ar_loss = autoregressive.loss(source, batch, None, None).item()
    guess = math.log(model.cfg.n_ordinary + 1)
    before = f"{ar_loss:.3f} (guessing: {guess:.3f})"
    knows = ar_loss < guess
    if not knows:
        before += ": random weights, or ids of another tokenizer"
    equal = "with the causal mask the logits equal the source's"
    names = ", ".join(new) or "none"
    return [
        Check(equal, f"largest difference {error:.1e}", error < 1e-4),
        Check("new layers are zero", f"{names}: {largest:.1e}", largest == 0),
        check_future(source, batch, sees=False),
        check_future(model, batch, sees=True),
        check_prefix(model, batch, seed),
        check_alignment(as_source, batch, ar_loss),
        Check("AR loss before, nats per slot", before, knows or not knows_text),
        check_loss_after(model, batch, seed),
    ]


def check_future(model, batch, sees: bool) -> Check:
    """Change the last token. Do earlier logits change?"""
    changed = batch.target.clone()
    changed[:, -1] = (changed[:, -1] + 1) % model.cfg.n_ordinary
    difference = model(batch.prefix, changed) - model(batch.prefix, batch.target)
    earlier = difference[:, :1] if sees else difference[:, :-1]
    effect = earlier.abs().max().item()
    claim = "the converted model sees" if sees else "the source does not see"
    measured = f"the last token changes earlier logits by {effect:.1e}"
    return Check(f"{claim} later tokens", measured, (effect > 0) == sees)


def check_prefix(model, batch, seed: int) -> Check:
    """Training and generation read the prefix as it is."""
    T = model.cfg.target_length
    # Shorter than a target: reads are told apart by their width.
    prefix = batch.prefix[:2, : T - 1]
    first = Batch(prefix, batch.target[:2], batch.example[:2])
    seen = []
    hook = model.tok.register_forward_hook(lambda _, ids, out: seen.append(ids[0]))
    rng = make_rng(seed, first.example)
    diffusion.loss(model, first, diffusion.LossConfig(), rng)
    prompt = prefix
    if model.cfg.sep_id < 0:
        prompt = torch.cat([prefix, first.target[:, :1]], dim=1)
    diffusion.generate(model, prompt, diffusion.SamplerConfig(steps=2), seed)
    hook.remove()
    reads = [ids[:, : prefix.shape[1]] for ids in seen if ids.shape[1] != T]
    changed = sum(not torch.equal(ids, prefix) for ids in reads)
    measured = f"{changed} of {len(reads)} reads changed"
    ok = bool(reads) and changed == 0
    return Check("the prefix is never corrupted", measured, ok)


def check_alignment(as_source, batch, ar_loss: float) -> Check:
    """Clean tokens, aligned as in diffusion, give the AR loss."""
    logits = as_source(batch.prefix, batch.target)
    losses = []
    for shift in (True, False):
        aligned = diffusion.align_logits(logits, shift)
        losses.append(F.cross_entropy(aligned.mT, batch.target[:, 1:]).item())
    before, same = losses
    measured = f"loss {before:.3f} at i - 1, {same:.3f} at i; AR {ar_loss:.3f}"
    ok = abs(before - ar_loss) < 1e-3 * max(1.0, ar_loss)
    return Check("position i - 1 predicts slot i", measured, ok)


def check_loss_after(model, batch, seed: int) -> Check:
    """The diffusion loss before adaptation: high, but finite."""
    rng = make_rng(seed, batch.example)
    losses = diffusion.loss_by_rate(model, batch, rng, (0.0, 0.5, 1.0))
    claim = f"L(1) after, at corruption 0 / 0.5 / 1, shift={model.cfg.shift}"
    measured = " / ".join(f"{value:.3f}" for value in losses.values())
    return Check(claim, measured, all(map(math.isfinite, losses.values())))


class Source(NamedTuple):
    """An AR model, and where it is from."""

    model: Transformer
    tokenizer: Tokenizer
    data: str  # what it was trained on
    origin: str
    path: Path | None  # folder or GGUF file; None: a checkpoint


def main(argv: list[str]) -> None:
    """Convert, import or export. Nothing is written if a check fails."""
    cfg = configure(ConvertConfig, argv)
    if cfg.export:
        from hf.convert import export

        return export(cfg.init_from, Path(cfg.export), cfg.overwrite)
    out = Path(cfg.out_dir) / "ckpt.pt"
    free = cfg.overwrite or not out.exists()
    require(free, f"{out} exists; use another --out_dir, or --overwrite")
    foreign = (out.parent / "config.json").exists()
    require(not foreign, f"{out.parent} is a Hugging Face folder, not for ckpt.pt")
    source = open_source(cfg)
    names = ("prefix_attention", "noise", "shift", "self_conditioning")
    settings = {name: getattr(cfg, name) for name in names}
    settings |= {"paradigm": "diffusion", "target_attention": "bidirectional"}
    # With shared tensors, --check would compare the model with itself.
    model = source.model
    if cfg.paradigm == "diffusion":
        model = convert(source.model, copy=cfg.check, **settings)
    if cfg.check:
        report(source, model, cfg)
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"train_config": {"data": source.data}, "converted_from": source.origin}
    save(out, model, 0, source.tokenizer.name, **facts)
    if model is source.model:
        print(f"{out}: {source.origin} as an AR model, not converted")
        return
    new = sum(w.numel() for w in new_weights(model).values())
    flags = " ".join(f"--{name}={value}" for name, value in settings.items())
    print(f"{out}: {source.origin} as a diffusion model, {flags} | {new:,} new weights")


def open_source(cfg: ConvertConfig) -> Source:
    """Load an AR model: a checkpoint, or what hf/ reads."""
    path = cfg.init_from
    if Path(path).suffix != ".pt":
        from hf.convert import import_source

        return Source(*import_source(path, cfg.block_size, cfg.target_length))
    model, tokenizer, state = load_model(path)
    is_ar = model.cfg.paradigm == "ar"
    require(is_ar, f"{path} is a diffusion model; --init_from needs an AR model")
    given = cfg.block_size or cfg.target_length or cfg.prompt
    flags = "--block_size, --target_length, --prompt and --paradigm=ar"
    given = given or cfg.paradigm == "ar"
    require(not given, f"{path} is a checkpoint; {flags} are for imports")
    data = str(state.get("train_config", {}).get("data", ""))
    return Source(model, tokenizer, data, f"{path} step {state['step']}", None)


def report(source: Source, model: Transformer, cfg: ConvertConfig) -> None:
    """Print all checks. Exit with status 1 if one fails."""
    from view.samples import print_checks

    batch = check_batch(source, cfg)
    checks = []
    if source.path is not None:
        from hf.load import parity

        checks += parity(source.path, source.model, batch.target[:, 1:])
    if model is not source.model:
        knows_text = source.path is None
        models = (source.model.float(), model.float())
        checks += verify(*models, batch, cfg.seed, knows_text)
    if not print_checks(checks):
        raise SystemExit(1)


def check_batch(source: Source, cfg: ConvertConfig) -> Batch:
    """Return held-out data or, for imported weights, a paragraph."""
    data = cfg.data or source.data
    model_cfg = source.model.cfg
    if not data and source.path is not None:
        from hf.convert import text_batch

        return text_batch(cfg.prompt, source.tokenizer, model_cfg)
    require(data, f"{cfg.init_from} does not name its data; give it with --data")
    valid_set = open_dataset(build_if_missing(data), "valid")
    facts = {"data": data, "tokenizer": valid_set.tokenizer_name}
    facts["target_length"] = valid_set.target_length
    T = model_cfg.target_length
    needs(facts, f"data={data}", tokenizer=source.tokenizer.name, target_length=T)
    return valid_set.batch(cfg.seed, 0, 16)


if __name__ == "__main__":
    run(main, ConvertConfig)
