"""diffusion.py: what tells AR2Diff from a look-alike, and samplers against models whose answer is known."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import autoregressive
import diffusion
import samplers
from data.objectives import Batch
from diffusion import LossConfig, SamplerConfig, corrupt, generate, loss, losses, readout
from draws import CANVAS, CONDITION, CORRUPT, SAMPLE, UNROLL, Draws, draw_tokens, draws_for, noise_tokens
from model import ModelConfig, Transformer
from samplers import SAMPLERS, State

ORDINARY, PAD, SEP, MASK, V, S = 10, 10, 11, 12, 15, 8  # 13 and 14 are sentinels; S slots after the separator
SIZES = dict(vocab_size=V, n_ordinary=ORDINARY, pad_id=PAD, sep_id=SEP, mask_id=MASK, eos_id=-1, target_length=S + 1)
DEFAULTS = SIZES | dict(noise="uniform", shift=False, self_conditioning=False)
DEFAULTS |= dict(prefix_attention="bidirectional", block_size=64)
ALL = list(SAMPLERS)
FEW = dict(steps=6, candidates=1)


class Cache(SimpleNamespace):
    def rows(self, index):
        return Cache(prefix=self.prefix[index])


class Fake:
    """Anything with encode and decode is a model: answer(prefix, canvas) gives logits (B, S, V) of the slots."""

    def __init__(self, answer, **settings):
        self.cfg, self.answer = SimpleNamespace(**DEFAULTS | settings), answer
        self.embedding = torch.randn(V, 4, generator=torch.Generator().manual_seed(2))
        self.read, self.estimates, self.early = [], [], self.cfg.shift

    def __call__(self, prefix, target, estimate=None, opened=None):
        return self.decode(self.encode(prefix), target, estimate=estimate)

    def encode(self, prefix, room=0):
        return Cache(prefix=prefix)

    def decode(self, cache, target, estimate=None):
        self.read.append((cache.prefix.clone(), target.clone()))
        self.estimates.append(estimate)
        logits = self.answer(cache.prefix, target)
        other = torch.full_like(logits[:, :1], 7.0)  # of the position that predicts no slot
        return torch.cat([logits, other] if self.early else [other, logits], dim=1)

    def soft_embedding(self, logits):
        return logits.softmax(-1) @ self.embedding


def ids(*shape: int, seed: int = 0, high: int = ORDINARY) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


class Listening(Fake):
    """What it is told beside the canvas changes what it says."""

    def __init__(self, answer, **settings):
        super().__init__(answer, **settings, self_conditioning=True)

    def decode(self, cache, target, estimate=None):
        logits = super().decode(cache, target, estimate)
        return logits if estimate is None else logits + estimate[..., :1] * torch.arange(V) / 2


TEXTS = ids(40, S, seed=5)
TEXTS[:, 5:] = PAD


def truth(prefix, canvas, sure: float = 60.0) -> torch.Tensor:
    """Logits of a denoiser that knows the answer to every prefix (its first token), whatever the canvas says."""
    return sure * F.one_hot(TEXTS[prefix[:, 0]], V).float()


def babble(prefix, canvas) -> torch.Tensor:
    """Logits that hang on the canvas, row by row and exactly: a table of (token, token before, slot)."""
    table = torch.randn(S, V, V, V, generator=torch.Generator().manual_seed(9))
    slot = torch.arange(S).expand(len(canvas), S)
    return 2 * table[slot, canvas[:, 1:], canvas[:, :-1]]


def batch(B: int = 4, seed: int = 0) -> Batch:
    text = ids(B, S, seed=seed)
    text[:, 6:] = PAD
    return Batch(ids(B, 3, seed=1), torch.cat([torch.full((B, 1), SEP), text], dim=1), torch.arange(B))


def network(**settings) -> Transformer:
    torch.manual_seed(0)
    attention = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional", block_size=16)
    model = Transformer(ModelConfig(**SIZES | attention | dict(n_layer=2, n_head=2, n_embd=16) | settings)).double()
    for p in model.parameters():
        p.data *= 2
    if model.cfg.self_conditioning:
        nn.init.normal_(model.condition.weight)
    return model.eval()


def of(B: int, step: int = 0):
    return draws_for(0, torch.arange(B), step)


# Noise


@pytest.mark.parametrize("noise", ["uniform", "mask"])
def test_rate_0_corrupts_nothing_and_rate_1_leaves_nothing(noise):
    """At rate 1 the canvas is a function of the place alone: two texts give one canvas."""
    m, one, two = SimpleNamespace(**DEFAULTS | dict(noise=noise)), batch(50).target, batch(50, seed=3).target
    assert torch.equal(corrupt(one, torch.zeros(50, 1), m, of(50)), one)
    assert torch.equal(corrupt(one, torch.ones(50, 1), m, of(50)), corrupt(two, torch.ones(50, 1), m, of(50)))
    assert (corrupt(one, torch.ones(50, 1), m, of(50))[:, 0] == SEP).all()


def test_the_corrupted_share_is_the_rate():
    m, target = SimpleNamespace(**DEFAULTS | dict(noise="mask")), torch.zeros(2000, 21, dtype=torch.long)
    rate = torch.tensor([0.1, 0.5, 0.9]).repeat_interleave(2000)[:, None]
    hit = (corrupt(target.repeat(3, 1), rate, m, of(6000)) == MASK).float()
    share = hit[:, 1:].reshape(3, -1).mean(1)
    torch.testing.assert_close(share, torch.tensor([0.1, 0.5, 0.9]), atol=0.01, rtol=0)  # 0.01: four standard errors
    assert hit[:, 0].sum() == 0


def test_the_rate_of_a_row_is_uniform_on_0_to_1():
    """Share of a long row: mean 1/2, variance 1/12, and a tenth of the rows in each tenth."""
    target = torch.zeros(2000, 301, dtype=torch.long)
    seen = Fake(lambda prefix, canvas: torch.zeros(len(canvas), 300, V), noise="mask")
    next(losses(seen, Batch(target[:, :1], target, torch.arange(2000)), LossConfig(), of(2000)))
    share = (seen.read[0][1] == MASK).float()[:, 1:].mean(1)
    assert share.mean().item() == pytest.approx(0.5, abs=0.03) and share.var().item() == pytest.approx(1 / 12, abs=0.01)
    assert torch.histc(share, 10, 0, 1).min() > 140


def test_noise_is_ordinary_tokens_and_pad_each_about_equally_often():
    """11 values, 44,000 numbers; 29.6 is the 99.9% point of chi-square with 10 degrees of freedom."""
    m = SimpleNamespace(**DEFAULTS | dict(pad_id=13))  # pad need not follow the ordinary ids
    drawn = noise_tokens(of(200).uniform(0, 220)[0], m).flatten().bincount(minlength=V)
    allowed = drawn[[*range(ORDINARY), 13]]
    assert allowed.sum() == 44_000
    assert ((allowed - 4000.0) ** 2 / 4000).sum() < 29.6


@pytest.mark.parametrize("n", [10, 255, 256, 50256])
def test_the_largest_number_below_1_is_still_a_token(n):
    m = SimpleNamespace(noise="uniform", n_ordinary=n, pad_id=n, eos_id=-1)
    assert noise_tokens(torch.tensor([0.0, 1 - 2.0**-24]), m).tolist() == [0, n]


# Loss


@pytest.mark.parametrize("unroll_steps", [1, 2, 3])
@pytest.mark.parametrize("noise", ["uniform", "mask"])
@pytest.mark.parametrize("shift", [False, True], ids=["same", "shift"])
def test_a_model_that_knows_nothing_pays_log_v_per_pass(noise, unroll_steps, shift):
    model = network(tie_weights=False, noise=noise, shift=shift)
    nn.init.zeros_(model.head.weight)
    found = loss(model, batch(), LossConfig(unroll_steps=unroll_steps), of(4))
    assert found.item() == pytest.approx(unroll_steps * math.log(V), rel=1e-6)


@pytest.mark.parametrize("shift", [False, True], ids=["same", "shift"])
def test_slot_i_is_read_at_position_i_or_with_shift_at_the_one_before(shift):
    """The fake knows the target and writes it where the setting was; read at the other place it costs a lot."""
    model = Fake(lambda prefix, canvas: 60.0 * F.one_hot(batch().target[:, 1:], V), shift=shift)
    assert loss(model, batch(), LossConfig(), of(4)).item() < 1e-6
    model.cfg.shift = not shift
    assert loss(model, batch(), LossConfig(), of(4)).item() > 20


def test_loss_is_the_mean_over_clean_corrupted_and_pad_slots():
    model, rate = Fake(babble), torch.full((4, 1), 0.5)
    found = next(losses(model, batch(), LossConfig(), of(4), rate))
    log_p = babble(None, model.read[0][1]).log_softmax(-1)
    by_hand = [-log_p[b, s, batch().target[b, s + 1]].item() for b in range(4) for s in range(S)]
    assert found.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_the_prefix_is_clean_and_the_second_pass_reads_the_argmax_of_the_first():
    model = Fake(babble)
    loss(model, batch(), LossConfig(), of(4))
    (prefix, first), (prefix_again, second) = model.read
    assert torch.equal(prefix, batch().prefix) and torch.equal(prefix_again, batch().prefix)
    assert torch.equal(second[:, 1:], babble(None, first).argmax(-1))
    assert (first[:, 0] == SEP).all() and (second[:, 0] == SEP).all()
    assert not torch.equal(first, batch().target)


def test_at_unroll_temperature_1_the_second_pass_reads_a_sample():
    model = Fake(babble)
    loss(model, batch(), LossConfig(unroll_temperature=1.0), of(4))
    (_, first), (_, second) = model.read
    logits = babble(None, first)
    assert torch.equal(second[:, 1:], draw_tokens(logits, 1.0, of(4).uniform(UNROLL, S)[0]))
    assert not torch.equal(second[:, 1:], logits.argmax(-1))


def test_rates_are_uniform_unless_they_lean_toward_noise():
    """u ** k lies below x with probability x ** (1 / k); rows that start from noise alone are as many as asked for."""
    draws = draws_for(3, torch.arange(20_000))
    plain = diffusion.draw_rate(LossConfig(), draws)
    assert torch.equal(plain, draws.uniform(diffusion.RATE, 1)[0])
    shaped = diffusion.draw_rate(LossConfig(rate_exponent=0.5, full_noise_prob=0.25), draws)
    assert (shaped == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
    others = shaped[shaped < 1]
    assert [(others < x).float().mean().item() for x in (0.3, 0.7)] == pytest.approx([0.09, 0.49], abs=0.01)


def test_a_row_that_starts_from_noise_reads_what_a_sampler_would_write():
    """Canvases of noise alone, unrolled at the sampler's temperature: each pass reads the draw of the one before."""
    model, cfg = Fake(babble), LossConfig(full_noise_prob=1.0, unroll_steps=3, unroll_temperature=0.2)
    loss(model, batch(), cfg, of(4))
    (_, first), (_, second), (_, third) = model.read
    assert torch.equal(first[:, 1:], noise_tokens(of(4).uniform(CORRUPT, S + 1)[1], model.cfg)[:, 1:])
    for k, (before, after) in enumerate([(first, second), (second, third)]):
        drawn = draw_tokens(babble(None, before), 0.2, of(4).uniform(UNROLL, S, k)[0])
        assert torch.equal(after[:, 1:], drawn)


@pytest.mark.parametrize("told", [False, True], ids=["plain", "self_conditioning"])
def test_no_gradient_crosses_from_the_second_pass_to_the_first(told):
    """Gradient of L(1) + L(2) is that of L(1) plus that of L(2) on a fixed canvas and a fixed estimate."""
    model, data = network(self_conditioning=told), batch()

    def gradient(value):
        found = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found)]

    both = gradient(loss(model, data, LossConfig(), of(4)))
    canvas = corrupt(data.target, of(4).uniform(diffusion.RATE, 1)[0], model.cfg, of(4))
    logits = model(data.prefix, canvas)[:, 1:]
    one = gradient(F.cross_entropy(logits.flatten(0, 1), data.target[:, 1:].flatten()))
    with torch.no_grad():
        logits = model(data.prefix, canvas)[:, 1:]
        answer = torch.cat([data.target[:, :1], logits.argmax(-1)], dim=1)
        estimate = F.pad(logits.softmax(-1) @ model.tok.weight, (0, 0, 1, 0)) if told else None
    logits = model(data.prefix, answer, estimate=estimate)[:, 1:]
    two = gradient(F.cross_entropy(logits.flatten(0, 1), data.target[:, 1:].flatten()))
    for whole, a, b in zip(both, one, two):
        torch.testing.assert_close(whole, a + b)


FROZEN = dict(prefix_attention="bidirectional", shift=True, self_conditioning=True)


def test_a_kept_ar_loss_adds_its_weight_times_that_of_an_ar_model_to_every_gradient():
    """The oracle is autoregressive.loss of an AR model that has these weights."""
    model, data = network(**FROZEN), batch()
    sizes = SIZES | dict(n_layer=2, n_head=2, n_embd=16, block_size=16)
    ar = Transformer(ModelConfig(**sizes, prefix_attention="bidirectional")).double()
    ar.load_state_dict(model.state_dict(), strict=False)

    def gradient(module, value):
        names, parameters = zip(*module.named_parameters())
        return dict(zip(names, torch.autograd.grad(value, parameters, allow_unused=True)))

    kept = gradient(model, loss(model, data, LossConfig(ar_weight=0.7), of(4)))
    plain = gradient(model, loss(model, data, LossConfig(), of(4)))
    alone = gradient(ar, autoregressive.loss(ar, data, None, None))
    for name, whole in kept.items():
        torch.testing.assert_close(whole, plain[name] + 0.7 * alone[name] if name in alone else plain[name])
    terms = list(losses(model, data, LossConfig(ar_weight=0.7), of(4)))
    assert terms[2].item() == pytest.approx(0.7 * autoregressive.loss(ar, data, None, None).item(), rel=1e-6)


def test_the_diffusion_terms_are_the_same_to_the_bit_with_and_without_an_ar_loss():
    """Also while the mask opens: which edges are open then is none of the AR term's business."""
    model, data, opened = network(**FROZEN), batch(), torch.rand(S + 1, S + 1) < 0.5
    for edges in (None, opened):
        with_it = list(losses(model, data, LossConfig(ar_weight=1.0), of(4), opened=edges))
        without = list(losses(model, data, LossConfig(), of(4), opened=edges))
        assert len(with_it) == 3 and len(without) == 2
        assert all(torch.equal(a, b) for a, b in zip(with_it, without))
        assert torch.equal(with_it[2], diffusion.causal_loss(model, data))


def test_the_last_target_token_changes_the_first_logits():
    model, (prefix, target, _) = network(), batch()
    other = target.clone()
    other[:, -1] = 3
    assert ((model(prefix, target) - model(prefix, other))[:, 1].abs().amax(-1) > 1e-6).all()


def test_the_loss_at_fixed_rates_grows_with_the_rate_for_a_model_that_copies():
    model = Fake(lambda prefix, canvas: 5.0 * F.one_hot(canvas[:, 1:], V).float())
    found = diffusion.loss_by_rate(model, batch(200), LossConfig(), of(200), [0.0, 0.5, 1.0])
    assert list(found) == ["0.0", "0.5", "1.0"]
    assert found["0.0"] == pytest.approx(math.log1p(14 * math.exp(-5)), rel=1e-4)
    assert found["0.0"] < found["0.5"] < found["1.0"]


# Self-conditioning


@pytest.mark.parametrize("shift", [False, True], ids=["same", "shift"])
def test_the_second_pass_is_told_the_soft_answer_of_the_first(shift):
    model = Fake(babble, self_conditioning=True, shift=shift)
    loss(model, batch(), LossConfig(), of(4))
    first, second = model.estimates
    assert first is None
    soft = babble(None, model.read[0][1]).softmax(-1)
    by_hand = sum(soft[:, :, v : v + 1] * model.embedding[v] for v in range(V))
    torch.testing.assert_close(second[:, 1:], by_hand)
    assert (second[:, 0] == 0).all()  # the separator's slot was never predicted


def test_rows_that_are_not_told_get_zeros():
    model, cfg = Fake(babble, self_conditioning=True), LossConfig(self_conditioning_prob=0.5)
    loss(model, batch(40), cfg, of(40))
    told = (model.estimates[1] != 0).any(-1)[:, 1:]
    assert torch.equal(told, (of(40).uniform(CONDITION, 1)[0] < 0.5).expand(40, S))
    assert 10 < told[:, 0].sum() < 30


def test_generation_tells_each_step_the_soft_answer_of_the_last():
    model = Fake(babble, self_conditioning=True)
    generate(model, ids(3, 2), SamplerConfig(steps=3, candidates=2))
    assert model.estimates[0] is None and len(model.estimates) == 3
    for k in (1, 2):
        soft = babble(None, model.read[k - 1][1]).softmax(-1)
        torch.testing.assert_close(model.estimates[k], F.pad(soft @ model.embedding, (0, 0, 1, 0)))


# Samplers


@pytest.mark.parametrize("shift", [False, True], ids=["same", "shift"])
@pytest.mark.parametrize("noise", ["uniform", "mask"])
@pytest.mark.parametrize("sampler", ALL)
def test_a_denoiser_that_knows_the_text_is_believed(sampler, noise, shift):
    model, prefix = Fake(truth, noise=noise, shift=shift), torch.arange(5)[:, None]
    found = generate(model, prefix, SamplerConfig(sampler=sampler, steps=4, candidates=2))
    assert torch.equal(found.tokens, TEXTS[:5])
    assert found.score.max() < 1e-6


@pytest.mark.parametrize("model", [Fake, Listening])
@pytest.mark.parametrize("settings", [{}, dict(update_fraction=0.5), dict(candidates=3)], ids=str)
@pytest.mark.parametrize("sampler", ALL)
def test_a_row_says_the_same_alone_and_among_eight_even_after_rows_have_left(sampler, settings, model):
    """Half of the prefixes are known and settle at once; what stays must go on as if nothing had happened."""

    def half(prefix, canvas):
        return torch.where((prefix[:, 0] % 2 == 0)[:, None, None], truth(prefix, canvas), babble(prefix, canvas))

    cfg = replace(SamplerConfig(sampler=sampler, **FEW), **settings)
    prefix, example = torch.arange(8)[:, None], torch.arange(30, 38)
    together = generate(model(half), prefix, cfg, seed=2, example=example)
    for i in range(8):
        alone = generate(model(half), prefix[i : i + 1], cfg, seed=2, example=example[i : i + 1])
        for one, all_of_them in zip(alone, together):
            torch.testing.assert_close(one[0], all_of_them[i])
    assert sampler == "resample" or together.calls[0] < together.calls[1]  # rows did leave
    assert not torch.equal(generate(model(half), prefix, cfg, seed=3, example=example).tokens, together.tokens)


def test_the_sampler_of_the_paper_is_noise_and_then_draws_of_every_slot_at_every_step():
    """Done again by hand, each number by its place (seed, example, candidate, step)."""
    model, found = Fake(babble), []
    cfg = SamplerConfig(steps=3, candidates=2, temperature=1.0)
    generate(model, ids(2, 2), cfg, seed=4, example=torch.tensor([9, 5]), on_step=lambda *args: found.append(args[1]))
    draws = Draws(4, torch.tensor([9, 9, 5, 5]), torch.tensor([0, 1, 0, 1]))
    canvas = noise_tokens(draws.uniform(CANVAS, S)[0], model.cfg)
    for step in range(4):
        assert torch.equal(found[step], canvas)
        logits = babble(None, F.pad(canvas, (1, 0), value=SEP))
        logits[..., SEP:] = -math.inf
        canvas = draw_tokens(logits, 1.0, draws.at(step).uniform(SAMPLE, S)[0])


@pytest.mark.parametrize("prefix_attention", ["joint", "bidirectional"])
@pytest.mark.parametrize("sampler", ALL)
def test_a_network_with_a_cache_says_the_same_alone_and_in_a_batch(sampler, prefix_attention):
    model = network(prefix_attention=prefix_attention, self_conditioning=True)
    prefix = torch.tensor([[1, 2, 3], [4, 5, PAD], [6, PAD, PAD]])
    cfg = SamplerConfig(sampler=sampler, steps=4, candidates=2)
    together = generate(model, prefix, cfg)
    for i in range(3):
        alone = generate(model, prefix[i : i + 1], cfg, example=torch.tensor([i]))
        assert torch.equal(alone.tokens[0], together.tokens[i])


@pytest.mark.parametrize("sampler", ALL)
def test_the_hook_fires_once_before_and_once_after_each_call(sampler):
    model, seen = Fake(babble), []
    cfg = SamplerConfig(sampler=sampler, steps=4, candidates=2)
    generate(model, ids(3, 2), cfg, on_step=lambda *args: seen.append(args))
    assert [step for step, *_ in seen] == [0, 1, 2, 3, 4] and len(model.read) == 4
    assert seen[0][2] is None
    for (_, before, _, rows), (_, _, logits, _), (_, read) in zip(seen, seen[1:], model.read):
        assert before.shape == (6, S) and logits.shape == (6, S, V) and rows.tolist() == list(range(6))
        assert torch.equal(read, F.pad(before, (1, 0), value=SEP))  # what was shown is what is read next


@pytest.mark.parametrize("sampler", ALL)
def test_the_candidate_that_is_kept_has_the_lowest_score_and_all_are_paid_for(sampler):
    """Scores found anew from what the hook saw: NLL of the tokens that were read (resample) or of the answer."""
    model, seen, N = Fake(babble), [], 5
    cfg = SamplerConfig(sampler=sampler, steps=3, candidates=N, update_fraction=0.7)
    found = generate(model, ids(2, 2), cfg, on_step=lambda *args: seen.append(args))
    last, before = seen[-1], seen[-2]
    judged = before[1] if sampler in ("resample", "argmax_unrolled") else last[2].argmax(-1)
    answer = last[1] if sampler in ("resample", "argmax_unrolled") else judged
    score = -last[2].log_softmax(-1).gather(-1, judged[..., None])[..., 0].mean(1).view(2, N)
    best = score.argmin(1)
    torch.testing.assert_close(found.score, score.amin(1))
    assert torch.equal(found.tokens, answer.view(2, N, S)[torch.arange(2), best])
    assert found.calls.tolist() == [3 * N] * 2
    assert len(set(best.tolist()) | {0}) > 1  # not always the first


@pytest.mark.parametrize("sampler", ALL)
def test_given_tokens_stay_in_every_step(sampler):
    given = torch.full((2, S), -1)
    given[0, 2:4], given[1, :] = torch.tensor([7, 3]), ids(S)
    seen = []
    cfg = SamplerConfig(sampler=sampler, steps=4, candidates=3, update_fraction=0.5)
    found = generate(Fake(babble), ids(2, 2), cfg, given=given, on_step=lambda *args: seen.append(args))
    for _, canvas, _, rows in seen:
        fixed = given[rows // 3]
        assert torch.equal(torch.where(fixed >= 0, canvas, -1), fixed)
    assert torch.equal(torch.where(given >= 0, found.tokens, -1), given)
    assert torch.equal(found.tokens[1], given[1])


@pytest.mark.parametrize("noise", ["uniform", "mask"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sampler", ALL)
def test_no_reserved_token_but_pad_is_ever_said(sampler, steps, noise):
    """The model likes reserved tokens best; with few slots redrawn a mask of the first canvas could be left over."""

    def longing(prefix, canvas):
        logits = babble(prefix, canvas)
        logits[..., SEP:] += 30.0
        return logits

    cfg = SamplerConfig(sampler=sampler, steps=steps, candidates=4, update_fraction=0.3)
    found = generate(Fake(longing, noise=noise), ids(6, 2), cfg)
    assert found.tokens.max() <= PAD
    assert found.score.isfinite().all()


def begin(R: int, slots: int, noise_free: int | None = None) -> State:
    canvas = torch.full((R, slots), 0 if noise_free is None else noise_free)
    free = torch.ones_like(canvas, dtype=torch.bool)
    return State(canvas, canvas, canvas, torch.full(canvas.shape, -1.0), free[:, 0] & False, free)


M = SimpleNamespace(**DEFAULTS | dict(noise="mask"))


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_resample_redraws_the_share_it_is_told(share):
    logits = 60.0 * F.one_hot(torch.full((100, 100), 5), V).float()
    cfg = SamplerConfig(update_fraction=share)
    after = SAMPLERS["resample"](logits, begin(100, 100), 0, cfg, of(100), M)
    assert (after.canvas == 5).float().mean().item() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("slots, share, n", [(10, 0.3, 3), (10, 0.25, 3), (50, 0.3, 15), (10, 1.0, 10)])
def test_argmax_unrolled_rewrites_the_slots_that_were_least_sure(slots, share, n):
    """ceil(share of the slots), chosen by the pass before. 50 x 0.3 is 15, also in float32."""
    logits = 60.0 * F.one_hot(torch.full((1, slots), 5), V).float()
    sure = torch.randperm(slots, generator=torch.Generator().manual_seed(0))[None].float()
    state = begin(1, slots)._replace(memory=sure)
    cfg = SamplerConfig(sampler="argmax_unrolled", update_fraction=share)
    after = SAMPLERS["argmax_unrolled"](logits, state, 1, cfg, of(1), M)
    assert torch.equal(after.canvas == 5, sure < n)
    assert (SAMPLERS["argmax_unrolled"](logits, state, 0, cfg, of(1), M).canvas == 5).all()


@pytest.mark.parametrize("step, n", [(0, 3), (1, 5), (2, 8), (3, 10)])
def test_confidence_commits_the_surest_slots_in_the_scheduled_number(step, n):
    """10 slots in 4 steps: ceil of 2.5, 5, 7.5, 10. What is not committed is noise again, here the mask."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    logits = torch.zeros(1, 10, V)
    logits[0, :, 5] = 4.0 + 0.1 * order
    cfg = SamplerConfig(sampler="confidence", steps=4)
    after = SAMPLERS["confidence"](logits, begin(1, 10), step, cfg, of(1), M)
    assert torch.equal(after.canvas == 5, order[None] >= 10 - n)
    assert ((after.canvas == 5) | (after.canvas == MASK)).all() and (after.answer == 5).all()
    free = order[None] < 4  # the six surest slots are given: they keep what they hold and take no other's place
    after = SAMPLERS["confidence"](logits, begin(1, 10)._replace(free=free), step, cfg, of(1), M)
    assert torch.equal(after.canvas == 5, free & (order[None] >= 3 - step)) and (after.canvas[~free] == 0).all()


def test_entropy_bound_accepts_the_set_of_a_worked_example():
    """Entropies 0.69, 0.06, 0, 0.08 nats; sums before each, lowest first: 0, 0, 0.06, 0.14. Bound 0.1: not slot 0."""
    p = torch.tensor([0.5, 0.0114, 0.0, 0.0161])
    logits = torch.full((1, 4, V), -math.inf)
    logits[0, :, 5], logits[0, :, 6] = (1 - p).log(), p.log()
    entropy = -(p * p.log()).nan_to_num() - (1 - p) * (1 - p).log()
    torch.testing.assert_close(entropy, torch.tensor([0.693, 0.0623, 0.0, 0.0824]), atol=2e-3, rtol=0)
    for bound, accepted in ((0.1, [1, 2, 3]), (0.05, [1, 2]), (0.2, [0, 1, 2, 3]), (0.0, [1, 2])):
        cfg = SamplerConfig(sampler="entropy_bound", ramp_from=1.0, ramp_to=1.0, entropy_bound=bound)
        after = SAMPLERS["entropy_bound"](logits, begin(1, 4), 0, cfg, of(1), M)
        assert (after.canvas[0] != MASK).nonzero()[:, 0].tolist() == accepted


def test_the_temperature_of_entropy_bound_falls_along_its_ramp(monkeypatch):
    seen = []
    draw = samplers.draw_tokens
    monkeypatch.setattr(samplers, "draw_tokens", lambda logits, t, u: seen.append(t) or draw(logits, t, u))
    generate(Fake(babble), ids(1, 2), SamplerConfig(sampler="entropy_bound", steps=5, candidates=1, settle_entropy=0.0))
    assert seen == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4])


# Standing still


@pytest.mark.parametrize("sampler", ["resample", "argmax_unrolled"])
def test_a_converged_text_is_a_fixed_point_and_settles_at_once(sampler):
    """One call writes the text, the second sees that nothing changes, no third is made."""
    model, cfg = Fake(truth), SamplerConfig(sampler=sampler, temperature=0.0, steps=10, candidates=1)
    found = generate(model, torch.arange(3)[:, None], cfg)
    assert torch.equal(found.tokens, TEXTS[:3])
    assert found.calls.tolist() == [2] * 3 and len(model.read) == 2
    assert found.score.max() < 1e-6


def mend(prefix, canvas):
    """A denoiser that reads the canvas: it mends one slot a step, so rows settle at different steps."""
    right = (canvas[:, 1:] == TEXTS[prefix[:, 0]]).cumprod(1).sum(1)  # slots that are right already, from the left
    known = torch.arange(S) <= right[:, None]
    return 60.0 * F.one_hot(torch.where(known, TEXTS[prefix[:, 0]], canvas[:, 1:].clamp(max=PAD)), V).float()


def without_leaving(monkeypatch, sampler: str):
    step = SAMPLERS[sampler]
    stay = lambda *args: (lambda state: state._replace(settled=state.settled & False))(step(*args))  # noqa: E731
    monkeypatch.setitem(SAMPLERS, sampler, stay)


@pytest.mark.parametrize("sampler", ["resample", "argmax_unrolled"])
def test_rows_that_settle_cost_nothing_more_and_answer_as_if_they_had_stayed(sampler, monkeypatch):
    cfg = SamplerConfig(sampler=sampler, temperature=0.0, steps=25, candidates=2)
    prefix = torch.arange(6)[:, None]
    leaving = generate(Fake(mend), prefix, cfg)
    without_leaving(monkeypatch, sampler)
    staying = generate(Fake(mend), prefix, cfg)
    assert torch.equal(leaving.tokens, TEXTS[:6]) and torch.equal(staying.tokens, TEXTS[:6])
    torch.testing.assert_close(leaving.score, staying.score)
    assert (staying.calls == 50).all() and (leaving.calls < 50).all() and len(leaving.calls.unique()) > 1


@pytest.mark.parametrize("sampler", ["confidence", "entropy_bound"])
def test_adaptive_samplers_stop_where_the_answer_stands_still_and_the_model_is_sure(sampler, monkeypatch):
    """Odd prefixes get the right answer with half a nat of doubt a slot: those rows stay, and no answer changes."""

    def doubt(prefix, canvas):
        return truth(prefix, canvas, sure=1.0) * torch.where(prefix[:, 0] % 2 == 0, 60.0, 4.0)[:, None, None]

    cfg, prefix = SamplerConfig(sampler=sampler, steps=8, candidates=2), torch.arange(6)[:, None]
    leaving = generate(Fake(doubt), prefix, cfg)
    # Two steps tell that an answer stands still; confidence also waits for half of the steps.
    assert leaving.calls.tolist() == [2 * {"confidence": 4, "entropy_bound": 2}[sampler], 16] * 3
    without_leaving(monkeypatch, sampler)
    staying = generate(Fake(doubt), prefix, cfg)
    assert torch.equal(leaving.tokens, staying.tokens) and torch.equal(leaving.tokens, TEXTS[:6])


@pytest.mark.parametrize("temperature", [0.0, 0.2])
@pytest.mark.parametrize("sampler", ["confidence", "entropy_bound"])
def test_a_settle_entropy_of_0_runs_every_step_to_the_same_text(sampler, temperature):
    cfg = SamplerConfig(sampler=sampler, steps=8, candidates=1, temperature=temperature)
    stops, runs_on = (
        generate(Fake(truth), torch.arange(6)[:, None], cfg),
        generate(Fake(truth), torch.arange(6)[:, None], replace(cfg, settle_entropy=0.0)),
    )
    assert (stops.calls < 8).all() and (runs_on.calls == 8).all()
    assert torch.equal(stops.tokens, TEXTS[:6]) and torch.equal(runs_on.tokens, TEXTS[:6])


@pytest.mark.parametrize("update_fraction", [0.5, 1.0])
@pytest.mark.parametrize("sampler", ["resample", "argmax_unrolled"])
def test_a_row_of_a_network_settles_only_where_no_further_step_would_change_it(sampler, update_fraction, monkeypatch):
    """Without self-conditioning. With it the estimate beside equal tokens may still move, and so may the answer."""
    model = network()
    for p in model.parameters():
        p.data /= 2
    cfg = SamplerConfig(sampler=sampler, temperature=0.0, steps=12, candidates=1, update_fraction=update_fraction)
    leaving = generate(model, ids(60, 3), cfg)
    assert (leaving.calls < 12).sum() > 20
    without_leaving(monkeypatch, sampler)
    assert torch.equal(leaving.tokens, generate(model, ids(60, 3), cfg).tokens)


def test_the_sampler_of_the_paper_never_leaves_early():
    model = Fake(truth)
    found = generate(model, torch.arange(2)[:, None], SamplerConfig())
    assert found.calls.tolist() == [80, 80] and len(model.read) == 10  # 10 steps of 8 candidates


# Settings


def test_the_defaults_are_those_of_the_paper():
    cfg = SamplerConfig()
    assert (cfg.sampler, cfg.steps, cfg.temperature, cfg.candidates) == ("resample", 10, 0.2, 8)
    assert cfg.update_fraction == 1.0
    assert (LossConfig().unroll_steps, LossConfig().unroll_temperature) == (2, 0.0)
    assert (LossConfig().full_noise_prob, LossConfig().rate_exponent) == (0.0, 1.0)


@pytest.mark.parametrize(
    "cls, bad, says",
    [
        (LossConfig, dict(unroll_steps=0), "unroll_steps must be 1 to 16"),
        (LossConfig, dict(unroll_temperature=-1.0), "unroll_temperature 0 or more"),
        (LossConfig, dict(ar_weight=-0.5), "ar_weight must be 0 or more"),
        (LossConfig, dict(full_noise_prob=1.1), r"full_noise_prob must be in \[0, 1\]"),
        (LossConfig, dict(rate_exponent=0.0), "rate_exponent above 0"),
        (LossConfig, dict(self_conditioning_prob=1.5), r"self_conditioning_prob in \[0, 1\]"),
        (SamplerConfig, dict(sampler="ddim"), "resample, argmax_unrolled, confidence, entropy_bound"),
        (SamplerConfig, dict(steps=0), "at least 1"),
        (SamplerConfig, dict(candidates=0), "at least 1"),
        (SamplerConfig, dict(update_fraction=0.0), r"\(0, 1\]"),
        (SamplerConfig, dict(temperature=-0.1), "temperature must be 0 or more"),
        (SamplerConfig, dict(entropy_bound=-0.1), "entropy_bound must be 0 or more"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_with_what_would_do(cls, bad, says):
    with pytest.raises(ValueError, match=says):
        cls(**bad)


# Block by block


def by_definition(model, prefix: torch.Tensor, done: list[torch.Tensor], canvas: torch.Tensor) -> torch.Tensor:
    """Logits (S, V) of a canvas (S,), everything read anew in one pass without a cache, by a mask written out here.

    prefix (P,), done: the blocks before, each with the token ahead of it and without its own last one.
    """
    parts = [prefix, *done, canvas]
    causal = [model.cfg.prefix_attention == "causal"] * (1 + len(done)) + [False]
    mask, start = torch.zeros(sum(map(len, parts)), sum(map(len, parts)), dtype=torch.bool), 0
    for part, one_way in zip(parts, causal):
        end = start + len(part)
        mask[start:end, :start] = True
        square = torch.ones(len(part), len(part), dtype=torch.bool)
        mask[start:end, start:end] = square.tril() if one_way else square
        start = end
    x = model._embed(torch.cat(parts)[None], len(mask) - len(canvas), None)
    x = model._run_blocks(x, model.rope[:, : len(mask)], mask[None, None], False, None)
    return readout(model.head(x[:, -len(canvas) :]), model.cfg.shift)[0]


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("prefix_attention", ["causal", "bidirectional"])
def test_each_block_reads_what_stands_before_it_as_if_nothing_were_cached(prefix_attention, shift):
    model = network(prefix_attention=prefix_attention, shift=shift)
    prefix, seen = ids(2, 3), []
    cfg = SamplerConfig(steps=2, candidates=1, block_length=3)
    free = torch.full((2, S), -1)  # a template of free slots: no pad ends it
    found = generate(model, prefix, cfg, on_step=lambda *args: seen.append(args), given=free)
    for row in range(2):
        text, done, before = found.tokens[row], [], torch.tensor([SEP])
        for block in range(3):
            hook = seen[3 * block : 3 * block + 3]  # the canvas, then each of two calls
            for (_, canvas, _, _), (_, _, logits, _) in zip(hook, hook[1:]):
                expected = by_definition(model, prefix[row], done, torch.cat([before, canvas[row]]))
                torch.testing.assert_close(logits[row][:, :SEP], expected[:, :SEP], atol=1e-5, rtol=1e-5)
            own = text[3 * block : 3 * block + 3]
            done.append(torch.cat([before, own[:-1]]))
            before = own[-1:]


@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("prefix_attention", ["causal", "bidirectional"])
def test_texts_in_blocks_are_the_same_alone_and_in_a_padded_batch(prefix_attention, candidates):
    model = network(prefix_attention=prefix_attention, self_conditioning=True, shift=True)
    prefix = torch.tensor([[1, 2, 3], [4, 5, PAD], [6, PAD, PAD]])
    cfg = SamplerConfig(steps=3, candidates=candidates, block_length=3, temperature=1.5)
    together = generate(model, prefix, cfg)
    assert len(together.calls.unique()) > 1  # one text ends before the others
    for i in range(3):
        alone = generate(model, prefix[i : i + 1], cfg, example=torch.tensor([i]))
        assert torch.equal(alone.tokens[0], together.tokens[i]) and alone.calls[0] == together.calls[i]
        torch.testing.assert_close(alone.score[0], together.score[i])


@pytest.mark.parametrize("sampler", ALL)
def test_one_block_as_wide_as_the_target_is_no_block(sampler):
    cfg = SamplerConfig(sampler=sampler, steps=3, candidates=2)
    for one, other in zip(
        generate(network(), ids(2, 3), cfg), generate(network(), ids(2, 3), replace(cfg, block_length=S))
    ):
        assert torch.equal(one, other)


def test_blocks_go_on_past_the_target_until_a_text_ends_and_every_call_is_counted():
    """Eight-slot model, twelve tokens in blocks of four. Prompt 0 never ends, prompt 1 ends in its second block."""

    class Writer(Fake):
        def encode(self, prefix, room=0):
            self.filed = []
            return Cache(prefix=prefix)

        def decode(self, cache, target, estimate=None, append=False, opened=None):
            if append:
                self.filed.append((target.clone(), opened))
                return None
            return super().decode(cache, target, estimate)

    def write(prefix, canvas):
        ends = (prefix[:, :1] == 1) & (canvas[:, :1] != SEP)
        says = torch.where(ends, PAD, torch.arange(canvas.shape[1] - 1)[None])
        return 60.0 * F.one_hot(says, V).float()

    model = Writer(write, prefix_attention="causal")
    cfg = SamplerConfig(steps=3, candidates=2, block_length=4, max_new_tokens=12)
    found = generate(model, torch.tensor([[0], [1]]), cfg)
    assert found.tokens.tolist() == [[0, 1, 2, 3] * 3, [0, 1, 2, 3] + [PAD] * 8]
    assert found.calls.tolist() == [3 * 2 * 3 + 2, 2 * 2 * 3 + 1]  # blocks x candidates x steps, and one to file each
    assert [target.tolist() for target, _ in model.filed] == [[[SEP, 0, 1, 2]] * 2, [[3, 0, 1, 2]]]
    assert all(not opened.any() for _, opened in model.filed)  # by the causal mask


def test_blocks_that_cannot_be_had_are_refused():
    with pytest.raises(ValueError, match="read once.*joint"):
        generate(network(prefix_attention="joint"), ids(1, 2), SamplerConfig(block_length=4))
    with pytest.raises(ValueError, match=r"2 \+ 1 \+ 900 tokens .* block_size"):
        generate(network(prefix_attention="causal"), ids(1, 2), SamplerConfig(block_length=4, max_new_tokens=900))


# On a GPU the host learns a step late how many rows are left


class StepBehind:
    """device.Late as it is on CUDA."""

    def __init__(self):
        self.before = None

    def read(self, number):
        before, self.before = self.before, int(number)
        return before

    def sees_none(self, flags):
        return False


@pytest.mark.parametrize("sampler", ALL)
def test_a_host_that_is_a_step_behind_gets_the_same_texts_scores_and_calls(sampler, monkeypatch):
    model = network()
    for p in model.parameters():
        p.data /= 2
    cold = dict(temperature=0.0, ramp_from=0.0, ramp_to=0.0, entropy_bound=99.0, settle_entropy=9.0)
    cfg = SamplerConfig(sampler=sampler, steps=12, candidates=2, **cold)
    at_once = generate(model, ids(30, 3), cfg)
    assert len(at_once.calls.unique()) > 1
    monkeypatch.setattr(diffusion, "Late", StepBehind)
    late = generate(model, ids(30, 3), cfg)
    assert torch.equal(at_once.tokens, late.tokens) and torch.equal(at_once.calls, late.calls)
    torch.testing.assert_close(at_once.score, late.score)


def test_the_batch_shrinks_by_powers_of_two_and_settled_rows_are_not_named():
    """Prompt p is written by an answer that comes p // 4 steps after the first."""
    seen, cfg = [], SamplerConfig(temperature=0.0, steps=25, candidates=1)

    def late(prefix, canvas):
        wait = prefix[:, :1] // 4 > len(seen)
        return 60.0 * F.one_hot(torch.where(wait, (canvas[:, 1:] + 1) % ORDINARY, TEXTS[prefix[:, 0]]), V).float()

    found = generate(Fake(late), torch.arange(30)[:, None], cfg, on_step=lambda *args: seen.append(args))
    sizes = [len(canvas) for _, canvas, _, _ in seen]
    assert sizes[0] == 30 and set(sizes[1:]) <= {30, 16, 8, 4, 2, 1} and len(set(sizes)) > 3
    counted = torch.zeros(30, dtype=torch.long)
    for _, canvas, _, rows in seen[1:]:
        assert len(rows) == len(canvas)
        counted[rows[rows >= 0]] += 1
    assert torch.equal(counted, found.calls)
