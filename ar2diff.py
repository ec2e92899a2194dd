"""AR2Diff: turn an autoregressive model into a text diffusion model (arXiv 2401.17181, section 4.5).

    python ar2diff.py --init_from=out/ar/ckpt.pt --out_dir=out/start --check
    python ar2diff.py --init_from=Qwen/Qwen2.5-0.5B --out_dir=out/qwen --check   # or a folder: see pretrained.py
    python ar2diff.py --init_from=out/qwen/ckpt.pt --export=out/qwen_hf          # and back

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
import pretrained
from checkpoint import load, load_model, save
from configurator import configure, run
from data.loader import build_if_missing, open_set
from data.objectives import Batch
from data.tokenizer import Tokenizer, get_tokenizer
from draws import draws_for
from encdec import assemble
from model import ADDED_BY_CONVERSION, ModelConfig, Transformer

# What the doctor reads of foreign weights, where no text is given.
TEXT = (
    "The harbour was quiet in the early morning. Two boats lay at the quay, and on one of them a man in a blue coat "
    "was mending a net. He did not look up when the bell of the old church began to ring. Later, he said, there would "
    "be wind from the west, and by noon all the boats would be back. The children knew it too; they had already gone "
    "down to the beach with baskets, to wait for the fish and to hear the news from the other side of the bay. "
)


@dataclass
class ConvertConfig:
    """What the diffusion model is to be. The defaults did best on translation (results/README.md, what was tried)."""

    init_from: str = "out/ar2diff_1_ar/ckpt.pt"  # an AR checkpoint, a Hugging Face folder or a hub name, org/name
    out_dir: str = "out/ar2diff_start"
    paradigm: str = "diffusion"  # diffusion | ar: only import foreign weights, to be read left to right as before
    export: str = ""  # instead: write the weights of init_from, a checkpoint, as a Hugging Face folder with this name
    block_size: int = 0  # foreign weights: prefix and target, tokens; 0: what they can read, at most 4,096
    target_length: int = 0  # foreign weights: slots of a target; 0: half of block_size, at most 128
    prefix_attention: str = "bidirectional"  # bidirectional | causal: a prefix that is read once | joint (the paper)
    noise: str = "uniform"  # uniform (the paper) | mask
    shift: bool = True  # predict slot i at position i - 1, as the AR weights do; the paper does not say
    lookahead: bool = False  # with shift: let position i - 1 read slot i's own token too
    self_conditioning: bool = True  # not in the paper
    check: bool = False  # run the conversion doctor; a failed line ends with status 1
    data: str = ""  # what the doctor reads; by default the set the AR model was trained on, for foreign weights ..
    prompt: str = ""  # .. this text; by default a paragraph of our own
    overwrite: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.paradigm not in ("diffusion", "ar"):
            raise ValueError(f"paradigm must be diffusion or ar, got {self.paradigm!r}")


def adapt(source: Transformer, copy: bool = True, **settings) -> Transformer:
    """The same weights under other settings: a new model; the source is left alone. copy=False: around its tensors.

    Only layers of ADDED_BY_CONVERSION may be new, and they are zero, so the network computes what it did before where
    it sees the same tokens. Raises ValueError where a setting would need other parameters.
    """
    weights = source.state_dict()
    if copy:
        weights = {name: tensor.clone() for name, tensor in weights.items()}
    return assemble(replace(source.cfg, **settings), weights)


@torch.no_grad()
def check(
    source: Transformer, model: Transformer, batch: Batch, seed: int = 0, knows_text: bool = True
) -> list[tuple[str, str, bool]]:
    """The conversion doctor: (claim, what was measured, whether it holds) per line.

    batch: real text that the AR model has not seen. Nothing here depends on luck: the claims hold for any weights,
    except that a trained AR model is expected to be better than guessing, where it is known to know such text.
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
        (
            "loss before: AR, nats per slot",
            f"{ar_loss:.3f} (guessing costs {guess:.3f}"
            + (")" if ar_loss < guess else ", less: random weights, or ids of another tokenizer)"),
            ar_loss < guess or not knows_text,
        ),
        (
            f"loss after: L(1) at corruption 0 / 0.5 / 1, shift={model.cfg.shift}",
            " / ".join(f"{value:.3f}" for value in rates.values()),
            all(math.isfinite(value) for value in rates.values()),
        ),
    ]


def _as_source(model: Transformer, cfg: ModelConfig) -> Transformer:
    """The converted weights under the source's settings, without what the conversion added."""
    return assemble(cfg, {k: v for k, v in model.state_dict().items() if k.split(".")[0] not in ADDED_BY_CONVERSION})


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


def text_batch(text: str, tokenizer: Tokenizer, m: ModelConfig) -> Batch:
    """Two rows of a text, from its start and from its middle, over and over until no slot of a target is pad."""
    ids, P, T = tokenizer.encode(text), min(32, m.block_size - m.target_length), m.target_length
    if not ids:
        raise ValueError("the doctor needs a text; --prompt is empty")
    rows = torch.tensor([(ids[start:] + ids * (P + T))[: P + T - 1] for start in (0, len(ids) // 2)])
    target = torch.cat([torch.full((2, 1), m.sep_id), rows[:, P:]], dim=1)
    return Batch(rows[:, :P], target, torch.arange(2))


def main(argv: list[str]) -> None:
    """Convert, and check where asked; exits with status 1 where a claim fails."""
    cfg = configure(ConvertConfig, argv)
    folder = pretrained.folder_of(cfg.init_from)
    if cfg.export:
        return export(cfg, folder)
    out = Path(cfg.out_dir) / "ckpt.pt"
    if out.exists() and not cfg.overwrite:
        raise ValueError(f"{out} is there already; name another --out_dir, or say --overwrite")
    if (out.parent / "config.json").exists():
        raise ValueError(f"{out.parent} is a Hugging Face folder, which is left as it is; name another --out_dir")
    source, tokenizer, data, origin = foreign(cfg, folder) if folder else own(cfg)
    names = ("prefix_attention", "noise", "shift", "lookahead", "self_conditioning")
    settings = {name: value for name, value in asdict(cfg).items() if name in names}
    settings |= {"paradigm": "diffusion", "target_attention": "bidirectional"}
    # Around the same tensors a second model costs no memory, but then the doctor would compare them with themselves.
    model = source if cfg.paradigm == "ar" else adapt(source, copy=cfg.check, **settings)
    if cfg.check:
        doctor(cfg, source, model, tokenizer, data, folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, model, 0, tokenizer.name, train_config={"data": data}, converted_from=origin)
    if cfg.paradigm == "ar":
        print(f"{out}: {origin} as an AR model, not converted")
        return
    new = sum(p.numel() for n, p in model.named_parameters() if n.split(".")[0] in ADDED_BY_CONVERSION)
    said = " ".join(f"--{name}={value}" for name, value in settings.items())
    print(f"{out}: {origin} as a diffusion model, {said} | {new:,} new weights, all zero")


def own(cfg: ConvertConfig) -> tuple[Transformer, Tokenizer, str, str]:
    """(AR model, tokenizer, what it was trained on, what it is) of a checkpoint."""
    source, tokenizer, state = load_model(cfg.init_from)
    if source.cfg.paradigm != "ar":
        raise ValueError(f"{cfg.init_from} is a diffusion model already; --init_from wants an AR checkpoint")
    for name, given in (("block_size", cfg.block_size), ("target_length", cfg.target_length), ("prompt", cfg.prompt)):
        if given:
            raise ValueError(f"--{name} is for foreign weights; {cfg.init_from} is a checkpoint, which says its own")
    if cfg.paradigm == "ar":
        raise ValueError(f"{cfg.init_from} is an AR checkpoint already; --paradigm=ar is for foreign weights")
    data = state.get("train_config", {}).get("data", "")
    return source, tokenizer, data, f"{cfg.init_from} step {state['step']}"


def foreign(cfg: ConvertConfig, folder: Path) -> tuple[Transformer, Tokenizer, str, str]:
    """The same of a Hugging Face folder, with what there is to know of it printed."""
    found = pretrained.read_folder(folder, cfg.block_size, cfg.target_length)
    m, numbers = found.model.cfg, str(found.model.tok.weight.dtype).removeprefix("torch.")
    size = sum(p.numel() for p in found.model.parameters())
    print(f"{cfg.init_from}: {size:,} weights, {numbers}, every tensor in its place | block_size {m.block_size}, "
          f"target_length {m.target_length} | tokenizer {found.tokenizer.name}")  # fmt: skip
    for note in found.notes:
        print(f"note: {note}")
    return found.model, found.tokenizer, "", cfg.init_from


def doctor(cfg: ConvertConfig, source, model, tokenizer: Tokenizer, data: str, folder: Path | None) -> None:
    """Print the lines of check, and for foreign weights those of pretrained.parity; status 1 where one fails."""
    data = cfg.data or data
    if data:
        held_out = open_set(build_if_missing(data), "valid")
        if held_out.tokenizer_name != tokenizer.name:
            raise ValueError(
                f"{data} is made with tokenizer {held_out.tokenizer_name!r}, the model with {tokenizer.name!r}"
            )
        if held_out.target_length != source.cfg.target_length:
            raise ValueError(
                f"{data} has targets of {held_out.target_length}: say --target_length, or leave --data out"
            )
        batch = held_out.batch(cfg.seed, 0, 16)
    elif folder is None:
        raise ValueError(f"{cfg.init_from} does not say what it was trained on; name a held-out set with --data")
    else:
        numbers = " ".join(str(7 * i % tokenizer.n_ordinary) for i in range(50))
        text = cfg.prompt or (numbers if tokenizer.name.startswith("ids-") else TEXT)
        batch = text_batch(text, tokenizer, source.cfg)
    rows = pretrained.parity(folder, source, batch.target[:, 1:]) if folder else []
    if model is not source:
        both = pretrained.as_float32(source), pretrained.as_float32(model)
        rows += check(*both, batch, cfg.seed, knows_text=folder is None)
    for claim, measured, holds in rows:
        print(f"{'ok  ' if holds else 'FAIL'}  {claim:<52} {measured}")
    failed = sum(not holds for *_, holds in rows)
    if failed:
        print(f"verdict: do not train on this: {failed} of {len(rows)} claims fail, so it is not the source's network")
        raise SystemExit(1)
    but = ", but for what was not compared" if any("not compared" in measured for _, measured, _ in rows) else ""
    print(f"verdict: sound{but}. The same weights compute what they did, what is new is zero, and training can begin")


def export(cfg: ConvertConfig, folder: Path | None) -> None:
    """Write the AR-shaped weights of a checkpoint as a Hugging Face folder."""
    if folder is not None:
        raise ValueError(f"{cfg.init_from} is a Hugging Face folder already; --export wants a checkpoint")
    state = load(cfg.init_from)
    tokenizer = get_tokenizer(state["tokenizer"], Path(cfg.init_from).parent)
    notes = pretrained.write_folder(Path(cfg.export), state, tokenizer, cfg.overwrite)
    print(f"{cfg.export}: {cfg.init_from} step {state['step']} as a Hugging Face folder")
    for note in notes:
        print(f"note: {note}")


if __name__ == "__main__":
    run(main)
