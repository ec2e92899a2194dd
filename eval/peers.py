"""Other projects' decoding loops beside ours, in turn, all around our own network: what is compared is the loop.

    python -m eval.speed --peers=FOLDER     # FOLDER/LLaDA, dllm, mdlm, gpt-fast: checkouts, as many as there are

    AR         transformers' generate (from pip; its own network with our weights), gpt-fast's generate
    diffusion  LLaDA's generate at temperature 0 and 1, dLLM's MDLMSampler, MDLM's _sample

Their files are run as they are. What those import and is no part of the loop (networks, Lightning, hydra, tokenizers)
is an empty module here. LLaDA and dLLM read the prompt again with every step and put the output layer on it, too; MDLM
has no prompt, and calls the network once more at the end. That is their design, and it counts.
"""

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor, nn

import autoregressive
import diffusion
from eval.decoders import Networks, Setting, System
from eval.timing import Line, in_turn
from model import Transformer

STEPS = 10
GREEDY = dict(sampler="confidence", temperature=0.0, settle_entropy=0.0)  # what LLaDA and dLLM do: keep the surest
# Name -> (its checkout, ours beside it, times as fast as it that we want to be).
PEERS = {
    "transformers": ("", "AR", 1.0),
    "gpt-fast": ("gpt-fast", "AR", 1.0),
    "LLaDA, temperature 0": ("LLaDA", "greedy", 1.2),
    "dLLM, temperature 0": ("dllm", "greedy", 1.2),
    "LLaDA, temperature 1": ("LLaDA", "sampled", 2.0),
    "MDLM": ("mdlm", "sampled", 2.0),
}


def peer_lines(
    folder: Path, networks: Networks, setting: Setting, runs: int, speed_up=None, there=frozenset()
) -> Iterator[Line]:
    """A line for each peer: how many times as fast we write setting.length tokens. All eager, but for ours, compiled.

    Joint: our loop calls the network as theirs does. Without it: the prefix is read once, as we would decode.
    there: cases that are measured already.
    """
    prefix, case = networks.prompt(setting.batch, networks.shapes.prompt), f"{setting.dtype} batch {setting.batch}"
    get = partial(networks.get, setting=setting)
    frozen, joint, ar = get(System("frozen")), get(System("joint")), get(System("AR"))
    for name, (checkout, kind, aim) in PEERS.items():
        here = folder / checkout
        if f"{name}, {case}" in there or (kind != "AR" and setting.batch > 1):  # a row of a canvas fills the machine
            continue
        if not here.is_dir():
            print(f"peer    {name} left out: no folder {here}")
            continue
        try:
            theirs = SYSTEMS[name](here, ar if kind == "AR" else joint, prefix, setting.length)
        except ImportError as error:
            print(f"peer    {name} left out: {error}")
            continue
        if kind == "AR":
            ours = {"ours": ar}
            if speed_up:
                ours["ours, compiled"] = get(System("AR", compiled=True), speed_up=speed_up)
            sampler, generate = autoregressive.SamplerConfig(), autoregressive.generate
        else:
            how = GREEDY if kind == "greedy" else dict(temperature=1.0)
            ours, sampler = (
                {"ours": frozen, "ours, joint": joint},
                diffusion.SamplerConfig(steps=STEPS, candidates=1, **how),
            )
            generate = diffusion.generate
        systems = {name: theirs} | {mine: partial(generate, model, prefix, sampler) for mine, model in ours.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what they call that torch has renamed
            times, warmup = in_turn(systems, runs, networks.device)
        note = dict(new_tokens=setting.length, steps=0 if kind == "AR" else STEPS)
        for mine in ours:
            yield Line("peer", f"{name}, {case}", mine, name, f">= {aim}", times, warmup, True, note)


class AsCausalLM:
    """Our network, called as LLaDA and dLLM call theirs: whole sequences in, logits for every position out."""

    def __init__(self, model: Transformer):
        self.model, self.device = model, model.tok.weight.device

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        # Joint attention with an empty prefix: every position sees every other.
        return SimpleNamespace(logits=self.model(ids[:, :0], ids))


def transformers_system(folder: Path, model: Transformer, prefix: Tensor, length: int) -> Callable[[], object]:
    """transformers' own GPT-2 with our weights, greedy, with its cache."""
    theirs = gpt2_of(model)
    prompt = torch.cat([prefix, prefix.new_full((len(prefix), 1), model.cfg.sep_id)], dim=1)  # ours reads it itself
    options = dict(max_new_tokens=length, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(prompt))
    return partial(theirs.generate, prompt, **options)


def gpt_fast_system(folder: Path, model: Transformer, prefix: Tensor, length: int) -> Callable[[], object]:
    """gpt-fast's generate around our cached network; it repeats one prompt over the batch."""
    from torch._inductor import config as inductor

    options = inductor.get_config_copy()  # the file sets some, for everyone
    with _modules(model=dict(Transformer=nn.Module), tokenizer=dict(get_tokenizer=None)):
        theirs = _load(folder / "generate.py")
    inductor.load_config(options)
    prompt = torch.cat([prefix[0], prefix.new_full((1,), model.cfg.sep_id)])
    call = partial(theirs.generate, draft_model=None, interactive=False, temperature=1.0, top_k=1)
    return lambda: call(_GPTFast(model), prompt, length, len(prefix))


class _GPTFast:
    """Our network with its cache, called as gpt-fast calls its own."""

    def __init__(self, model: Transformer):
        self.model, self.config = model, SimpleNamespace(block_size=model.cfg.block_size)

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        self.room = max_seq_length

    def __call__(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        if ids.shape[1] > 1:
            self.cache = self.model.encode(ids[:, :-1], self.room - ids.shape[1] + 1)
        return self.model.decode(self.cache, ids[:, -1:].long(), append=True)


def llada_system(temperature: float, folder: Path, model: Transformer, prefix: Tensor, length: int) -> Callable:
    """LLaDA's generate in one block, the surest tokens first."""
    theirs = _load(folder / "generate.py")
    options = dict(steps=STEPS, gen_length=length, block_length=length, mask_id=model.cfg.mask_id)
    return partial(theirs.generate, AsCausalLM(model), prefix, temperature=temperature, **options)


def dllm_system(folder: Path, model: Transformer, prefix: Tensor, length: int) -> Callable[[], object]:
    """dLLM's MDLMSampler in one block, at its own temperature of 0."""
    inside = folder / "dllm"
    packages = {"dllm": dict(__path__=[str(inside)]), "dllm.core": dict(__path__=[str(inside / "core")])}
    with _modules(**packages):
        theirs = importlib.import_module("dllm.core.samplers.mdlm")
    tokens = SimpleNamespace(mask_token_id=model.cfg.mask_id, bos_token_id=0, eos_token_id=model.cfg.pad_id)
    sampler = theirs.MDLMSampler(model=AsCausalLM(model), tokenizer=tokens)
    config = theirs.MDLMSamplerConfig(max_new_tokens=length, block_size=length, steps=STEPS)
    return lambda: sampler.sample(list(prefix), config)


def mdlm_system(folder: Path, model: Transformer, prefix: Tensor, length: int) -> Callable[[], object]:
    """MDLM's _sample (ddpm_cache, with the last call that removes noise): as many tokens, without a prompt."""
    device = model.tok.weight.device
    empty = dict.fromkeys(("hydra", "hydra.utils", "dataloader", "models", "utils"), {})
    stubs = empty | {
        "lightning": dict(LightningModule=type("LightningModule", (nn.Module,), dict(device=device))),
        "torchmetrics": dict(aggregation=SimpleNamespace(MeanMetric=object)),
        "hydra": dict(utils=None),
    }
    with _modules(**stubs), _on_path(folder):
        theirs = _load(folder / "diffusion.py")
        noise = importlib.import_module("noise_schedule").LogLinearNoise()
        sys.modules.pop("noise_schedule")
    sampler = theirs.Diffusion.__new__(theirs.Diffusion)
    nn.Module.__init__(sampler)
    network, space = AsCausalLM(model), SimpleNamespace
    sampler.__dict__ |= dict(
        backbone=lambda ids, sigma: network(ids).logits.float(),
        config=space(
            loader=space(eval_batch_size=len(prefix)),
            model=space(length=length),
            noise=space(type="loglinear"),
            sampling=space(steps=STEPS, noise_removal=True),
        ),
        noise=noise,
        mask_index=model.cfg.mask_id,
        parameterization="subs",
        sampler="ddpm_cache",
        time_conditioning=False,
        neg_infinity=-1e6,
    )
    return partial(sampler._sample, num_steps=STEPS)


SYSTEMS = {
    "transformers": transformers_system,
    "gpt-fast": gpt_fast_system,
    "LLaDA, temperature 0": partial(llada_system, 0.0),
    "LLaDA, temperature 1": partial(llada_system, 1.0),
    "dLLM, temperature 0": dllm_system,
    "MDLM": mdlm_system,
}


def gpt2_of(model: Transformer) -> nn.Module:
    """transformers' GPT-2 with the weights of ours. Raises ImportError without transformers."""
    from transformers import GPT2Config, GPT2LMHeadModel

    m = model.cfg
    sizes = dict(n_layer=m.n_layer, n_head=m.n_head, n_embd=m.n_embd, vocab_size=m.vocab_size)
    config = GPT2Config(**sizes, n_positions=m.block_size, eos_token_id=None, bos_token_id=None)
    theirs = GPT2LMHeadModel(config).eval().to(model.tok.weight.device, model.tok.weight.dtype)
    for mine, other, turned in _pairs(theirs, model):
        _copy(mine, other, turned)
    return theirs


def copy_weights(theirs: nn.Module, ours: Transformer) -> Transformer:
    """ours with the weights of a GPT2LMHeadModel."""
    for mine, other, turned in _pairs(theirs, ours):
        _copy(other, mine, turned)
    return ours


@torch.no_grad()
def _copy(source: nn.Module, into: nn.Module, turned: bool) -> None:
    into.weight.copy_(source.weight.T if turned else source.weight)
    if getattr(source, "bias", None) is not None and getattr(into, "bias", None) is not None:
        into.bias.copy_(source.bias)


def _pairs(theirs: nn.Module, ours: Transformer) -> Iterator[tuple[nn.Module, nn.Module, bool]]:
    """(our layer, theirs, whether theirs stores its matrix as (in, out))."""
    stack = theirs.transformer
    yield from ((ours.tok, stack.wte, False), (ours.pos, stack.wpe, False), (ours.norm, stack.ln_f, False))
    for block, other in zip(ours.blocks, stack.h):
        yield from ((block.norm1, other.ln_1, False), (block.norm2, other.ln_2, False))
        yield from ((block.attn.qkv, other.attn.c_attn, True), (block.attn.proj, other.attn.c_proj, True))
        yield from ((block.mlp.up, other.mlp.c_fc, True), (block.mlp.down, other.mlp.c_proj, True))


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextmanager
def _modules(**stubs: dict) -> Iterator[None]:
    """Within it, imports of those names find modules that hold nothing but what is given."""
    kept = {name: sys.modules.get(name) for name in stubs}
    for name, inside in stubs.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__dict__.update(inside)
    try:
        yield
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
