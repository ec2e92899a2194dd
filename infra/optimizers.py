"""What turns a gradient into a step: AdamW, or Muon beside it, and the learning rate of each step."""

import math

import torch
from torch import nn

from device import computes_bfloat16


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
        ours = hasattr(by_muon[0], "full_tensor") or not computes_bfloat16(by_muon[0].device)
        muon = Muon if ours else torch.optim.Muon
        found.append(muon([group], lr=cfg.learning_rate, momentum=0.95, adjust_lr_fn="match_rms_adamw"))
    return found


def muon_takes(name: str, p: torch.Tensor) -> bool:
    """Whether Muon steps this parameter: a matrix inside a block."""
    return name.startswith("blocks.") and p.dim() == 2


class Muon(torch.optim.Muon):
    """Muon where torch's own will not do, as make_optimizers asks for it; state and result are the same to rounding.

    On a processor without bfloat16: torch orthogonalises in that format alone, which AVX2 computes a hundred times
    slower than float32. Over matrices of which each process holds some rows (FSDP): orthogonalising takes the whole
    matrix, so one update at a time is gathered, orthogonalised in every process alike and cut again, momentum staying
    in shares. DTensor would make an exchange in every Newton-Schulz iteration.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                momentum = self.state[p]["momentum_buffer"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(momentum, group["momentum"])  # Nesterov's
                sharded = hasattr(p, "full_tensor")
                update = orthogonalised(update.full_tensor() if sharded else update, group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                lr = group["lr"] * 0.2 * math.sqrt(max(p.shape))  # match_rms_adamw
                p.add_(shared_out(update, p) if sharded else update, alpha=-lr)


def orthogonalised(update: torch.Tensor, group: dict) -> torch.Tensor:
    """U V^T of update (rows, columns) = U S V^T, nearly: singular values come to lie in 0.7 to 1.2 (Newton-Schulz)."""
    a, b, c = group["ns_coefficients"]
    x = update.bfloat16() if computes_bfloat16(update.device) else update
    x = x.T if x.size(0) > x.size(1) else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if update.size(0) > update.size(1) else x).to(update.dtype)


def shared_out(whole: torch.Tensor, p):
    """whole (rows, columns), which every process holds, as a DTensor in the shares of p."""
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(whole, p.device_mesh, [Replicate()]).redistribute(p.device_mesh, p.placements)


def learning_rate_at(step: int, cfg) -> float:
    """Linear warm-up, then constant, or falling to min_lr_ratio at max_steps. Never 0 at step 0."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.learning_rate
    share = (step - cfg.warmup_steps) / max(cfg.max_steps - cfg.warmup_steps, 1)  # 0 .. 1
    fall = 1 - share if cfg.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
    return cfg.learning_rate * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * fall)
