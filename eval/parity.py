"""Is a foreign model, read by pretrained.py, the network it was? Every family against transformers.

    python -m eval.parity --json=results/parity.json
    python -m eval.parity --import_cost --json=out/import_cost.json    # time and memory of reading larger folders

Tiny random models are built and saved by transformers and read back by us. Logits are compared in float32, for two
rows of which one is padded: their positions are told to transformers, for it would count pads. Then each continues
both rows greedily, with its own cache. Weights are random and large, so that a wrong detail moves every logit.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from configurator import configure, run
from encdec import assemble
from eval.common import environment, markdown, write_json
from pretrained import as_float32, read_folder, reference_model

LENGTHS, TARGET, GREEDY = (9, 5), 12, 64  # tokens of the two prefixes, of the target, and of the continuation
LIMIT = 1e-5  # largest difference allowed, as a share of the largest logit

ROWS = dict(vocab_size=300, initializer_range=0.3)
SIZES = ROWS | dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=32, intermediate_size=48)
SIZES |= dict(max_position_embeddings=96)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(original_max_position_embeddings=32)
# name: (transformers' class, without LMHeadModel or ForCausalLM, its settings, number format of the folder)
CASES = {
    "gpt2": ("GPT2", ROWS | dict(n_layer=3, n_head=4, n_embd=32, n_positions=96), "float32"),
    "llama: tied": ("Llama", SIZES | dict(tie_word_embeddings=True), "float32"),
    "llama 3: grouped, scaled rope": ("Llama", SIZES | dict(num_key_value_heads=2, rope_parameters=LLAMA3), "float32"),
    "llama 3 in bfloat16": ("Llama", SIZES | dict(num_key_value_heads=2, rope_parameters=LLAMA3), "bfloat16"),
    "llama: biases": ("Llama", SIZES | dict(attention_bias=True, mlp_bias=True), "float32"),
    "mistral: head_dim": ("Mistral", SIZES | dict(num_key_value_heads=1, head_dim=16, sliding_window=None), "float32"),
    "qwen2: qkv bias, tied": ("Qwen2", SIZES | dict(num_key_value_heads=2, tie_word_embeddings=True), "float32"),
    "qwen2 in float16": ("Qwen2", SIZES | dict(num_key_value_heads=2), "float16"),
    "qwen3: qk norm, head_dim": ("Qwen3", SIZES | dict(num_key_value_heads=2, head_dim=16), "float32"),
}


@dataclass
class ParityConfig:
    json: str = ""  # also write the results here
    import_cost: bool = False  # instead: seconds and memory that reading a folder of 124M and of 0.8B weights takes
    seed: int = 0


def build(case: str, folder: Path, seed: int = 0, **settings):
    """Write the folder of a case and return transformers' model of it, computing in float32."""
    import transformers

    kind, sizes, dtype = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**dict(bos_token_id=None, eos_token_id=None) | sizes | settings)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    theirs = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.dim() == 1:  # norms and biases start as ones and zeros, which would hide where they end up
                p += 0.1 * torch.randn_like(p)
    transformers.logging.disable_progress_bar()
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    return reference_model(folder)


@torch.no_grad()
def measure(case: str, seed: int = 0) -> dict:
    """What the two say: the largest and the mean difference of logits, and how many greedy tokens are the same."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs = build(case, Path(scratch), seed)
        found = read_folder(Path(scratch))
    model, V = as_float32(found.model), theirs.config.vocab_size
    random = torch.Generator().manual_seed(seed)
    prefix = torch.randint(0, V, (2, max(LENGTHS)), generator=random)
    target = torch.randint(0, V, (2, TARGET), generator=random)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]  # (2, P)
    padded = prefix.masked_fill(~real, model.cfg.pad_id)
    ours = model(padded, target)[..., :V]  # (2, T, V)

    both = torch.cat([prefix, target], dim=1)
    seen = torch.cat([real, torch.ones_like(target, dtype=torch.bool)], dim=1)
    place = (seen.cumsum(1) - 1).clamp(min=0)
    expected = theirs(both, attention_mask=seen.long(), position_ids=place).logits[:, max(LENGTHS) :]
    size, difference = expected.abs().max().item(), (ours - expected).abs()
    dtype = found.model.tok.weight.dtype
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    small = assemble(model.cfg, {name: tensor.to(half) for name, tensor in model.state_dict().items()})
    rounded = (small(padded, target)[..., :V].float() - ours).abs()
    same = _greedy(model, padded, target[:, :1], V) == _their_greedy(theirs, prefix, real, target[:, :1])
    return {
        "max": difference.max().item(),
        "mean": difference.mean().item(),
        "largest_logit": size,
        "relative": difference.max().item() / size,
        "half_format": str(half).removeprefix("torch."),
        "half_relative": rounded.max().item() / size,
        "greedy_same": int(same.cumprod(1).sum(1).min()),
        "weights": sum(p.numel() for p in model.parameters()),
    }


def _greedy(model, prefix: Tensor, last: Tensor, V: int) -> Tensor:
    """GREEDY tokens (2, GREEDY) after prefix and `last`, through our cache, of the V ids that the source has."""
    cache, made = model.encode(prefix, room=1 + GREEDY), []
    for _ in range(GREEDY):
        last = model.decode(cache, last, append=True)[:, -1:, :V].argmax(-1)
        made.append(last)
    return torch.cat(made, dim=1)


def _their_greedy(theirs, prefix: Tensor, real: Tensor, last: Tensor) -> Tensor:
    rows = [torch.cat([row[keep], one]) for row, keep, one in zip(prefix, real, last)]
    ids, seen = (
        torch.zeros(2, max(map(len, rows)), dtype=torch.long),
        torch.zeros(2, max(map(len, rows)), dtype=torch.long),
    )
    for i, row in enumerate(rows):  # padded on the left, as generate wants it
        ids[i, -len(row) :], seen[i, -len(row) :] = row, 1
    how = dict(max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False, eos_token_id=None, pad_token_id=0)
    return theirs.generate(ids, attention_mask=seen, **how)[:, ids.shape[1] :]


# What reading costs


def write_gpt2(folder: Path) -> None:
    """A folder of GPT-2's smallest size: 124M float32 weights."""
    C, V, shapes = 768, 50257, {}
    for i in range(12):
        at = f"transformer.h.{i}"
        for name, shape in {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C)}.items():
            shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[1:]}
        shapes |= {f"{at}.mlp.c_proj.weight": (4 * C, C), f"{at}.mlp.c_proj.bias": (C,)}
        shapes |= {f"{at}.{norm}.{part}": (C,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    shapes |= {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (1024, C)}
    shapes |= {f"transformer.ln_f.{part}": (C,) for part in ("weight", "bias")}
    config = dict(model_type="gpt2", n_layer=12, n_head=12, n_embd=C, n_positions=1024, vocab_size=V)
    _write(folder, config, {"model.safetensors": shapes}, torch.float32)


def write_llama(folder: Path, layers: int = 12) -> None:
    """A folder in shards: a Llama of TinyLlama's width, bfloat16; 12 layers are 0.66B weights, 1.3 GB."""
    C, H, V, KV = 2048, 5632, 32000, 256
    files = {"model-1.safetensors": {"model.embed_tokens.weight": (V, C)}}
    for i in range(layers):
        at, shapes = f"model.layers.{i}", files.setdefault(f"model-{2 + i // 4}.safetensors", {})
        for name, rows in {"q_proj": C, "k_proj": KV, "v_proj": KV, "o_proj": C}.items():
            shapes[f"{at}.self_attn.{name}.weight"] = (rows, C)
        shapes |= {f"{at}.mlp.gate_proj.weight": (H, C), f"{at}.mlp.up_proj.weight": (H, C)}
        shapes[f"{at}.mlp.down_proj.weight"] = (C, H)
        shapes |= {f"{at}.{norm}.weight": (C,) for norm in ("input_layernorm", "post_attention_layernorm")}
    files["model-9.safetensors"] = {"model.norm.weight": (C,), "lm_head.weight": (V, C)}
    config = dict(model_type="llama", num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=4)
    config |= dict(hidden_size=C, intermediate_size=H, vocab_size=V, max_position_embeddings=2048)
    _write(folder, config, files, torch.bfloat16)


def _write(folder: Path, config: dict, files: dict[str, dict[str, tuple]], dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file, shapes in files.items():
        save_file({name: torch.full(shape, 0.01, dtype=dtype) for name, shape in shapes.items()}, folder / file)
    where = {name: file for file, shapes in files.items() for name in shapes}
    if len(files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def import_cost(folder: Path) -> dict:
    """Seconds, also of the CPU, bytes of weights and peak, ratio: of reading a folder in a process of its own. Linux.

    peak: the most memory that was in use, pages of mapped files included, over what was before the reading began.
    """
    code = "import sys; from eval.parity import _cost_here; _cost_here(sys.argv[1])"
    root = Path(__file__).absolute().parent.parent
    made = subprocess.run(
        [sys.executable, "-c", code, str(Path(folder).absolute())],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    if made.returncode:
        raise ValueError(f"{folder}: {made.stderr.strip().splitlines()[-1]}")
    return json.loads(made.stdout.splitlines()[-1])


def _cost_here(folder: str) -> None:
    def memory(name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return 1024 * int(line.split()[1])

    before, start, busy = memory("VmRSS"), time.perf_counter(), time.process_time()
    found = read_folder(Path(folder))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    size = sum(p.nbytes for p in found.model.parameters())
    peak = memory("VmHWM") - before
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    print(json.dumps(times | {"weights": size, "peak": peak, "ratio": peak / size}))


def main(argv: list[str]) -> dict:
    """The table of all families, or of what reading costs; returns what the JSON line holds."""
    cfg = configure(ParityConfig, argv)
    result = {"task": "import_cost" if cfg.import_cost else "parity", "seed": cfg.seed, "cases": {}}
    if cfg.import_cost:
        header, rows = ["folder", "weights, MB", "seconds", "on the CPU", "peak / weights"], []
        for name, write in (("gpt2, 124M, float32", write_gpt2), ("llama, 0.7B in 5 shards, bfloat16", write_llama)):
            with tempfile.TemporaryDirectory() as scratch:
                write(Path(scratch))
                cost = result["cases"][name] = import_cost(Path(scratch))
            times = [f"{cost['seconds']:.2f}", f"{cost['cpu_seconds']:.2f}"]
            rows.append([name, f"{cost['weights'] / 1e6:.0f}", *times, f"{cost['ratio']:.2f}"])
    else:
        import transformers

        result["transformers"] = transformers.__version__
        header = ["family", "max / largest logit", "mean", "holds", "greedy, same of 64", "rounding to half costs"]
        rows = []
        for case in CASES:
            found = result["cases"][case] = measure(case, cfg.seed)
            holds = found["relative"] <= LIMIT and found["greedy_same"] == GREEDY
            rounding = f"{found['half_relative']:.0e} ({found['half_format']})"
            cells = [f"{found['relative']:.1e}", f"{found['mean']:.1e}", "yes" if holds else "NO"]
            rows.append([case, *cells, str(found["greedy_same"]), rounding])
    result |= {"command": f"python -m eval.parity {' '.join(argv)}".strip()} | environment()
    print(markdown(header, rows))
    print(json.dumps(result))
    if cfg.json:
        write_json(cfg.json, result)
    return result


if __name__ == "__main__":
    run(main)
