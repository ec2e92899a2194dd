"""How the tensors and settings of each model family are called.

    gpt2      GPT-2 of all sizes
    llama     Llama 2 and 3, TinyLlama, SmolLM2
    mistral   Mistral, within its sliding window
    qwen2     Qwen 2 and 2.5: a bias on queries, keys and values
    qwen3     Qwen 3: norms on queries and keys

A family is two tables: our modules and theirs, our settings and theirs. Both are read in both
directions. A setting of config.json that model.py cannot express is refused by name.
"""

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

from model import ModelConfig


class Config:
    """The settings of a config.json. path names the file in errors."""

    def __init__(self, values: dict, path: str):
        self.values = values
        self.path = path

    def get(self, name: str, kind: type, default=None):
        """Return a setting. null counts as missing. name: all its spellings, which must agree."""
        spellings = name.split()
        given = [self.values.get(name) for name in spellings]
        given = [value for value in given if value is not None] or [default]
        self.refuse_two_values(name.replace(" ", " or "), given[0], given[-1])
        value = float(given[0]) if kind is float and type(given[0]) is int else given[0]
        if type(value) is not kind:
            fault = "is missing" if value is None else f"must be {kind.__name__}, got {value!r}"
            raise ValueError(f"{self.path}: {spellings[0]} {fault}")
        return value

    def only(self, name: str, *allowed):
        """Return a setting that must be one of the allowed values. The first is the default."""
        value = self.values.get(name)
        value = allowed[0] if value is None else value
        if value not in allowed:
            fault = f"is not supported; supported: {', '.join(map(repr, allowed))}"
            raise ValueError(f"{self.path}: {name}={value!r} {fault}")
        return value

    def refuse_two_values(self, name: str, a, b) -> None:
        if a != b:
            raise ValueError(f"{self.path}: {name} is both {a!r} and {b!r}; keep one of them")


class Setting(NamedTuple):
    ours: str  # in ModelConfig
    theirs: str  # in config.json: all spellings
    gguf: str  # after the architecture; "": not a field
    kind: type
    default: object = None  # None: the setting is required


@dataclass(frozen=True)
class Family:
    """One family. modules: our name -> their names, stacked by rows; # is the layer."""

    prefix: str  # of all names except the head's
    modules: dict[str, list[str]]
    settings: tuple[Setting, ...]
    fixed: dict  # ModelConfig settings that all models of the family share
    activation: str  # how config.json calls it
    only: dict  # settings of config.json -> the supported values; the first is the default
    buffers: str  # names of tensors that are no weights
    missing: dict  # what transformers assumes for a setting that config.json lacks
    transposed: bool = False  # matrices of the blocks are (in, out)

    def names(self, ours: str) -> list[str]:
        """Return their tensors for one of ours: blocks.3.attn.qkv.bias has three."""
        module, _, part = ours.rpartition(".")
        layer = "".join(re.findall(r"^blocks\.([0-9]+)", module))
        theirs = self.modules[module.replace(f"blocks.{layer}.", "blocks.#.")]
        return [f"{name.replace('#', layer)}.{part}" for name in theirs]

    def is_transposed(self, ours: str, n_dims: int) -> bool:
        return self.transposed and ours.startswith("blocks.") and n_dims == 2


def _modules(whole: dict, layers: str, block: dict) -> dict[str, list[str]]:
    """Return a table of modules from the names outside the blocks and those inside."""
    inside = {
        f"blocks.#.{ours}": [f"{layers}.#.{name}" for name in theirs.split()]
        for ours, theirs in block.items()
    }
    return inside | {ours: [name] for ours, name in whole.items()}


GPT2_BLOCK = {"norm1": "ln_1", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj"}
GPT2_BLOCK |= {"norm2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
GPT2_WHOLE = {"tok": "transformer.wte", "pos": "transformer.wpe", "norm": "transformer.ln_f"}
LLAMA_BLOCK = {
    "norm1": "input_layernorm",
    "attn.qkv": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
    "attn.proj": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
    "mlp.up": "mlp.gate_proj mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
QWEN3_BLOCK = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
LLAMA_WHOLE = {"tok": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}

GPT2_SETTINGS = (
    Setting("n_layer", "n_layer num_hidden_layers", "block_count", int),
    Setting("n_head", "n_head num_attention_heads", "attention.head_count", int),
    Setting("n_embd", "n_embd hidden_size", "embedding_length", int),
    Setting("n_hidden", "n_inner", "feed_forward_length", int, 0),
    Setting("block_size", "n_positions max_position_embeddings", "context_length", int),
    Setting("norm_eps", "layer_norm_epsilon", "attention.layer_norm_epsilon", float, 1e-5),
    Setting("tie_weights", "tie_word_embeddings", "", bool, True),
)
LLAMA_SETTINGS = (
    Setting("n_layer", "num_hidden_layers", "block_count", int),
    Setting("n_head", "num_attention_heads", "attention.head_count", int),
    Setting("n_kv_head", "num_key_value_heads", "attention.head_count_kv", int, 0),
    Setting("n_embd", "hidden_size", "embedding_length", int),
    Setting("head_dim", "head_dim", "attention.key_length", int, 0),
    Setting("n_hidden", "intermediate_size", "feed_forward_length", int),
    Setting("block_size", "max_position_embeddings", "context_length", int),
    Setting("norm_eps", "rms_norm_eps", "attention.layer_norm_rms_epsilon", float, 1e-6),
    Setting("rope_base", "rope_theta", "rope.freq_base", float, 10000.0),
    Setting("tie_weights", "tie_word_embeddings", "", bool, False),
)
BIAS = Setting("bias", "attention_bias mlp_bias", "", bool, False)  # on all linear layers or none
LLAMA3_ROPE = (
    Setting("rope_factor", "factor", "", float),
    Setting("rope_slow_turns", "low_freq_factor", "", float),
    Setting("rope_fast_turns", "high_freq_factor", "", float),
    Setting("rope_trained_length", "original_max_position_embeddings", "", int),
)
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
ACTIVATIONS |= {"silu": "swiglu"}
RESOLVED = {"n_kv_head": "kv_heads", "head_dim": "head_size", "n_hidden": "hidden_size"}

GPT2 = Family(
    prefix="transformer.",
    modules=_modules(GPT2_WHOLE | {"head": "lm_head"}, "transformer.h", GPT2_BLOCK),
    settings=GPT2_SETTINGS,
    fixed=dict(norm="layernorm", position="learned", bias=True),
    activation="activation_function",
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    buffers=r"transformer\.h\.[0-9]+\.attn\.(bias|masked_bias)",
    missing={},
    transposed=True,
)
LLAMA = Family(
    prefix="model.",
    modules=_modules(LLAMA_WHOLE, "model.layers", LLAMA_BLOCK),
    settings=(*LLAMA_SETTINGS, BIAS),
    fixed=dict(norm="rmsnorm", position="rope"),
    activation="hidden_act",
    only=dict(hidden_act=("silu",), rope_type=("default", "llama3"), partial_rotary_factor=(1,)),
    buffers=r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq",
    missing={},
)
NO_BIAS = dict(settings=LLAMA_SETTINGS, only=LLAMA.only | {"attention_bias": (False,)})
MISTRAL = replace(LLAMA, missing=dict(num_key_value_heads=8, sliding_window=4096), **NO_BIAS)
QWEN2 = replace(
    LLAMA,
    settings=LLAMA_SETTINGS,
    fixed=LLAMA.fixed | dict(qkv_bias=True),
    missing=dict(num_key_value_heads=32),
)
QWEN3 = replace(
    LLAMA,
    modules=_modules(LLAMA_WHOLE, "model.layers", LLAMA_BLOCK | QWEN3_BLOCK),
    fixed=LLAMA.fixed | dict(qk_norm=True),
    missing=dict(num_key_value_heads=32, head_dim=128),
    **NO_BIAS,
)
FAMILIES = dict(gpt2=GPT2, llama=LLAMA, mistral=MISTRAL, qwen2=QWEN2, qwen3=QWEN3)


def family_of(c: Config) -> Family:
    """Return the family of a config.json. Raises ValueError if no family covers it."""
    kind = c.get("model_type", str)
    if kind not in FAMILIES:
        supported = ", ".join(FAMILIES)
        raise ValueError(f"{c.path}: model_type {kind!r} is not supported; supported: {supported}")
    for name, what in (("quantization_config", "quantized weights"), ("auto_map", "custom code")):
        if c.values.get(name):
            raise ValueError(f"{c.path}: {what} ({name}) is not supported")
    return FAMILIES[kind]


def read_settings(c: Config) -> dict:
    """Return settings for a ModelConfig; block_size is the context of the source.

    Completes c by what config.json leaves to its RoPE groups or to transformers.
    """
    family = family_of(c)
    c.values = family.missing | c.values
    for group in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
        for name, value in c.get(group, dict, {}).items():
            name = "rope_type" if name == "type" else name
            first = value if c.values.get(name) is None else c.values[name]
            c.refuse_two_values(name, first, first if value is None else value)
            c.values[name] = first
    values = {name: c.only(name, *allowed) for name, allowed in family.only.items()}
    rows = family.settings
    if values.get("rope_type") == "llama3":
        rows += LLAMA3_ROPE
    settings = {row.ours: c.get(row.theirs, row.kind, row.default) for row in rows}
    return settings | family.fixed | {"activation": ACTIVATIONS[values[family.activation]]}


def refuse_window(c: Config, block_size: int) -> None:
    """Raise ValueError if a sliding window is shorter than block_size."""
    slides = c.get("use_sliding_window", bool, c.values["model_type"] == "mistral")
    slides = slides or "sliding_attention" in c.get("layer_types", list, [])
    window = c.get("sliding_window", int, block_size)
    if slides and window < block_size:
        remedy = f"use --block_size={window} or less"
        raise ValueError(f"{c.path}: {block_size} tokens exceed sliding_window={window}; {remedy}")


def write_settings(m: ModelConfig, kind: str) -> dict:
    """Return the config.json of a network of this family."""
    family = FAMILIES[kind]
    name = "GPT2LMHeadModel" if kind == "gpt2" else f"{kind.title()}ForCausalLM"
    values = {"model_type": kind, "architectures": [name]}
    for row in family.settings:
        values |= dict.fromkeys(row.theirs.split(), getattr(m, RESOLVED.get(row.ours, row.ours)))
    names = family.only[family.activation]
    values[family.activation] = next((n for n in names if ACTIVATIONS[n] == m.activation), names[0])
    if m.rope_factor != 1:
        scaling = {row.theirs: getattr(m, row.ours) for row in LLAMA3_ROPE}
        values["rope_scaling"] = {"rope_type": "llama3"} | scaling
    return values


def family_name(m: ModelConfig) -> str:
    """Return the family of a network of ours: its config.json, read again, gives m.

    Raises ValueError with the settings that differ if no family fits.
    """
    if m.arch != "decoder_only":
        raise ValueError("an encoder-decoder cannot be exported: no family has one")
    plain = dict.fromkeys(("bias", "qkv_bias", "qk_norm"), False)
    plain |= dict(n_kv_head=m.n_head, head_dim=m.n_embd // m.n_head)
    different = {}
    for kind in FAMILIES:
        back = plain | read_settings(Config(write_settings(m, kind), kind))
        values = {name: getattr(m, RESOLVED.get(name, name)) for name in back}
        different[kind] = [f"{name}={v}" for name, v in values.items() if back[name] != v]
    best = min(different, key=lambda kind: len(different[kind]))
    if different[best]:
        reasons = ", ".join(different[best])
        raise ValueError(f"cannot be exported: no family fits; different from {best}: {reasons}")
    return best
