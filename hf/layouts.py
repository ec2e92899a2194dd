"""Families of foreign models: for each a table, from our modules to theirs, and two functions, config.json to
ModelConfig and back.

    gpt2      GPT-2 of all sizes
    llama     Llama 2 and 3, TinyLlama, SmolLM2
    mistral   Mistral, within its sliding window
    qwen2     Qwen 2 and 2.5: a bias on queries, keys and values
    qwen3     Qwen 3: norms on queries and keys

A setting of config.json that changes the network and has no counterpart in model.py is refused by its name.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from model import ModelConfig


class Config:
    """A config.json: settings by name, of the type they must have."""

    def __init__(self, found: dict, where: str):
        self.found, self.where = found, where

    def get(self, name: str, kind: type, default=None):
        """Raises ValueError where it is missing and has no default, or is of another type. null is missing."""
        value = self.found.get(name)
        value = default if value is None else value
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind:
            fault = "is missing" if value is None else f"must be of type {kind.__name__}, got {value!r}"
            raise ValueError(f"{self.where}: {name} {fault}")
        return value

    def only(self, name: str, *allowed):
        """The value, which must be among the allowed; the first is what a missing one means."""
        value = self.found.get(name, allowed[0])
        if value not in allowed:
            can = ", ".join(map(repr, allowed))
            raise ValueError(f"{self.where}: {name}={value!r} is not supported; can be read: {can}")
        return value


@dataclass(frozen=True)
class Family:
    """modules: ours -> theirs, # a layer's number; of several theirs, the rows of one follow those of another."""

    prefix: str  # of all names but the head's; a folder that was saved without the head has none
    modules: dict[str, list[str]]
    settings: Callable[[Config], tuple[dict, int]]  # (ModelConfig settings, tokens the source can read)
    config: Callable[[ModelConfig], dict]
    fits: dict  # what a ModelConfig must say to be of this family
    buffers: str = "$^"  # names that hold no weights
    transposed: bool = False  # matrices of the blocks are (in, out)

    def names(self, ours: str) -> list[str]:
        """Their tensors of one of ours: "blocks.3.attn.qkv.bias" -> three names that end in ".bias"."""
        module, _, part = ours.rpartition(".")
        layer = re.match(r"blocks\.([0-9]+)\.", module)
        theirs = self.modules[f"blocks.#.{module[layer.end() :]}" if layer else module]
        return [f"{name.replace('#', layer[1]) if layer else name}.{part}" for name in theirs]


GPT2_MODULES = {
    "tok": ["transformer.wte"],
    "pos": ["transformer.wpe"],
    "blocks.#.norm1": ["transformer.h.#.ln_1"],
    "blocks.#.attn.qkv": ["transformer.h.#.attn.c_attn"],
    "blocks.#.attn.proj": ["transformer.h.#.attn.c_proj"],
    "blocks.#.norm2": ["transformer.h.#.ln_2"],
    "blocks.#.mlp.up": ["transformer.h.#.mlp.c_fc"],
    "blocks.#.mlp.down": ["transformer.h.#.mlp.c_proj"],
    "norm": ["transformer.ln_f"],
    "head": ["lm_head"],
}
LLAMA_MODULES = {
    "tok": ["model.embed_tokens"],
    "blocks.#.norm1": ["model.layers.#.input_layernorm"],
    "blocks.#.attn.qkv": [f"model.layers.#.self_attn.{part}_proj" for part in "qkv"],
    "blocks.#.attn.proj": ["model.layers.#.self_attn.o_proj"],
    "blocks.#.norm2": ["model.layers.#.post_attention_layernorm"],
    "blocks.#.mlp.up": ["model.layers.#.mlp.gate_proj", "model.layers.#.mlp.up_proj"],
    "blocks.#.mlp.down": ["model.layers.#.mlp.down_proj"],
    "norm": ["model.norm"],
    "head": ["lm_head"],
}
QWEN3_MODULES = LLAMA_MODULES | {
    "blocks.#.attn.q_norm": ["model.layers.#.self_attn.q_norm"],
    "blocks.#.attn.k_norm": ["model.layers.#.self_attn.k_norm"],
}
GELU = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _gpt2_settings(c: Config) -> tuple[dict, int]:
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
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
    return dict(
        model_type="gpt2",
        architectures=["GPT2LMHeadModel"],
        n_layer=m.n_layer,
        n_head=m.n_head,
        n_embd=m.n_embd,
        n_inner=m.hidden_size,
        n_positions=m.block_size,
        layer_norm_epsilon=m.norm_eps,
        activation_function="gelu" if m.activation == "gelu" else "gelu_new",
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), m.dropout),
    )


def _llama_settings(c: Config) -> tuple[dict, int]:
    kind = c.found["model_type"]
    c.only("hidden_act", "silu")
    width, heads = c.get("hidden_size", int), c.get("num_attention_heads", int)
    hidden, groups = c.get("intermediate_size", int), c.get("num_key_value_heads", int, heads)
    head = c.get("head_dim", int, 0)
    settings = dict(
        n_layer=c.get("num_hidden_layers", int),
        n_head=heads,
        n_kv_head=0 if groups == heads else groups,
        n_embd=width,
        head_dim=0 if head * heads == width else head,
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
            raise ValueError(f"{c.where}: attention_bias and mlp_bias must be alike to be read; one of them is true")
    elif kind != "qwen2":
        c.only("attention_bias", False)
    if hidden == ModelConfig(**settings | {"n_hidden": 0}).hidden_size:
        settings["n_hidden"] = 0
    return settings | _rope_settings(c), c.get("max_position_embeddings", int)


def _rope_settings(c: Config) -> dict:
    rope = Config(c.found.get("rope_parameters") or c.found.get("rope_scaling") or {}, c.where)  # transformers 5 | 4
    kind = rope.found.get("rope_type", rope.found.get("type", "default"))
    for part in (c, rope):
        part.only("partial_rotary_factor", 1.0, None)
    base = rope.get("rope_theta", float, c.get("rope_theta", float, 10000.0))
    if kind == "default":
        return dict(rope_base=base)
    if kind != "llama3":
        raise ValueError(f"{c.where}: RoPE scaling {kind!r} is not supported; can be read: 'default', 'llama3'")
    return dict(
        rope_base=base,
        rope_factor=rope.get("factor", float),
        rope_slow_turns=rope.get("low_freq_factor", float),
        rope_fast_turns=rope.get("high_freq_factor", float),
        rope_trained_length=rope.get("original_max_position_embeddings", int),
    )


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
        architectures=[{"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind] + "ForCausalLM"],
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


_GPT2_FITS = dict(norm="layernorm", position="learned", activation=("gelu", "gelu_tanh"), bias=True, qk_norm=False)
_LLAMA_FITS = dict(norm="rmsnorm", position="rope", activation="swiglu", qk_norm=False, qkv_bias=False)
_INV_FREQ = r"(model\.)?layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq"
LLAMA = Family("model.", LLAMA_MODULES, _llama_settings, _llama_config, _LLAMA_FITS, buffers=_INV_FREQ)
FAMILIES = {
    "gpt2": Family(
        "transformer.",
        GPT2_MODULES,
        _gpt2_settings,
        _gpt2_config,
        _GPT2_FITS,
        buffers=r"(transformer\.)?h\.[0-9]+\.attn\.(bias|masked_bias)",  # the causal mask
        transposed=True,
    ),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": replace(LLAMA, fits=_LLAMA_FITS | dict(qkv_bias=True, bias=False)),
    "qwen3": replace(LLAMA, modules=QWEN3_MODULES, fits=_LLAMA_FITS | dict(qk_norm=True, bias=False)),
}


def family_of(c: Config) -> Family:
    """The family of a config.json. Raises ValueError for another model_type, and for what no family can say."""
    kind = c.get("model_type", str)
    if kind not in FAMILIES:
        raise ValueError(f"{c.where}: model_type {kind!r} is not supported; can be read: {', '.join(FAMILIES)}")
    for name, what in (("quantization_config", "quantized weights"), ("auto_map", "a network of its own code")):
        if c.found.get(name):
            raise ValueError(f"{c.where}: {what} ({name}) cannot be read")
    return FAMILIES[kind]


def refuse_window(c: Config, block_size: int) -> None:
    """Raise ValueError where a sliding window hides something. One as wide as all that is read does not."""
    slides = "sliding_attention" in c.get("layer_types", list, []) or c.get(
        "use_sliding_window", bool, c.found["model_type"] == "mistral"
    )
    if slides and c.found.get("sliding_window") is not None and c.get("sliding_window", int) < block_size:
        window = c.found["sliding_window"]
        raise ValueError(
            f"{c.where}: sliding_window={window} is in use at block_size={block_size} and not supported; "
            f"with --block_size={window} or less every token sees all before it"
        )


def family_name(m: ModelConfig) -> str:
    """The family whose network is that of m. Raises ValueError with the setting that none has."""
    if m.arch != "decoder_only":
        raise ValueError("an encoder-decoder has no family here to be exported as")
    wrong = {}
    for name, family in FAMILIES.items():
        wants = {key: value if isinstance(value, tuple) else (value,) for key, value in family.fits.items()}
        wrong[name] = [f"{key}={getattr(m, key)}" for key, allowed in wants.items() if getattr(m, key) not in allowed]
        if name == "gpt2" and (m.kv_heads != m.n_head or m.head_size * m.n_head != m.n_embd):
            wrong[name].append("heads that are grouped or of another width")
    best = min(wrong, key=lambda name: len(wrong[name]))
    if wrong[best]:
        raise ValueError(
            f"no family has this network, so it cannot be exported; not {best}'s: {', '.join(wrong[best])}"
        )
    return best
