"""Gated low-rank adapters: an AR network that also drafts, and stays what it was.

A chosen matrix W gets two thin ones, A and B. Where the gate is on, its output is
W x + alpha / rank B A x (arXiv 2106.09685). Where it is off, it is W x to the bit. The gate is on
at mask positions only, and a mask is a learned vector in place of an embedding (arXiv 2507.11851).
So one call verifies tokens with the frozen network and drafts the next ones.
"""

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configurator import from_stored, one_line, require, setting, validate
from infra.checkpoint import write_atomically
from model import KVCache, Transformer, model_from_state_dict

FILE = "adapter.safetensors"
SLOTS = 128  # sizes of caches are multiples of it
FORMAT = "ar2diff-adapter"  # the key of the settings in the file


@dataclass
class AdapterConfig:
    """What an adapter consists of. In its file."""

    masks: int = setting(3, "tokens drafted in one call", minimum=1, maximum=15)
    rank: int = setting(32, "of the adapters", minimum=1, maximum=4096)
    alpha: float = setting(32.0, "their factor is alpha / rank", above=0)

    __post_init__ = validate


class Gate:
    """Where the adapters of a network are on: (T, 1) bool, or None. first: where they begin."""

    on: Tensor | None = None
    first: int = 0


class GatedLinear(nn.Linear):
    """A frozen nn.Linear with a low-rank term at the positions where the gate is on."""

    def add_adapter(self, cfg: AdapterConfig, gate: Gate) -> None:
        self.gate = gate
        self.scale = cfg.alpha / cfg.rank
        like = dict(device=self.weight.device, dtype=torch.float32)
        a = torch.randn(cfg.rank, self.in_features, **like) * self.in_features**-0.5
        self.adapter_a = nn.Parameter(a)
        self.adapter_b = nn.Parameter(torch.zeros(self.out_features, cfg.rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.gate.on is None else self.change(x, y)

    def change(self, x: Tensor, y: Tensor) -> Tensor:
        """Return y with the low-rank term of x where the gate is on."""
        low = F.linear(x, self.adapter_a.to(x.dtype))  # (B, T, rank)
        change = F.linear(low, self.adapter_b.to(x.dtype))
        return torch.where(self.gate.on, torch.add(y, change, alpha=self.scale), y)


class DraftModel(nn.Module):
    """A frozen AR network with adapters and mask vectors. It shares the weights of the model."""

    def __init__(self, model: Transformer, adapter: AdapterConfig):
        super().__init__()
        self.cfg = model.cfg
        self.adapter = adapter
        self.gate = Gate()
        self.network = model_from_state_dict(self.cfg, model.state_dict()).requires_grad_(False)
        self.tok = self.network.tok
        self.run_blocks = self.network.run_blocks
        self.fixed_cache = False  # of one size, for compiled code
        for layer in self.network.blocks.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = GatedLinear
                layer.add_adapter(adapter, self.gate)
        weight = self.tok.weight.float()
        vectors = torch.randn(adapter.masks, self.cfg.n_embd, device=weight.device) * weight.std()
        self.mask_vectors = nn.Parameter(vectors)  # (masks, C)
        # All that is not the frozen network's.
        self.learned = {name: p for name, p in self.named_parameters() if p.requires_grad}

    def encode(self, prefix: Tensor, room: int) -> "RowCache":
        """Read the prefix (B, P), pads anywhere. room: for later tokens of a row."""
        pads = prefix == self.cfg.pad_id
        order = pads.long().argsort(dim=1, stable=True)  # pads last
        cache = self.network.encode(prefix.gather(1, order))
        return RowCache(cache, (~pads).sum(1), room, self.fixed_cache)

    def read(self, tokens, number, offset, edges, cache: "RowCache") -> Tensor:
        """Return the last layer (B, T, C) of tokens (B, T), of which some are masks.

        number (T,): 0 for a token, j for the j-th mask after one. edges: see RowCache.start.
        offset (T,) or (B, T): positions, counted from the end of the accepted tokens.
        """
        network = self.network
        mask = cache.start(edges)
        position = cache.lengths[:, None] + offset  # (B, T)
        position = position.clamp(max=self.cfg.block_size - 1)  # later ones are not used
        is_mask = (number > 0)[:, None]  # (T, 1)
        vectors = self.mask_vectors[(number - 1).clamp(min=0)]  # (T, C)
        x = network.tok(tokens)
        x = torch.where(is_mask, vectors.to(x.dtype), x)
        rope = None
        if self.cfg.position == "learned":
            x = x + network.pos(position)
        else:
            rope = network.rope[:, position, :].to(x.dtype)[:, :, None]  # (2, B, 1, T, D)
        self.gate.on = is_mask if bool(is_mask.any()) else None
        self.gate.first = int(is_mask.int().argmax())
        try:
            return self.run_blocks(x, rope, mask, False, cache)
        finally:
            self.gate.on = None


class RowCache(KVCache):
    """Keys and values of rows that grow independently: slot i of a row is its position i.

    New ones are written after the first lengths[b] of row b. The caller raises lengths by what it
    accepts. The next call overwrites the rest.
    """

    def __init__(self, cache: KVCache, lengths: Tensor, room: int, fixed: bool):
        super().__init__(len(cache.k), -(-(cache.length + room) // SLOTS) * SLOTS)
        self.fixed = fixed
        self.lengths = lengths  # (B,)
        room = self.reserve - cache.length
        self.k = [k if k is None else F.pad(k, (0, 0, 0, room)) for k in cache.k]
        self.v = [v if v is None else F.pad(v, (0, 0, 0, room)) for v in cache.v]

    def start(self, edges: Tensor) -> Tensor:
        """Return which slots T new tokens attend to, (B, 1, T, S) bool.

        edges (T, W) or (B, T, W): to which of the W tokens after the accepted ones. The new ones
        are the last T of them.
        """
        T, W = edges.shape[-2:]
        start = self.lengths[:, None]  # (B, 1)
        self.slots = start + torch.arange(W - T, W, device=edges.device)  # (B, T)
        self.length = self.reserve if self.fixed else int(self.slots.max()) + 1
        place = torch.arange(self.length, device=edges.device) - start  # (B, S)
        place = place[:, None].expand(-1, T, -1)  # (B, T, S)
        edges = edges.expand(len(place), -1, -1).gather(2, place.clamp(0, W - 1))
        return ((place < 0) | (edges & (place < W)))[:, None]

    def only(self, layer: int) -> "RowCache":
        """Return a cache of this layer alone, with the same memory."""
        other = copy.copy(self)
        other.k, other.v = self.k[layer : layer + 1], self.v[layer : layer + 1]
        return other

    def extend(self, layer: int, k: Tensor, v: Tensor):
        """Write k, v (B, H, T, D). Return the keys and values of all slots."""
        B, H, _, D = k.shape
        row = torch.arange(B, device=k.device)[:, None]
        for buffers, new in ((self.k, k), (self.v, v)):
            if buffers[layer] is None:  # no prefix
                buffers[layer] = new.new_zeros(B, H, self.reserve, D)
            buffers[layer][row, :, self.slots] = new.transpose(1, 2)
        return self.k[layer][:, :, : self.length], self.v[layer][:, :, : self.length]


def check_model(model: Transformer, path: str) -> None:
    """Raise ValueError unless the model of a checkpoint can get adapters."""
    cfg = model.cfg
    usable = cfg.paradigm == "ar" and cfg.arch == "decoder_only"
    kind = f"paradigm={cfg.paradigm}, arch={cfg.arch}"
    require(usable, f"{path}: drafts need a decoder-only AR model, got {kind}")


def digest(model: nn.Module) -> str:
    """Return the sha256 of all weights of a model."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def save_adapter(path: Path, model: DraftModel, weights: str) -> None:
    """Write the adapter alone, in bfloat16. weights: the digest of the frozen network."""
    from hf import optional as package

    about = {"weights": weights, "adapter": asdict(model.adapter)}
    tensors = {name: p.data.cpu().bfloat16() for name, p in model.learned.items()}
    content = package("safetensors.torch").save(tensors, {FORMAT: json.dumps(about)})
    write_atomically(path, lambda file: file.write(content))


def load_adapter(path: str | Path, model: Transformer) -> DraftModel:
    """Return the model with the adapter in a file or folder.

    Raises ValueError if the file is missing, damaged, or of other weights.
    """
    from hf import optional as package

    path = Path(path)
    path = path / FILE if path.is_dir() else path
    hint = "make one with python -m extras.draft"
    require(path.is_file(), f"{path}: no such adapter; {hint}")
    try:
        with package("safetensors").safe_open(path, "pt") as file:
            about = json.loads(file.metadata()[FORMAT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:  # damaged bytes raise nearly anything
        reason = one_line(error)[:120]
        raise ValueError(f"{path}: damaged, or no adapter ({reason}); {hint}") from None
    theirs, ours = str(about["weights"]), digest(model)
    digests = f"weights {theirs[:12]}, this model has {ours[:12]}"
    require(theirs == ours, f"{path}: the adapter belongs to another model ({digests}); {hint}")
    drafter = DraftModel(model, from_stored(AdapterConfig, about["adapter"], str(path)))
    shapes = [{(n, tensor.shape) for n, tensor in p.items()} for p in (tensors, drafter.learned)]
    wrong = sorted(name for name, _ in shapes[0] ^ shapes[1])
    require(not wrong, f"{path}: {wrong[:1]} does not fit {about['adapter']}; {hint}")
    drafter.load_state_dict(tensors, strict=False)  # the network has its weights
    # Of the same dtype, and learnable: otherwise autocast would cast them in each call.
    return drafter.to(model.tok.weight.dtype).requires_grad_().eval()
