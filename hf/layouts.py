"""How the tensors and settings of each model family are called.

    gpt2      GPT-2 of all sizes
    llama     Llama 2 and 3, TinyLlama, SmolLM2
    mistral   Mistral, within its sliding window
    qwen2     Qwen 2 and 2.5: a bias on queries, keys and values
    qwen3     Qwen 3: norms on queries and keys

GPT-2 has its own names, all other families have Llama's: (GPT-2's, Llama's) in the tables below,
"" if there is none. The tables are read in both directions. A setting of config.json that model.py
cannot express is refused by name.
"""

import re
from typing import NamedTuple

from configurator import require
from model import ModelConfig

WHOLE = {
    "tok": ("transformer.wte", "model.embed_tokens"),
    "pos": ("transformer.wpe", ""),
    "norm": ("transformer.ln_f", "model.norm"),
    "head": ("lm_head", "lm_head"),
}
BLOCK = {  # several names: stacked by rows
    "norm1": ("ln_1", "input_layernorm"),
    "attn.qkv": ("attn.c_attn", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    "attn.q_norm": ("", "self_attn.q_norm"),
    "attn.k_norm": ("", "self_attn.k_norm"),
    "attn.proj": ("attn.c_proj", "self_attn.o_proj"),
    "norm2": ("ln_2", "post_attention_layernorm"),
    "mlp.up": ("mlp.c_fc", "mlp.gate_proj mlp.up_proj"),
    "mlp.down": ("mlp.c_proj", "mlp.down_proj"),
}
BUFFERS = r".*\.attn\.(bias|masked_bias)|.*\.rotary_emb\.inv_freq|rope_freqs\.weight"  # no weights


class Setting(NamedTuple):
    ours: str  # in ModelConfig
    theirs: tuple[str, str]  # in config.json; several names have one value
    gguf: str  # after the architecture; "": not a field
    kind: type
    default: object = None  # None: the setting is required


SETTINGS = (
    Setting("n_layer", ("n_layer", "num_hidden_layers"), "block_count", int),
    Setting("n_head", ("n_head", "num_attention_heads"), "attention.head_count", int),
    Setting("n_kv_head", ("", "num_key_value_heads"), "attention.head_count_kv", int, 0),
    Setting("n_embd", ("n_embd", "hidden_size"), "embedding_length", int),
    Setting("head_dim", ("", "head_dim"), "attention.key_length", int, 0),
    Setting("n_hidden", ("n_inner", "intermediate_size"), "feed_forward_length", int, 0),
    Setting("block_size", ("n_positions", "max_position_embeddings"), "context_length", int),
    Setting("norm_eps", ("layer_norm_epsilon", ""), "attention.layer_norm_epsilon", float),
    Setting("norm_eps", ("", "rms_norm_eps"), "attention.layer_norm_rms_epsilon", float),
    Setting("rope_base", ("", "rope_theta"), "rope.freq_base", float, 10000.0),
    Setting("bias", ("", "attention_bias mlp_bias"), "", bool, False),
)
LLAMA3_ROPE = (
    Setting("rope_factor", ("", "factor"), "", float),
    Setting("rope_slow_turns", ("", "low_freq_factor"), "", float),
    Setting("rope_fast_turns", ("", "high_freq_factor"), "", float),
    Setting("rope_trained_length", ("", "original_max_position_embeddings"), "", int),
)
ACTIVATIONS = dict(gelu_new="gelu_tanh", gelu_pytorch_tanh="gelu_tanh", gelu="gelu", silu="swiglu")
RESOLVED = {"n_kv_head": "kv_heads", "head_dim": "head_size", "n_hidden": "hidden_size"}


class Family(NamedTuple):
    column: int  # of the tables: 0 is GPT-2
    layers: str  # before the number of a block
    activation: str  # how config.json calls it
    only: dict  # settings of config.json -> the supported values; the first is the default
    fixed: dict  # ModelConfig settings that all models of the family share
    transposed: bool = False  # matrices of the blocks are (in, out)

    def names(self, ours: str) -> list[str]:
        """Return their tensors for one of ours: blocks.3.attn.qkv.bias may have three."""
        module, _, part = ours.rpartition(".")
        block = re.fullmatch(r"blocks\.([0-9]+)\.(.*)", module)
        theirs = (BLOCK[block[2]] if block else WHOLE[module])[self.column].split()
        before = f"{self.layers}.{block[1]}." if block else ""
        return [f"{before}{name}.{part}" for name in theirs]

    def is_transposed(self, ours: str, n_dims: int) -> bool:
        return self.transposed and ours.startswith("blocks.") and n_dims == 2

    def settings(self) -> list[Setting]:
        return [row for row in SETTINGS if row.theirs[self.column]]


GPT2 = Family(
    column=0,
    layers="transformer.h",
    activation="activation_function",
    only={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    fixed=dict(norm="layernorm", position="learned", bias=True),
    transposed=True,
)
LLAMA = Family(
    column=1,
    layers="model.layers",
    activation="hidden_act",
    only=dict(hidden_act=("silu",), rope_type=("default", "llama3"), partial_rotary_factor=(1,)),
    fixed=dict(norm="rmsnorm", position="rope"),
)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA}
FAMILIES["mistral"] = LLAMA._replace(fixed=LLAMA.fixed | dict(bias=False))
FAMILIES["qwen2"] = LLAMA._replace(fixed=LLAMA.fixed | dict(bias=False, qkv_bias=True))
FAMILIES["qwen3"] = LLAMA._replace(fixed=LLAMA.fixed | dict(bias=False, qk_norm=True))


def typed(values: dict, name: str, kind: type, default=None):
    """Return a setting of config.json. null counts as missing."""
    value = values.get(name)
    value = default if value is None else value
    value = float(value) if kind is float and type(value) is int else value
    fault = "is missing" if value is None else f"must be {kind.__name__}, got {value!r}"
    require(type(value) is kind, f"{name} {fault}")
    return value


def one_of(values: dict, name: str, *allowed):
    """Return a setting that must be one of the allowed values. The first is the default."""
    value = values.get(name)
    value = allowed[0] if value is None else value
    supported = ", ".join(map(repr, allowed))
    require(value in allowed, f"{name}={value!r} is not supported; supported: {supported}")
    return value


def read_settings(values: dict) -> dict:
    """Return settings for a ModelConfig from a config.json. block_size is the source's context.

    Completes the values by its RoPE groups. Raises ValueError if no family covers them.
    """
    typed(values, "model_type", str)
    family = FAMILIES[one_of(values, "model_type", *FAMILIES)]
    for name, what in (("quantization_config", "quantized weights"), ("auto_map", "custom code")):
        require(not values.get(name), f"{what} ({name}) is not supported")
    for group in ("rope_parameters", "rope_scaling"):  # of transformers 5 and 4
        for name, value in typed(values, group, dict, {}).items():
            name = "rope_type" if name == "type" else name
            known = values.get(name)
            same = known is None or value is None or value == known
            require(same, f"{name} is both {known!r} and {value!r}; keep one of them")
            values[name] = value if known is None else known
    chosen = {name: one_of(values, name, *allowed) for name, allowed in family.only.items()}
    rows = family.settings()
    if chosen.get("rope_type") == "llama3":
        rows += LLAMA3_ROPE
    settings = {"activation": ACTIVATIONS[chosen[family.activation]]}
    for row in rows:
        name = row.theirs[family.column].split()[0]
        settings[row.ours] = typed(values, name, row.kind, row.default)
    settings["tie_weights"] = typed(values, "tie_word_embeddings", bool, family is GPT2)
    return settings | family.fixed


def refuse_window(values: dict, block_size: int) -> None:
    """Raise ValueError if a sliding window is shorter than block_size."""
    slides = typed(values, "use_sliding_window", bool, values["model_type"] == "mistral")
    slides = slides or "sliding_attention" in typed(values, "layer_types", list, [])
    window = typed(values, "sliding_window", int, block_size)
    fault = f"{block_size} tokens exceed sliding_window={window}"
    require(not slides or window >= block_size, f"{fault}; use --block_size={window} or less")


def write_settings(m: ModelConfig) -> dict:
    """Return the config.json of a network of ours. Read again, it gives m.

    Raises ValueError with the settings that differ if no family fits.
    """
    kind = "qwen3" if m.qk_norm else "qwen2" if m.qkv_bias else "llama"
    kind = "gpt2" if m.position == "learned" else kind
    family = FAMILIES[kind]
    name = "GPT2LMHeadModel" if kind == "gpt2" else f"{kind.title()}ForCausalLM"
    values = {"model_type": kind, "architectures": [name], "tie_word_embeddings": m.tie_weights}
    for row in family.settings():
        value = getattr(m, RESOLVED.get(row.ours, row.ours))
        if value is not False:
            values |= dict.fromkeys(row.theirs[family.column].split(), value)
    names = family.only[family.activation]
    values[family.activation] = next((n for n in names if ACTIVATIONS[n] == m.activation), names[0])
    if m.rope_factor != 1:
        scaling = {row.theirs[family.column]: getattr(m, row.ours) for row in LLAMA3_ROPE}
        values["rope_scaling"] = {"rope_type": "llama3"} | scaling
    back = dict(arch="decoder_only", bias=False, qkv_bias=False, qk_norm=False)
    back |= dict(n_kv_head=m.n_head, head_dim=m.n_embd // m.n_head)
    back |= read_settings(dict(values))
    ours = {name: getattr(m, RESOLVED.get(name, name)) for name in back}
    different = ", ".join(f"{name}={value}" for name, value in ours.items() if value != back[name])
    require(not different, f"no family to export to; different from {kind}: {different}")
    return values
