"""Others' loops around our network: with checkouts made up here, for theirs are not part of this repository."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import autoregressive
from eval import peers, timing
from eval.decoders import GPT2, Networks, Setting, Shapes, System

SETTING = Setting("float32", 2, 8)
# What eval/peers.py uses of each checkout, written for this test: file -> source.
CHECKOUTS = {
    "LLaDA/generate.py": """
import torch

def generate(model, prompt, steps, gen_length, block_length, temperature, mask_id):
    assert gen_length == block_length and model.device == prompt.device
    x = torch.cat([prompt, torch.full((len(prompt), gen_length), mask_id)], dim=1)
    for step in range(steps):
        best = model(x, attention_mask=None).logits.argmax(-1)
        x = torch.where(x == mask_id, best, x)
    return x
""",
    "dllm/dllm/__init__.py": "raise ImportError('needs what no test has')",
    "dllm/dllm/core/__init__.py": "raise ImportError('needs what no test has')",
    "dllm/dllm/core/samplers/__init__.py": "",
    "dllm/dllm/core/samplers/mdlm.py": """
from dataclasses import dataclass
import torch

@dataclass
class MDLMSamplerConfig:
    max_new_tokens: int
    block_size: int
    steps: int

@dataclass
class MDLMSampler:
    model: object
    tokenizer: object

    def sample(self, inputs, config):
        prompt = torch.stack(inputs)
        x = torch.cat([prompt, torch.full((len(prompt), config.max_new_tokens), self.tokenizer.mask_token_id)], dim=1)
        for step in range(config.steps):
            logits = self.model(x, attention_mask=torch.ones_like(x)).logits
        return logits.argmax(-1)
""",
    "mdlm/noise_schedule.py": "class LogLinearNoise: pass",
    "mdlm/diffusion.py": """
import hydra.utils, lightning as L, torch, torchmetrics, dataloader, models, noise_schedule, utils

class NLL(torchmetrics.aggregation.MeanMetric): pass

class Diffusion(L.LightningModule):
    def __init__(self): raise NotImplementedError

    def _sample(self, num_steps):
        assert isinstance(self.noise, noise_schedule.LogLinearNoise)
        x = torch.full((self.config.loader.eval_batch_size, self.config.model.length), self.mask_index).to(self.device)
        for step in range(num_steps + self.config.sampling.noise_removal):
            logits = self.backbone(x, None)
        return logits.argmax(-1)
""",
    "gpt-fast/generate.py": """
import torch
from model import Transformer
from tokenizer import get_tokenizer
torch._inductor.config.coordinate_descent_tuning = True

def generate(model, prompt, max_new_tokens, batch_size, *, interactive, draft_model, temperature, top_k):
    x = prompt.view(1, -1).repeat(batch_size, 1)
    model.setup_caches(max_batch_size=batch_size, max_seq_length=x.shape[1] + max_new_tokens)
    new = model(x, torch.arange(x.shape[1]))[:, -1].argmax(-1, keepdim=True).int()
    for i in range(max_new_tokens):
        x = torch.cat([x, new], dim=1)
        new = model(new, torch.tensor([x.shape[1] - 1]))[:, -1].argmax(-1, keepdim=True).int()
    return x
""",
}


def networks() -> Networks:
    shapes = Shapes(prompt=3, long_prompt=3, new=8)
    return Networks(GPT2 | dict(n_layer=1, n_head=2, n_embd=16, vocab_size=40), shapes, 8, timing.CPU, seed=0)


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("peers")
    for name, source in CHECKOUTS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source)
    return folder


def system(name: str, folder: Path, kind: str):
    """(what that peer writes, our model, the prompt)."""
    made = networks()
    model, prefix = made.get(System(kind), SETTING), made.prompt(SETTING.batch, 3)
    call = peers.SYSTEMS[name](folder / peers.PEERS[name][0], model, prefix, SETTING.length)
    return call(), model, prefix


@pytest.mark.parametrize("name, calls", [("LLaDA, temperature 0", 10), ("dLLM, temperature 0", 10), ("MDLM", 11)])
def test_their_diffusion_loop_calls_our_network(name, calls, checkouts, monkeypatch):
    """Each step, on the whole sequence, all visible to all: what it gets is our joint network's answer."""
    read, answer = [], peers.AsCausalLM.__call__

    def spied(self, ids, attention_mask=None):
        read.append(ids)
        return answer(self, ids, attention_mask)

    monkeypatch.setattr(peers.AsCausalLM, "__call__", spied)
    text, model, prefix = system(name, checkouts, "joint")
    assert len(read) == calls
    masks = torch.full((2, 8), model.cfg.mask_id)
    first = masks if name == "MDLM" else torch.cat([prefix, masks], dim=1)
    assert torch.equal(read[0], first)
    new = model(first[:, :0], first).argmax(-1)[:, -8:]
    assert torch.equal(text[:, -8:], new)


def test_their_ar_loops_write_what_ours_does(checkouts):
    """gpt-fast repeats its first prompt; transformers runs its own network with our weights."""
    text, model, prefix = system("gpt-fast", checkouts, "AR")
    ours = autoregressive.generate(model, prefix, autoregressive.SamplerConfig()).tokens
    assert torch.equal(text[:, -8:], ours[:1].expand(2, -1))
    pytest.importorskip("transformers")
    text, model, prefix = system("transformers", checkouts, "AR")
    assert torch.equal(text[:, -8:], ours)


def test_a_peer_leaves_nothing_behind(checkouts):
    """No empty module under a name that others may import, no option of the compiler."""
    before, tuning = set(sys.modules), torch._inductor.config.coordinate_descent_tuning
    for name in ("gpt-fast", "MDLM", "dLLM, temperature 0"):
        system(name, checkouts, "AR" if name == "gpt-fast" else "joint")
    left = {name for name in set(sys.modules) - before if not name.startswith(("peer_", "dllm.core.samplers"))}
    assert not left & {"model", "tokenizer", "hydra", "lightning", "torchmetrics", "utils", "models", "noise_schedule"}
    assert torch._inductor.config.coordinate_descent_tuning == tuning


def test_a_line_for_each_peer_and_each_form_of_ours(checkouts, capsys):
    pytest.importorskip("transformers")
    measure = [checkouts, networks(), replace(SETTING, batch=1), 1]
    lines = list(peers.peer_lines(*measure, speed_up=lambda model: model))
    assert [(line.base, line.system) for line in lines] == [
        *[
            ("transformers", "ours"),
            ("transformers", "ours, compiled"),
            ("gpt-fast", "ours"),
            ("gpt-fast", "ours, compiled"),
        ],
        *[(name, ours) for name in list(peers.PEERS)[2:] for ours in ("ours", "ours, joint")],
    ]
    assert all(line.rate and len(line.ratios) == 1 for line in lines)
    assert not list(peers.peer_lines(*measure, there={line.case for line in lines})), "measured already"
    many = list(peers.peer_lines(checkouts, networks(), SETTING, 1))
    assert [line.base for line in many] == ["transformers", "gpt-fast"], "a canvas fills the machine with one row"
    fewer = list(peers.peer_lines(checkouts / "LLaDA", networks(), SETTING, 1))
    assert {line.base for line in fewer} == {"transformers"} and "gpt-fast left out" in capsys.readouterr().out
