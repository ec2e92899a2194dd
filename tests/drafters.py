"""Small random AR networks with random adapters, for the tests of drafting."""

import torch
from torch import nn

from extras.adapter import AdapterConfig, DraftModel
from model import ModelConfig, Transformer

ORDINARY, PAD, SEP, MASK, V, S = 6, 6, 7, 8, 9, 8
SIZES = dict(vocab_size=V, n_ordinary=ORDINARY, pad_id=PAD, sep_id=SEP, mask_id=MASK)
SIZES |= dict(target_length=S + 1, block_size=16, n_layer=2, n_head=2, n_embd=16)
KINDS = [
    {},
    dict(prefix_attention="bidirectional", n_kv_head=1),
    dict(sep_id=-1, eos_id=5, position="learned", norm="layernorm", activation="gelu"),
]


def network(**settings) -> Transformer:
    """Random weights, large enough for different texts."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES | dict(tie_weights=False) | settings)).double().eval()
    for p in model.parameters():
        p.data *= 2
    return model


def drafter(model: Transformer, masks: int = 2, **settings) -> DraftModel:
    """The model with random adapters: some drafts are right."""
    torch.manual_seed(1)
    made = DraftModel(model, AdapterConfig(masks=masks, rank=3, **settings)).double().eval()
    for name, p in made.named_parameters():
        if name.endswith("adapter_b"):
            nn.init.normal_(p, std=0.03)
    return made


def prompts(n: int) -> torch.Tensor:
    """Prefixes (n, 5) of 1 to 5 tokens, then pads."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(ORDINARY, (n, 5), generator=generator)
    lengths = torch.randint(1, 6, (n, 1), generator=generator)
    return torch.where(torch.arange(5) < lengths, ids, PAD)
