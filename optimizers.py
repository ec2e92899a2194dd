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
        muon = ShardedMuon if hasattr(by_muon[0], "full_tensor") else torch.optim.Muon
        found.append(muon([group], lr=cfg.learning_rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return found


def muon_takes(name: str, p: torch.Tensor) -> bool:
    """Whether Muon steps this parameter: a matrix inside a block."""
    return name.startswith("blocks.") and p.dim() == 2


class ShardedMuon(torch.optim.Muon):
    """Muon over matrices of which each process holds some rows (FSDP).

    Orthogonalising takes the whole matrix. Momentum stays in shares; one update at a time is gathered, orthogonalised
    in every process alike and cut again: one exchange a matrix, where DTensor would make one in every Newton-Schulz
    iteration. The state is torch.optim.Muon's.
    """

    @torch.no_grad()
    def step(self):
        from torch.distributed.tensor import DTensor, Replicate

        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                momentum = state.setdefault("momentum_buffer", torch.zeros_like(p.grad))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                whole = nn.Parameter(torch.zeros(p.shape, dtype=p.dtype, device=p.device))
                whole.grad = p.grad.lerp(momentum, group["momentum"]).full_tensor()  # Nesterov's
                settings = {name: group[name] for name in ("lr", "adjust_lr_fn", "ns_coefficients", "ns_steps", "eps")}
                # From zero, without momentum and decay, a step of torch's is the update and nothing else.
                torch.optim.Muon([whole], momentum=0.0, nesterov=False, weight_decay=0.0, **settings).step()
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(
                    DTensor.from_local(whole.detach(), p.device_mesh, [Replicate()]).redistribute(
                        p.device_mesh, p.placements
                    )
                )


def learning_rate_at(step: int, cfg) -> float:
    """Linear warm-up, then constant, or falling to min_lr_ratio at max_steps. Never 0 at step 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    share = (step - cfg.warmup_steps) / max(cfg.max_steps - cfg.warmup_steps, 1)  # 0 .. 1
    fall = 1 - share if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * fall)
