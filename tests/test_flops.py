import pytest
import torch
from memory import peak_bytes
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cost import count_by_muon, forward_flops, num_params, train_flops, training_memory
from data.objectives import Batch
from device import autocast
from diffusion import LossConfig
from draws import draws_for
from encdec import EncoderDecoder, build_model
from model import ModelConfig, Transformer
from recompute import recompute_blocks
from train import PARADIGMS

GPT2 = dict(
    norm="layernorm", activation="gelu_tanh", position="learned", bias=True, qk_norm=False,
    vocab_size=50257, n_ordinary=50254, pad_id=50254, sep_id=50255, mask_id=50256, block_size=1024,
)  # fmt: skip
LLAMA = dict(vocab_size=128256, n_ordinary=128000, pad_id=128001, sep_id=128002, mask_id=128003, qk_norm=False)
PAPER = dict(vocab_size=256000, n_ordinary=255900, pad_id=255997, sep_id=255998, mask_id=255999)  # PaLM's 256K
BASE = PAPER | dict(n_layer=12, n_head=12, n_embd=768, n_hidden=2048)  # T5 1.1's shape
ENCDEC = dict(arch="encoder_decoder", prefix_attention="bidirectional")
PUBLISHED = {
    "gpt2": (GPT2 | dict(n_layer=12, n_head=12, n_embd=768), 124_439_808),
    "gpt2-medium": (GPT2 | dict(n_layer=24, n_head=16, n_embd=1024), 354_823_168),
    "llama-3.2-1b": (LLAMA | dict(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192), 1_235_814_400),
}
IN_MILLIONS = {  # arXiv 2401.17181, section 4.1 and 4.3; "Large (270M)" there is taken for a misprint of 570M
    "paper Base": (BASE, 280, 2),
    "paper Large": (PAPER | dict(n_layer=24, n_head=16, n_embd=1024, n_hidden=2816), 570, 1),
    "paper XL": (PAPER | dict(n_layer=24, n_head=32, n_embd=2048, n_hidden=5120), 1700, 20),
    "paper Base, encoder-decoder": (BASE | ENCDEC | dict(tie_weights=False), 590, 2),
}


def counted(settings: dict, monkeypatch) -> int:
    for cls in (Transformer, EncoderDecoder):
        monkeypatch.setattr(cls, "_init_weights", lambda _: None)
    with torch.device("meta"):
        return num_params(build_model(ModelConfig(**dict(block_size=64) | settings)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count_is_the_published_one(name, monkeypatch):
    settings, count = PUBLISHED[name]
    assert counted(settings, monkeypatch) == count


@pytest.mark.parametrize("name", IN_MILLIONS)
def test_parameter_count_is_the_papers_to_its_rounding(name, monkeypatch):
    settings, millions, tolerance = IN_MILLIONS[name]
    assert counted(settings, monkeypatch) / 1e6 == pytest.approx(millions, abs=tolerance)


TINY = dict(vocab_size=24, n_ordinary=20, pad_id=20, sep_id=21, mask_id=22, n_layer=2, n_head=4, n_embd=16)
TINY |= dict(block_size=32, n_hidden=24)
DIFFUSION = dict(paradigm="diffusion", target_attention="bidirectional")
CASES = {
    "causal": dict(),
    "prefix LM": dict(prefix_attention="bidirectional"),
    "joint": DIFFUSION | dict(prefix_attention="joint"),
    "frozen": DIFFUSION | dict(prefix_attention="bidirectional"),
    "wide heads": dict(head_dim=8, n_kv_head=2),
    "narrow heads, encoder-decoder": ENCDEC | dict(head_dim=2),
    "gelu": dict(activation="gelu", tie_weights=False),
    "encoder-decoder": ENCDEC,
    "encoder-decoder, diffusion": ENCDEC | DIFFUSION,
}


def counted_by_torch(settings: dict, backward: bool) -> int:
    """FLOPs of all matrix products that run, by torch's own counter; it has 3 rows, we one."""
    model = build_model(ModelConfig(**TINY | settings))
    prefix, target = torch.randint(20, (3, 7)), torch.randint(20, (3, 5))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(prefix, target)
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() // 3


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_that_torch_counts(case):
    assert counted_by_torch(CASES[case], False) == forward_flops(ModelConfig(**TINY | CASES[case]), 7, 5)


@pytest.mark.parametrize("case", CASES)
def test_a_training_step_costs_three_forward_passes(case):
    """Each matrix product has two backwards. Only what the last block makes of a prefix that is read by itself, but
    for keys and values, ends nowhere and has none: it is counted all the same."""
    cfg, spared = ModelConfig(**TINY | CASES[case]), 0
    if case in ("prefix LM", "frozen"):
        spared = 2 * 2 * 7 * (16 * 16 + 3 * 16 * 24 + 2 * 7 * 16)  # projection, MLP, attention of 7 tokens
    passes = 2 if cfg.paradigm == "diffusion" else 1
    if cfg.paradigm == "diffusion":
        assert train_flops(cfg, 7, 5, 2, ar_weight=0.5) == train_flops(cfg, 7, 5, unroll_steps=3)
    assert train_flops(cfg, 7, 5, unroll_steps=2) == passes * (counted_by_torch(CASES[case], True) + spared)


def test_grouped_heads_and_added_layers_are_counted_as_by_hand():
    """n_embd 4, heads of 2, one shared: qkv 4 x 8, proj 4 x 4, swiglu 3 x 4 x 6; a prefix of 3, a target of 2."""
    sizes = dict(vocab_size=5, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4, n_layer=2, n_head=2, n_kv_head=1, n_embd=4)
    block, head = 32 + 16 + 72, 5 * 4
    adds = 5 * (block + 2 * 5 * 4)
    assert forward_flops(ModelConfig(**sizes, n_hidden=6), 3, 2) == 2 * (2 * adds + 2 * head)
    frozen = dict(prefix_attention="bidirectional", self_conditioning=True, **DIFFUSION)
    cfg, adds = ModelConfig(**sizes, n_hidden=6, **frozen), 3 * (block + 2 * 3 * 4) + 2 * (block + 2 * 5 * 4)
    assert forward_flops(cfg, 3, 2) == 2 * (2 * adds + 2 * head + 2 * 16)


def test_adamw_takes_sixteen_bytes_a_parameter_and_muon_twelve():
    parts = training_memory(ModelConfig(), params=1000, rows=1, prefix=1, target=1)
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == 16_000
    parts = training_memory(ModelConfig(), params=1000, rows=1, prefix=1, target=1, by_muon=900)
    assert parts["optimizer"] == 900 * 4 + 100 * 8


MEMORY = dict(n_layer=4, n_head=4, n_embd=64, vocab_size=600, n_ordinary=500, pad_id=500, sep_id=501, mask_id=502)
MEMORY |= dict(block_size=128, target_length=64)
FROZEN, JOINT = (DIFFUSION | dict(prefix_attention=kind) for kind in ("bidirectional", "joint"))
PEAKS = {
    "ar": {},
    "joint": JOINT,
    "frozen, self-conditioning": FROZEN | dict(shift=True, self_conditioning=True),
    "gelu, learned positions": JOINT | dict(activation="gelu", position="learned", norm="layernorm", bias=True),
    "grouped heads": JOINT | dict(n_kv_head=2),
    "wide heads": JOINT | dict(head_dim=32),
    "bfloat16": JOINT,
    "padded": JOINT,
    "checkpointing": JOINT,
    "encoder-decoder": FROZEN | dict(arch="encoder_decoder"),
}


# Emulated, bfloat16 takes seconds where the processor has none.
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c == "bfloat16" else ()) for c in PEAKS])
def test_activations_and_logits_are_what_a_step_holds(case):
    """Within an eighth of what torch's profiler counts in a step of all passes, the weights being there before."""
    m = ModelConfig(**MEMORY | PEAKS[case])
    model = build_model(m).train()
    if case == "checkpointing":
        recompute_blocks(model)
    prefix, target = torch.randint(0, 500, (8, 64)), torch.randint(0, 500, (8, 64))
    if case == "padded":
        prefix[1, 40:] = m.pad_id
    batch, bf16 = Batch(prefix, target, torch.arange(8)), "bfloat16" if case == "bfloat16" else "float32"

    def step():
        with autocast(torch.device("cpu"), bf16):
            for term in PARADIGMS[m.paradigm].losses(model, batch, LossConfig(), draws_for(0, batch.example)):
                term.backward()

    step()  # gradients are there
    measured, params = peak_bytes(step), num_params(model)
    size = 2 if case == "bfloat16" else 4
    said = training_memory(m, params, 8, 64, 64, size, 0, case == "padded", case == "checkpointing", size == 2)
    copies = said["weights"] - 4 * params  # autocast's
    assert said["activations"] + said["logits"] + copies == pytest.approx(measured, rel=1 / 8)


@pytest.mark.slow  # profiled, 3 s
def test_a_diffusion_step_holds_hardly_more_than_an_ar_step():
    """Each term of the unrolled loss is backpropagated as it comes: one graph is alive at a time, and a sum holds two.
    Activations and logits are more than 20 times the weights here."""
    peaks, ids = {}, torch.randint(0, 500, (16, 128))
    batch = Batch(ids[:, :64], ids[:, 64:], torch.arange(16))
    for name, settings in {"ar": {}, "joint": JOINT, "modern": PEAKS["frozen, self-conditioning"]}.items():
        m = ModelConfig(**MEMORY | settings)
        model = build_model(m).train()

        def terms(model=model, m=m):
            return PARADIGMS[m.paradigm].losses(model, batch, LossConfig(), draws_for(0, batch.example))

        def step(terms=terms):
            for term in terms():
                term.backward()

        step()  # gradients are there
        peaks[name], weights = peak_bytes(step), 4 * num_params(model)
        peaks[f"{name}, summed"] = peak_bytes(lambda terms=terms: sum(terms()).backward())
        assert peaks[name] > 20 * weights
    for name in ("joint", "modern"):
        assert peaks[name] <= 1.35 * peaks["ar"] and peaks[f"{name}, summed"] > 1.7 * peaks[name], peaks


def test_muon_steps_the_matrices_of_the_blocks():
    """n_embd 4, hidden 6: qkv 4 x 12, projection 4 x 4, up 4 x 12, down 6 x 4; norms and embedding are AdamW's."""
    sizes = dict(vocab_size=5, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4, n_layer=2, n_head=2, n_embd=4, n_hidden=6)
    assert count_by_muon(ModelConfig(**sizes, block_size=8)) == 2 * (48 + 16 + 48 + 24)
