"""eval/bound.py against all paths of a tiny process and D3PM's matrices."""

import json
import math
from itertools import product

import pytest
import torch
from eval_models import save_model, save_pairs
from torch import nn
from torch.nn import functional as F

from diffusion import align_logits
from eval import bound
from eval.bound import BoundConfig, step_nats, target_nats
from model import ModelConfig, Transformer

# Three values a slot may hold (two words and pad), two slots, so that every path can be walked.
WORDS = dict(vocab_size=6, n_ordinary=2, pad_id=2, sep_id=3, mask_id=4)
WORDS |= dict(block_size=8, target_length=3)
SMALL = dict(n_layer=1, n_head=2, n_embd=8)
K, S, PREFIX = 3, 2, [0, 1]
TEXTS = list(product(range(K), repeat=S))  # every target
NOISES = ["uniform", "mask"]
DIFFUSION = dict.fromkeys(("prefix_attention", "target_attention"), "bidirectional")
DIFFUSION |= dict(paradigm="diffusion")


def peaked(noise: str, **settings) -> Transformer:
    """A random network that is sure of itself, so that a wrong term shows."""
    torch.manual_seed(0)
    settings = DIFFUSION | WORDS | SMALL | settings | dict(noise=noise)
    model = Transformer(ModelConfig(**settings)).eval()
    with torch.no_grad():
        model.tok.weight *= 5
    return model


def unequal(noise: str) -> tuple[nn.Module, torch.Tensor]:
    """(a network that reads the data and the time, the data): independent slots with these chances.

    By Bayes, the token that a slot holds is 1 + K a / (1 - a) times as probable as without it.
    """
    chances = torch.tensor([0.7, 0.2, 0.1], dtype=torch.double)
    log_p = torch.cat([chances.log(), torch.tensor([5.0, 6.0, 7.0])])  # banned ids have the most
    model = nn.Module()
    model.cfg = ModelConfig(**DIFFUSION | WORDS, noise=noise)

    def forward(prefix, target):
        own = F.one_hot(target, 6) * (target < K)[..., None] * (noise == "uniform")
        return log_p + own * math.log(1 + K * model.keep / (1 - model.keep))

    model.forward = forward
    return model, chances


def states(m) -> torch.Tensor:
    """(N, S) every canvas there can be, as token ids."""
    values = [0, 1, 2, m.mask_id] if m.noise == "mask" else [0, 1, 2]
    return torch.tensor(list(product(values, repeat=S)))


@torch.no_grad()
def logits_of(model, canvases, keep: float) -> torch.Tensor:
    """Logits (N, S, V) of the network at each canvas (N, S), and at the time of `keep`."""
    N = len(canvases)
    model.keep = keep
    target = torch.cat([torch.full((N, 1), model.cfg.sep_id), canvases], dim=1)
    return align_logits(model(torch.tensor(PREFIX).expand(N, -1), target), model.cfg.shift)


# The oracle: D3PM's matrices (arXiv 2107.03006, section 3), from row to column, and every path.


def corruption(m, keep: float) -> torch.Tensor:
    """(V', V') of one slot: keep the value or draw noise. V' is K, plus 1 for a mask token."""
    n = K + (m.noise == "mask")
    stay = torch.eye(n, dtype=torch.double)
    noise = torch.full_like(stay, 1 / n) if m.noise == "uniform" else stay[-1].expand(n, n)
    return keep * stay + (1 - keep) * noise


def way_back(m, t: int, T: int) -> torch.Tensor:
    """q(x_{t-1} = j | x_t = z, x_0 = i) as (i, z, j); nan where z cannot come of i."""
    once = corruption(m, (1 - t / T) / (1 - (t - 1) / T))
    before, now = corruption(m, 1 - (t - 1) / T), corruption(m, 1 - t / T)
    return once.T[None] * before[:, None, :] / now[:, :, None]


def reverse(model, t: int, cfg) -> torch.Tensor:
    """p(x_{t-1} = j | x_t) of each slot of each canvas, (N, S, V'): the mixture of way_back."""
    m, canvases, a = model.cfg, states(model.cfg), 1 - t / cfg.noise_steps
    seen = F.one_hot(column(m, canvases), K + 1)[..., :K].double()  # (N, S, K), zeros at a mask
    logits = logits_of(model, canvases, a)[..., :K].double()
    if m.noise == "mask":
        visible = seen.sum(-1, keepdim=True) > 0  # a visible token is right
        logits = logits.masked_fill(visible & (seen == 0), -math.inf)
    paths = way_back(m, t, cfg.noise_steps)[:K, column(m, canvases)]  # (K, N, S, V')
    return torch.einsum("nsi,insj->nsj", logits.softmax(-1), paths.nan_to_num())


def column(m, tokens):
    """Token ids as columns of the matrices."""
    return torch.where(tokens == m.mask_id, K, tokens)


def true_nats(model, cfg) -> list[float]:
    """-log p(x_0) of each of TEXTS under the reverse process, all paths added up."""
    m, canvases = model.cfg, states(model.cfg)
    mass = corruption(m, 0.0)[0, column(m, canvases)].prod(1)  # (N,) the noise that all begins with
    for t in range(cfg.noise_steps, 0, -1):
        slots = reverse(model, t, cfg)  # (N, S, V')
        steps = [slots[:, s, column(m, canvases)[:, s]] for s in range(S)]
        mass = mass @ torch.stack(steps).prod(0)  # (N, N)
    found = {tuple(canvas): p for canvas, p in zip(canvases.tolist(), mass.tolist())}
    assert sum(found[text] for text in TEXTS) == pytest.approx(1, abs=1e-12)
    return [-math.log(found[text]) for text in TEXTS]


def exact_bound(model, cfg) -> list[float]:
    """The bound for each of TEXTS: step_nats over all t and canvases, weighed with q(x_t | x_0)."""
    m, canvases = model.cfg, states(model.cfg)
    totals = [0.0] * len(TEXTS)
    for t in range(1, cfg.noise_steps + 1):
        keep = 1 - t / cfg.noise_steps
        logits = logits_of(model, canvases, keep)
        for i, text in enumerate(torch.tensor(TEXTS)):
            q = corruption(m, keep)[text, column(m, canvases)].prod(1)  # (N,)
            totals[i] += float(q @ all_nats(logits, text, t, cfg, m).sum(1))
    return totals


def all_nats(logits, text, t: int, cfg, m) -> torch.Tensor:
    """step_nats of one text from every canvas, (N, S); its slots are independent."""
    canvases = states(m)
    rows = logits.flatten(0, 1), text.repeat(len(canvases)), canvases.flatten()
    return step_nats(*rows, t, cfg, m).view(canvases.shape)


# The bound


@pytest.mark.parametrize("noise", NOISES)
def test_a_step_costs_what_the_matrices_say(noise):
    model, cfg = peaked(noise), BoundConfig(noise_steps=3)
    m, canvases = model.cfg, states(model.cfg)
    for t in (1, 2, 3):
        logits = logits_of(model, canvases, 1 - t / 3)
        ours = reverse(model, t, cfg).log()
        for text in torch.tensor(TEXTS):
            clean = text[None].expand(len(canvases), -1)
            true = way_back(m, t, 3)[clean, column(m, canvases)]  # (N, S, V')
            expected = F.kl_div(ours, true, reduction="none").nansum(-1)
            found = all_nats(logits, text, t, cfg, m)
            possible = corruption(m, 1 - t / 3)[text, column(m, canvases)] > 0
            torch.testing.assert_close(found[possible], expected[possible], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("noise", NOISES)
def test_the_bound_is_above_all_paths_added_up(noise, steps):
    cfg, model = BoundConfig(noise_steps=steps), peaked(noise)
    gaps = [b - true for b, true in zip(exact_bound(model, cfg), true_nats(model, cfg))]
    if noise == "mask" and steps == 1:  # one canvas, all masks: nothing to bound
        assert max(map(abs, gaps)) < 1e-9
    else:
        assert min(gaps) > 1e-6


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("noise", NOISES)
def test_the_bound_is_tight_where_the_way_back_is_the_true_one(noise, steps):
    model, chances = unequal(noise)
    cfg = BoundConfig(noise_steps=steps)
    found, true = exact_bound(model, cfg), true_nats(model, cfg)
    data = [-chances[list(text)].log().sum().item() for text in TEXTS]
    assert found == pytest.approx(true, abs=1e-9) and found == pytest.approx(data, abs=1e-7)


# Its estimate


@pytest.mark.parametrize("settings", [{}, dict(prefix_attention="joint", shift=True)])
@pytest.mark.parametrize("noise", NOISES)
def test_draws_estimate_the_exact_bound(noise, settings):
    """Two draws for three steps: the parts that t is drawn from cut a step in two.

    All texts are pooled, because 50 copies of one text underestimate their error.
    """
    model, cfg = peaked(noise, **settings), BoundConfig(noise_steps=3, draws=2)
    pairs = [(PREFIX, list(text)) for text in TEXTS for _ in range(50)]
    text, pads = target_nats(model, pairs, range(len(pairs)), cfg, batch_size=999)
    found = (torch.tensor(text) + torch.tensor(pads)).view(len(TEXTS), 50)
    error = (found.var(1).mean() / found.numel()) ** 0.5
    exact = torch.tensor(exact_bound(model, cfg)).mean()
    assert abs(found.mean() - exact) < 4 * error < 0.5 * exact


@pytest.mark.parametrize("noise", NOISES)
def test_batching_and_company_change_no_draw(noise):
    """A pair's number depends on its example index, not on where or with whom it is read."""
    model = peaked(noise)
    pairs = [([i % 2] * (i % 4), list(text)) for i, text in enumerate(TEXTS)]  # 0 to 3 tokens
    examples = [10 * i for i in range(9)]
    cfg = BoundConfig(noise_steps=4, draws=3)
    text, pads = target_nats(model, pairs, examples, cfg, batch_size=9)
    close = dict(rel=1e-4, abs=1e-4)
    for size in (1, 2, 4):
        again = target_nats(model, pairs, examples, cfg, batch_size=size)
        assert again[0] == pytest.approx(text, **close) and again[1] == pytest.approx(pads, **close)
    few = target_nats(model, pairs[5:7], examples[5:7], cfg)
    assert few[0] == pytest.approx(text[5:7], **close)
    assert target_nats(model, pairs, examples, cfg, seed=1)[0] != pytest.approx(text, rel=1e-2)


# The command

ITEMS = [("ab", "x"), ("a", "xyz"), ("abc", "é"), ("", "xy"), ("b", "z")]
CHECKPOINTS = {
    "ar": {},
    "uniform": DIFFUSION | dict(self_conditioning=True),
    "mask": DIFFUSION | dict(noise="mask"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_command_says_what_its_number_is(tmp_path, capsys, name):
    save_pairs(tmp_path / "pairs", ITEMS, 5, 12)
    sizes = dict(block_size=12, target_length=5)
    save_model(tmp_path / "a.pt", tmp_path / "pairs", **sizes, **CHECKPOINTS[name])
    out = tmp_path / "a.json"
    argv = [f"--init_from={tmp_path}/a.pt", "--noise_steps=3", "--draws=3", "--seed=2"]
    found = bound.main([*argv, f"--json={out}"])
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    counts = (5, 2, 2 + 4 + 3 + 3 + 2, 1 + 3 + 2 + 2 + 1)
    assert tuple(found[key] for key in ("n", "seed", "n_tokens", "n_bytes")) == counts
    assert [found["settings"][part] for part in ("noise_steps", "draws")] == [3, 3]
    assert found["measure"].startswith("exact" if name == "ar" else "upper bound")
    assert {"command", "settings", "commit", "torch", "hardware", "dataset"} <= set(found)
    nats = found["nats_per_slot"]["value"] * 5 * 4
    assert nats == pytest.approx(found["nats_per_token"]["value"] * counts[2])
    assert nats == pytest.approx(found["bits_per_byte"]["value"] * counts[3] * math.log(2))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "bits_per_byte" in lines[3]
    rounded = bound.main([*argv, "--dtype=bfloat16"])["nats_per_slot"]["value"]
    assert 0 < abs(rounded * 5 * 4 - nats) < 0.01 * nats


def test_standard_errors_belong_to_their_pairs():
    """3 nats in 2 tokens and 5 in 4: 8 / 6 a token, residuals +-1/3: sqrt(2 x 2/9) / 6 = 1/9."""
    found = bound.rate_with_error([2.0, 4.0], [1.0, 1.0], [2, 4])
    expected = {"value": 4 / 3, "standard_error": 1 / 9, "of_which_pads": 1 / 3}
    assert found == pytest.approx(expected)
    assert bound.rate_with_error([1.0], [0.0], [1])["standard_error"] is None
