"""What turns a gradient into a step: AdamW, or Muon beside it, and the learning rate of each step."""

import math

import torch
from torch import nn


def make_optimizers(model: nn.Module, cfg) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the matrices inside the blocks and AdamW for the rest.

    Weight decay on matrices only. Muon: Jordan et al. 2024, from torch.optim.
    lr_ratio in a group is its learning rate as a multiple of learning_rate_at.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_muon = [p for name, p in named if cfg.optimizer == "muon" and muon_takes(name, p)]
    rest = [p for _, p in named if all(p is not q for q in by_muon)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay, "lr_ratio": 1.0},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "lr_ratio": 1.0},
    ]
    found = [torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(cfg.beta1, cfg.beta2), fused=True)]
    if by_muon:
        group = {"params": by_muon, "weight_decay": cfg.weight_decay, "lr_ratio": cfg.muon_lr_ratio}
        found.append(torch.optim.Muon([group], lr=cfg.learning_rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return found


def muon_takes(name: str, p: torch.Tensor) -> bool:
    """Whether Muon steps this parameter: a matrix inside a block."""
    return name.startswith("blocks.") and p.dim() == 2


def learning_rate_at(step: int, cfg) -> float:
    """Linear warm-up, then constant, or falling to min_lr_ratio at max_steps. Never 0 at step 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    share = (step - cfg.warmup_steps) / max(cfg.max_steps - cfg.warmup_steps, 1)  # 0 .. 1
    fall = 1 - share if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * fall)
