"""AdamW, or Muon together with AdamW, and the learning rate of each step."""

import math

import torch
from torch import nn

BETAS = (0.9, 0.98)
MUON_LR_RATIO = 5.0  # Muon's learning rate as a multiple of AdamW's


def make_optimizers(model: nn.Module, cfg) -> list[torch.optim.Optimizer]:
    """Return AdamW alone, or Muon for the matrices of the blocks and AdamW for the rest.

    Only matrices get weight decay. Muon: Jordan et al. 2024, as torch implements it.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if cfg.optimizer == "muon" and uses_muon(name, p)]
    rest = [p for name, p in named if cfg.optimizer != "muon" or not uses_muon(name, p)]
    matrices = [p for p in rest if p.dim() >= 2]
    vectors = [p for p in rest if p.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    defaults = {"lr": cfg.learning_rate, "weight_decay": cfg.weight_decay}
    optimizers = [torch.optim.AdamW(groups, **defaults, betas=BETAS, fused=True)]
    if muon:
        group = {"params": muon, "lr_ratio": MUON_LR_RATIO}
        optimizers.append(torch.optim.Muon([group], **defaults, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def uses_muon(name: str, p: torch.Tensor) -> bool:
    """Return whether Muon updates this parameter: a matrix inside a block."""
    return name.startswith("blocks.") and p.dim() == 2


def set_learning_rate(optimizers: list[torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_ratio", 1.0)


def learning_rate_at(step: int, cfg) -> float:
    """Return the learning rate: a linear warm-up, then constant, or a decay to 0 at max_steps."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    done = (step - cfg.warmup_steps) / max(cfg.max_steps - cfg.warmup_steps, 1)  # 0 .. 1
    if cfg.schedule == "linear":
        return cfg.learning_rate * (1 - done)
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
