"""How the tensors and settings of each model family are called.

    gpt2      GPT-2 of all sizes
    llama     Llama 2 and 3, TinyLlama, SmolLM2
    mistral   Mistral, within its sliding window
    qwen2     Qwen 2 and 2.5: a bias on queries, keys and values
    qwen3     Qwen 3: norms on queries and keys

A family is a table from our modules to theirs and two functions, from config.json to ModelConfig
and back. A setting of config.json that model.py cannot express is refused by name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from model import ModelConfig


class Config:
    """The settings of a config.json. path names the file in errors."""

    def __init__(self, values: dict, path: str):
        self.values = values
        self.path = path

    def get(self, name: str, kind: type, default=None):
        """Return a setting. null counts as missing. Raises ValueError if its type is wrong."""
        value = self.values.get(name)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            fault = (
                "is missing" if value is None else f"must be of type {kind.__name__}, got {value!r}"
            )
            raise ValueError(f"{self.path}: {name} {fault}")
        return value

    def only(self, name: str, *allowed):
        """Return a setting that must be one of the allowed values. The first is the default."""
        value = self.values.get(name, allowed[0])
        if value not in allowed:
            supported = ", ".join(map(repr, allowed))
            raise ValueError(
                f"{self.path}: {name}={value!r} is not supported; supported: {supported}"
            )
        return value

    def agreed(self, name: str, *values):
        """Return the one value among several spellings of a setting; None if there is none."""
        given = [value for value in values if value is not None]
        if any(value != given[0] for value in given):
            raise ValueError(
                f"{self.path}: {name} is both {given[0]!r} and {given[-1]!r}; keep one of them"
            )
        return given[0] if given else None


@dataclass(frozen=True)
class Family:
    """One family. modules: our name -> their names, stacked by rows; # is the layer."""

    prefix: str  # of all names except the head's; files that were saved without the head lack it
    modules: dict[str, list[str]]
    settings: Callable[[Config], tuple[dict, int]]  # (ModelConfig settings, context length)
    config: Callable[[ModelConfig], dict]
    fits: dict  # the settings that a ModelConfig of this family has
    buffers: str = "$^"  # names of tensors that are no weights
    transposed: bool = False  # matrices of the blocks are (in, out)

    def names(self, ours: str) -> list[str]:
        """Return their tensors for one of ours: blocks.3.attn.qkv.bias has three."""
        module, _, part = ours.rpartition(".")
        layer = re.match(r"blocks\.([0-9]+)\.", module)
        if layer:
            theirs = self.modules[f"blocks.#.{module[layer.end() :]}"]
            theirs = [name.replace("#", layer[1]) for name in theirs]
        else:
            theirs = self.modules[module]
        return [f"{name}.{part}" for name in theirs]


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
GPT2_MODULES = _modules(GPT2_WHOLE | {"head": "lm_head"}, "transformer.h", GPT2_BLOCK)
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
LLAMA_MODULES = _modules(LLAMA_WHOLE, "model.layers", LLAMA_BLOCK)
QWEN3_MODULES = _modules(LLAMA_WHOLE, "model.layers", LLAMA_BLOCK | QWEN3_BLOCK)
GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
GPT2_ALIASES = dict(n_embd="hidden_size", n_layer="num_hidden_layers")
GPT2_ALIASES |= dict(n_head="num_attention_heads", n_positions="max_position_embeddings")
# What transformers assumes if the setting is missing.
MISSING_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


def _gpt2_settings(c: Config) -> tuple[dict, int]:
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
    for name, other in GPT2_ALIASES.items():
        size = c.agreed(name, c.values.get(name), c.values.get(other))
        c = Config(c.values | {name: size}, c.path)
    width = c.get("n_embd", int)
    hidden = c.get("n_inner", int, 4 * width)
    settings = dict(
        n_layer=c.get("n_layer", int),
        n_head=c.get("n_head", int),
        n_embd=width,
        n_hidden=0 if hidden == 4 * width else hidden,
        norm="layernorm",
        norm_eps=c.get("layer_norm_epsilon", float, 1e-5),
        activation=GELU[c.only("activation_function", *GELU)],
        position="learned",
        bias=True,
        tie_weights=c.get("tie_word_embeddings", bool, True),
    )
    return settings, c.get("n_positions", int)


def _gpt2_config(m: ModelConfig) -> dict:
    sizes = dict(n_layer=m.n_layer, n_head=m.n_head, n_embd=m.n_embd, n_inner=m.hidden_size)
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), m.dropout)
    return dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_positions=m.block_size,
        layer_norm_epsilon=m.norm_eps,
        activation_function="gelu" if m.activation == "gelu" else "gelu_new",
        **sizes,
        **dropout,
    )


def _llama_settings(c: Config) -> tuple[dict, int]:
    kind = c.values["model_type"]
    c.only("hidden_act", "silu")
    width = c.get("hidden_size", int)
    heads = c.get("num_attention_heads", int)
    hidden = c.get("intermediate_size", int)
    missing = heads if "num_key_value_heads" in c.values else MISSING_KV_HEADS.get(kind, heads)
    kv_heads = c.get("num_key_value_heads", int, missing)
    head_dim = c.get("head_dim", int, 128 if kind == "qwen3" else 0)
    settings = dict(
        n_layer=c.get("num_hidden_layers", int),
        n_head=heads,
        n_kv_head=0 if kv_heads == heads else kv_heads,
        n_embd=width,
        head_dim=0 if head_dim * heads == width else head_dim,
        n_hidden=hidden,
        norm="rmsnorm",
        norm_eps=c.get("rms_norm_eps", float, 1e-6),
        activation="swiglu",
        position="rope",
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        tie_weights=c.get("tie_word_embeddings", bool, False),
    )
    if kind == "llama":  # biases on all linear layers or on none
        settings["bias"] = c.get("attention_bias", bool, False)
        if c.get("mlp_bias", bool, False) != settings["bias"]:
            raise ValueError(f"{c.path}: attention_bias and mlp_bias must be equal")
    elif kind != "qwen2":
        c.only("attention_bias", False)
    if hidden == ModelConfig(**settings | {"n_hidden": 0}).hidden_size:
        settings["n_hidden"] = 0
    return settings | _rope_settings(c), c.get("max_position_embeddings", int)


def _rope_settings(c: Config) -> dict:
    """Read the RoPE settings of transformers 4 (rope_scaling) or 5 (rope_parameters)."""
    groups = [c.get(name, dict, {}) for name in ("rope_parameters", "rope_scaling")]
    kinds = [part.get("rope_type", part.get("type", "default")) for part in groups if part]
    kind = c.agreed("the RoPE type", *kinds) or "default"

    def number(name: str, kind: type, default=None):
        values = [c.values.get(name), *(part.get(name) for part in groups)]
        return Config({name: c.agreed(name, *values)}, c.path).get(name, kind, default)

    if number("partial_rotary_factor", float, 1.0) != 1:
        raise ValueError(f"{c.path}: partial_rotary_factor is not supported, only 1.0")
    settings = dict(rope_base=number("rope_theta", float, 10000.0))
    if kind == "llama3":
        settings |= dict(
            rope_factor=number("factor", float),
            rope_slow_turns=number("low_freq_factor", float),
            rope_fast_turns=number("high_freq_factor", float),
            rope_trained_length=number("original_max_position_embeddings", int),
        )
    elif kind != "default":
        raise ValueError(f"{c.path}: RoPE scaling {kind!r} is not supported, only 'llama3'")
    return settings


def _llama_config(m: ModelConfig) -> dict:
    kind = "qwen3" if m.qk_norm else "qwen2" if m.qkv_bias else "llama"
    scaling = None
    if m.rope_factor != 1:
        scaling = dict(
            rope_type="llama3",
            factor=m.rope_factor,
            low_freq_factor=m.rope_slow_turns,
            high_freq_factor=m.rope_fast_turns,
            original_max_position_embeddings=m.rope_trained_length,
        )
    biases = dict(attention_bias=m.bias, mlp_bias=m.bias) if kind == "llama" else {}
    return biases | dict(
        model_type=kind,
        architectures=[f"{kind.title()}ForCausalLM"],
        num_hidden_layers=m.n_layer,
        num_attention_heads=m.n_head,
        num_key_value_heads=m.kv_heads,
        hidden_size=m.n_embd,
        head_dim=m.head_size,
        intermediate_size=m.hidden_size,
        max_position_embeddings=m.block_size,
        rms_norm_eps=m.norm_eps,
        hidden_act="silu",
        rope_theta=m.rope_base,
        rope_scaling=scaling,
        attention_dropout=m.dropout,
    )


GPT2_FITS = dict(norm="layernorm", position="learned", activation="gelu", bias=True, qk_norm=False)
LLAMA_FITS = dict(norm="rmsnorm", position="rope", activation="swiglu")
CAUSAL_MASK = r"(transformer\.)?h\.[0-9]+\.attn\.(bias|masked_bias)"
FREQUENCIES = r"(model\.)?layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq"
GPT2 = Family(
    "transformer.", GPT2_MODULES, _gpt2_settings, _gpt2_config, GPT2_FITS, CAUSAL_MASK, True
)
LLAMA = Family(
    prefix="model.",
    modules=LLAMA_MODULES,
    settings=_llama_settings,
    config=_llama_config,
    fits=LLAMA_FITS | dict(qk_norm=False, qkv_bias=False),
    buffers=FREQUENCIES,
)
QWEN2 = replace(LLAMA, fits=LLAMA_FITS | dict(qk_norm=False, qkv_bias=True, bias=False))
QWEN3_FITS = LLAMA_FITS | dict(qk_norm=True, qkv_bias=False, bias=False)
QWEN3 = replace(LLAMA, modules=QWEN3_MODULES, fits=QWEN3_FITS)
FAMILIES = dict(gpt2=GPT2, llama=LLAMA, mistral=LLAMA, qwen2=QWEN2, qwen3=QWEN3)


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


def refuse_window(c: Config, block_size: int) -> None:
    """Raise ValueError if a sliding window is shorter than block_size."""
    default = c.values["model_type"] == "mistral"
    slides = c.get("use_sliding_window", bool, default)
    slides = slides or "sliding_attention" in c.get("layer_types", list, [])
    window = c.values.get("sliding_window")
    if slides and window is not None and c.get("sliding_window", int) < block_size:
        remedy = f"use --block_size={window} or less"
        raise ValueError(f"{c.path}: {block_size} tokens exceed sliding_window={window}; {remedy}")


def family_name(m: ModelConfig) -> str:
    """Return the family of a network of ours. Raises ValueError with the settings that none has."""
    if m.arch != "decoder_only":
        raise ValueError("an encoder-decoder cannot be exported: no family has one")
    different = {}
    for name, family in FAMILIES.items():
        values = {key: getattr(m, key) for key in family.fits}
        if name == "gpt2" and m.activation == "gelu_tanh":
            values["activation"] = "gelu"
        different[name] = [f"{key}={v}" for key, v in values.items() if v != family.fits[key]]
        if name == "gpt2" and (m.kv_heads != m.n_head or m.head_size * m.n_head != m.n_embd):
            different[name].append("grouped heads or heads of another width")
    best = min(different, key=lambda name: len(different[name]))
    if different[best]:
        reasons = ", ".join(different[best])
        raise ValueError(f"cannot be exported: no family fits; different from {best}: {reasons}")
    return best
