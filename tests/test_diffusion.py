"""diffusion.py: the loss by hand, and samplers against models whose answer is known."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import diffusion
from data.objectives import Batch
from diffusion import (
    SAMPLERS,
    LossConfig,
    SamplerConfig,
    SamplerState,
    corrupt,
    generate,
    loss,
    loss_terms,
    losses,
    sample_noise,
)
from infra.logits import draw_tokens
from infra.rng import CANVAS, CORRUPT, RATE, SAMPLE, UNROLL, CounterRNG, make_rng
from model import ModelConfig, Transformer, build_model

ORDINARY, PAD, SEP, MASK, V, S = 10, 10, 11, 12, 15, 8  # S slots after slot 0
SIZES = dict(vocab_size=V, n_ordinary=ORDINARY, pad_id=PAD, sep_id=SEP, mask_id=MASK)
SIZES |= dict(target_length=S + 1, block_size=16, n_layer=2, n_head=2, n_embd=16)
SIZES |= dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
CACHED = dict(prefix_attention="bidirectional", shift=True, self_conditioning=True)
ALL = pytest.mark.parametrize("sampler", list(SAMPLERS))
SCORE_THE_CANVAS = ["resample", "argmax_unrolled"]  # the others score their output
GO_ON = ["resample"]  # at a temperature no row of it converges
SHIFT = pytest.mark.parametrize("shift", [False, True], ids=["same", "shift"])
NOISE = pytest.mark.parametrize("noise", ["uniform", "mask"])


class Cache(SimpleNamespace):
    def select(self, index):
        return Cache(prefix=self.prefix[index])

    def fork(self):
        return self

    def detach(self):
        return self, []


class Fake:
    """Anything with encode and decode is a model: answer(prefix, target) returns logits (B, S, V).

    listens: self-conditioning changes the logits.
    """

    def __init__(self, answer, listens: bool = False, **settings):
        self.cfg = ModelConfig(**SIZES | dict(self_conditioning=listens) | settings)
        self.answer = answer
        self.listens = listens
        self.embedding = torch.randn(V, 4, generator=torch.Generator().manual_seed(2))
        self.read, self.hints = [], []
        self.shift = self.cfg.shift

    def encode(self, prefix, reserve=0):
        return Cache(prefix=prefix)

    def decode(self, cache, target, append=False, self_cond=None, extra_edges=None):
        self.read.append((cache.prefix.clone(), target.clone()))
        self.hints.append(self_cond)
        logits = self.answer(cache.prefix, target)
        if self.listens and self_cond is not None:
            logits = logits + self_cond[:, 1:, :1] * torch.arange(V) / 2
        other = torch.full_like(logits[:, :1], 7.0)  # the position that predicts no slot
        return torch.cat([logits, other] if self.shift else [other, logits], dim=1)

    def expected_embedding(self, logits):
        return logits.softmax(-1) @ self.embedding


def ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, ORDINARY, shape, generator=torch.Generator().manual_seed(seed))


TEXTS = ids(40, S, seed=5)
TEXTS[:, 5:] = PAD


def truth(prefix, target, scale: float = 60.0) -> torch.Tensor:
    """Logits of a denoiser that knows the text of each prefix, whatever the canvas is."""
    return scale * F.one_hot(TEXTS[prefix[:, 0]], V).float()


def from_table(prefix, target) -> torch.Tensor:
    """Logits that depend on the canvas: a table of (slot, token, token before)."""
    table = torch.randn(S, V, V, V, generator=torch.Generator().manual_seed(9))
    slot = torch.arange(S).expand(len(target), S)
    return 2 * table[slot, target[:, 1:], target[:, :-1]]


def batch(B: int = 4, seed: int = 0) -> Batch:
    text = ids(B, S, seed=seed)
    text[:, 6:] = PAD
    return Batch(ids(B, 3, seed=1), F.pad(text, (1, 0), value=SEP), torch.arange(B))


def network(**settings) -> Transformer:
    torch.manual_seed(0)
    model = build_model(ModelConfig(**SIZES | settings)).double().eval()
    for p in model.parameters():
        p.data *= 2
    if model.cfg.self_conditioning:
        nn.init.normal_(model.self_cond_proj.weight)
    return model


def gradient(model, value) -> dict[str, torch.Tensor]:
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(value, parameters, materialize_grads=True)))


def rng_of(B: int) -> CounterRNG:
    return make_rng(0, torch.arange(B))


# Noise


def share_of(sampler: str, share: float) -> float:
    """update_fraction: 1 for the samplers that do not use it."""
    return share if sampler in ("resample", "argmax_unrolled") else 1.0


def test_a_fraction_that_a_sampler_does_not_use_is_refused():
    with pytest.raises(ValueError, match="sampler=confidence does not use update_fraction"):
        SamplerConfig(sampler="confidence", update_fraction=0.5)


@NOISE
def test_rate_0_corrupts_nothing_and_rate_1_leaves_nothing(noise):
    cfg, one, two = ModelConfig(**SIZES | dict(noise=noise)), batch(50).target, batch(50, 3).target
    none, all_slots = torch.zeros(50, 1), torch.ones(50, 1)
    assert torch.equal(corrupt(one, none, cfg, rng_of(50)), one)
    noisy = corrupt(one, all_slots, cfg, rng_of(50))
    assert torch.equal(noisy, corrupt(two, all_slots, cfg, rng_of(50)))
    half = corrupt(one, all_slots / 2, cfg, rng_of(50))
    assert (half != one)[:, 1:].float().mean().item() == pytest.approx(0.47, abs=0.07)
    assert (noisy[:, 0] == SEP).all()


def test_rates_are_uniform_except_for_rows_of_pure_noise():
    rng = make_rng(3, torch.arange(20_000))
    plain = diffusion.draw_rate(LossConfig(), rng)
    assert torch.equal(plain, rng.uniform(RATE, 1)[0])
    assert torch.histc(plain, 10, 0, 1).min() > 1800
    rate = diffusion.draw_rate(LossConfig(full_noise_prob=0.25), rng)
    assert (rate == 1).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(rate[rate < 1], plain[rate < 1])


@pytest.mark.parametrize("eos", [-1, 0, 4])
def test_noise_is_uniform_over_ordinary_tokens_and_pad_without_eos(eos):
    cfg = ModelConfig(**SIZES | dict(pad_id=13, eos_id=eos))  # pad need not follow the text ids
    drawn = sample_noise(rng_of(200).uniform(0, 220)[0], cfg).flatten().bincount(minlength=V)
    allowed = drawn[[i for i in (*range(ORDINARY), 13) if i != eos]]
    expected = 44_000 / len(allowed)
    assert allowed.sum() == 44_000
    assert ((allowed - expected) ** 2 / expected).sum() < 29.6  # chi-square, 10 degrees, 99.9%


# Loss


@pytest.mark.parametrize("unroll_steps", [1, 2, 3])
@SHIFT
def test_a_model_that_knows_nothing_pays_log_v_per_pass(unroll_steps, shift):
    model = network(tie_weights=False, shift=shift)
    nn.init.zeros_(model.head.weight)
    found = loss(model, batch(), LossConfig(unroll_steps=unroll_steps), rng_of(4))
    assert found.item() == pytest.approx(unroll_steps * math.log(V), rel=1e-6)


@SHIFT
def test_slot_i_is_predicted_at_position_i_or_with_shift_at_the_one_before(shift):
    model = Fake(lambda *_: 60.0 * F.one_hot(batch().target[:, 1:], V), shift=shift)
    assert loss(model, batch(), LossConfig(), rng_of(4)).item() < 1e-6
    model.cfg.shift = not shift
    assert loss(model, batch(), LossConfig(), rng_of(4)).item() > 20


def test_the_loss_is_the_mean_over_clean_corrupted_and_pad_slots():
    model = Fake(from_table)
    cache = model.encode(batch().prefix)
    rate = torch.full((4, 1), 0.5)
    found = next(loss_terms(model, cache, batch(), LossConfig(), rng_of(4), rate))
    log_p = from_table(None, model.read[0][1]).log_softmax(-1)
    by_hand = [-log_p[b, s, batch().target[b, s + 1]].item() for b in range(4) for s in range(S)]
    assert found.item() == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.2, 1.0])
def test_each_pass_reads_the_answer_of_the_pass_before_after_a_clean_prefix(temperature):
    model = Fake(from_table)
    cfg = LossConfig(unroll_steps=3, unroll_temperature=temperature, full_noise_prob=1.0)
    loss(model, batch(), cfg, rng_of(4))
    noise = sample_noise(rng_of(4).uniform(CORRUPT, S + 1)[1], model.cfg)
    assert torch.equal(model.read[0][1][:, 1:], noise[:, 1:])
    for k in (1, 2):
        logits = from_table(None, model.read[k - 1][1])
        drawn = draw_tokens(logits, temperature, rng_of(4).uniform(UNROLL, S, k - 1)[0])
        assert torch.equal(model.read[k][1], F.pad(drawn, (1, 0), value=SEP))
        assert torch.equal(drawn, logits.argmax(-1)) == (temperature == 0)
        assert torch.equal(model.read[k][0], batch().prefix)


@pytest.mark.parametrize("self_conditioning", [False, True])
def test_no_gradient_crosses_from_the_second_pass_to_the_first(self_conditioning):
    """The gradient of L(1) + L(2) is L(1)'s plus that of L(2) on a fixed canvas and hint."""
    model, data = network(self_conditioning=self_conditioning), batch()

    def term(canvas, hint=None):
        logits = model.decode(model.encode(data.prefix), canvas, self_cond=hint)[:, 1:]
        return logits, F.cross_entropy(logits.flatten(0, 1), data.target[:, 1:].flatten())

    both = gradient(model, loss(model, data, LossConfig(), rng_of(4)))
    canvas = corrupt(data.target, rng_of(4).uniform(RATE, 1)[0], model.cfg, rng_of(4))
    logits, first = term(canvas)
    one = gradient(model, first)
    logits = logits.detach()
    answer = F.pad(logits.argmax(-1), (1, 0), value=SEP)
    hint = F.pad(logits.softmax(-1) @ model.tok.weight.detach(), (0, 0, 1, 0))
    two = gradient(model, term(answer, hint if self_conditioning else None)[1])
    for name, whole in both.items():
        torch.testing.assert_close(whole, one[name] + two[name])


@pytest.mark.parametrize("settings", [{}, CACHED], ids=["joint", "cached"])
def test_terms_that_are_backpropagated_one_by_one_give_the_gradient_of_their_sum(settings):
    """Although the prefix is read once and its graph is used once, at the end."""
    model, cfg = network(**settings), LossConfig()
    data = batch()
    data.prefix[1, 1:] = PAD
    total = loss(model, data, cfg, rng_of(4))
    expected = gradient(model, total)
    terms = []
    for term in losses(model, data, cfg, rng_of(4), scale=0.5):
        term.backward()
        terms.append(term.item())
    assert sum(terms) == pytest.approx(0.5 * total.item())
    for name, p in model.named_parameters():
        found = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(found, 0.5 * expected[name])


def test_the_loss_at_fixed_rates_grows_with_the_rate_for_a_model_that_copies():
    model = Fake(lambda prefix, target: 5.0 * F.one_hot(target[:, 1:], V).float())
    found = diffusion.loss_by_rate(model, batch(200), rng_of(200), [0.0, 0.5, 1.0])
    assert list(found) == ["0.0", "0.5", "1.0"]
    assert found["0.0"] == pytest.approx(math.log1p(14 * math.exp(-5)), rel=1e-4)
    assert found["0.0"] < found["0.5"] < found["1.0"]


@SHIFT
def test_self_conditioning_is_the_expected_embedding_of_the_last_prediction(shift):
    """In training and in generation. Slot 0 is not predicted and gets zeros."""
    for run in (
        lambda model: loss(model, batch(), LossConfig(unroll_steps=3), rng_of(4)),
        lambda model: generate(model, ids(3, 2), SamplerConfig(steps=3, candidates=2)),
    ):
        model = Fake(from_table, self_conditioning=True, shift=shift)
        run(model)
        assert model.hints[0] is None and len(model.hints) == 3
        for k in (1, 2):
            soft = from_table(None, model.read[k - 1][1]).softmax(-1)
            expected = F.pad(soft @ model.embedding, (0, 0, 1, 0))
            torch.testing.assert_close(model.hints[k], expected)


# Samplers


@SHIFT
@NOISE
@ALL
def test_a_denoiser_that_knows_the_text_is_believed(sampler, noise, shift):
    model = Fake(truth, noise=noise, shift=shift)
    cfg = SamplerConfig(sampler=sampler, steps=4, candidates=2)
    found = generate(model, torch.arange(5)[:, None], cfg)
    assert torch.equal(found.tokens, TEXTS[:5])
    assert found.score.max() < 1e-6


@pytest.mark.parametrize("listens", [False, True])
@ALL
def test_a_row_gets_the_same_text_alone_and_among_eight_of_which_half_freeze(sampler, listens):
    def half(prefix, target):
        known = (prefix[:, 0] % 2 == 0)[:, None, None]
        return torch.where(known, truth(prefix, target), from_table(prefix, target))

    model = Fake(half, listens)
    cfg = SamplerConfig(
        sampler=sampler, steps=6, update_fraction=share_of(sampler, 0.5), candidates=3
    )
    prefix, example = torch.arange(8)[:, None], torch.arange(30, 38)
    together = generate(model, prefix, cfg, seed=2, example=example)
    for i in range(8):
        alone = generate(model, prefix[i : i + 1], cfg, seed=2, example=example[i : i + 1])
        for one, all_rows in zip(alone, together):
            torch.testing.assert_close(one[0], all_rows[i])
    assert sampler in GO_ON or together.calls[0] < together.calls[1]
    other = generate(model, prefix, cfg, seed=3, example=example)
    assert not torch.equal(other.tokens, together.tokens)


def test_the_papers_sampler_redraws_every_slot_at_every_step():
    """Again by hand, each number by its position (seed, example, candidate, step)."""
    model, seen, example = Fake(from_table), [], torch.tensor([9, 5])
    cfg = SamplerConfig(steps=3, candidates=2, temperature=1.0)
    generate(model, ids(2, 2), cfg, 4, example, on_step=lambda *args: seen.append(args[1]))
    rng = CounterRNG(4, example.repeat_interleave(2), torch.tensor([0, 1, 0, 1]))
    canvas = sample_noise(rng.uniform(CANVAS, S)[0], model.cfg)
    for step in range(4):
        assert torch.equal(seen[step], canvas)
        logits = from_table(None, F.pad(canvas, (1, 0), value=SEP))
        logits[..., SEP:] = -math.inf
        canvas = draw_tokens(logits, 1.0, rng.fold_in(step).uniform(SAMPLE, S)[0])


@pytest.mark.parametrize(
    "settings",
    [
        dict(self_conditioning=True),
        CACHED | {"sep_id": -1},
        dict(arch="encoder_decoder", prefix_attention="bidirectional"),
    ],
    ids=["joint", "cached", "encoder_decoder"],
)
@ALL
def test_a_network_gives_the_same_text_alone_and_in_a_batch(sampler, settings):
    model, prefix = network(**settings), torch.tensor([[1, 2, 3], [4, 5, PAD], [6, PAD, PAD]])
    cfg = SamplerConfig(sampler=sampler, steps=4, candidates=2)
    together = generate(model, prefix, cfg)
    for i in range(3):
        alone = generate(model, prefix[i : i + 1], cfg, example=torch.tensor([i]))
        assert torch.equal(alone.tokens[0], together.tokens[i])


@ALL
def test_the_hook_sees_every_call_and_the_best_candidate_is_kept(sampler):
    """Scores again from the hook: NLL of the canvas that was read, or of the output."""
    model, seen, N = Fake(from_table), [], 5
    cfg = SamplerConfig(
        sampler=sampler, steps=3, candidates=N, update_fraction=share_of(sampler, 0.7)
    )
    found = generate(model, ids(2, 2), cfg, on_step=lambda *args: seen.append(args))
    assert [step for step, *_ in seen] == [0, 1, 2, 3] and seen[0][2] is None
    for (_, before, _, rows), (_, _, logits, _), (_, read) in zip(seen, seen[1:], model.read):
        assert logits.shape == (2 * N, S, V) and rows.tolist() == list(range(2 * N))
        assert torch.equal(read, F.pad(before, (1, 0), value=SEP))
    last, before = seen[-1], seen[-2]
    reads_canvas = sampler in SCORE_THE_CANVAS
    scored = before[1] if reads_canvas else last[2].argmax(-1)
    output = last[1] if reads_canvas else scored
    score = -last[2].log_softmax(-1).gather(-1, scored[..., None])[..., 0].mean(1).view(2, N)
    torch.testing.assert_close(found.score, score.amin(1))
    best = score.argmin(1)
    assert torch.equal(found.tokens, output.view(2, N, S)[torch.arange(2), best])
    assert found.calls.tolist() == [3 * N] * 2 and best.any()  # not always the first


@ALL
def test_given_tokens_stay_in_every_step(sampler):
    given = torch.full((2, S), -1)
    given[0, 2:4] = torch.tensor([7, 3])
    given[1] = ids(S)
    seen = []
    cfg = SamplerConfig(
        sampler=sampler, steps=4, candidates=3, update_fraction=share_of(sampler, 0.5)
    )

    def hook(step, canvas, logits, rows):
        seen.append(canvas)

    found = generate(Fake(from_table), ids(2, 2), cfg, given=given, on_step=hook)
    fixed = given.repeat_interleave(3, dim=0)
    for canvas in seen:
        assert torch.equal(torch.where(fixed >= 0, canvas, -1), fixed)
    assert torch.equal(torch.where(given >= 0, found.tokens, -1), given)


@NOISE
@pytest.mark.parametrize("steps", [1, 4])
@ALL
def test_no_banned_token_is_written_even_if_it_is_most_likely(sampler, steps, noise):
    """If few slots are redrawn, a mask of the first canvas could be left over."""

    def prefer_banned(prefix, target):
        logits = from_table(prefix, target)
        logits[..., SEP:] += 30.0
        return logits

    cfg = SamplerConfig(
        sampler=sampler, steps=steps, candidates=4, update_fraction=share_of(sampler, 0.3)
    )
    found = generate(Fake(prefer_banned, noise=noise), ids(6, 2), cfg)
    assert found.tokens.max() <= PAD and found.score.isfinite().all()


# One step


def one_step(sampler, logits, step=0, **settings) -> torch.Tensor:
    """Return the canvas after one step from a canvas of zeros; noise is the mask."""
    R, slots = logits.shape[:2]
    fields = {name: settings.pop(name) for name in ("aux", "editable") if name in settings}
    canvas = torch.zeros(R, slots, dtype=torch.long)
    editable = torch.ones(R, slots, dtype=torch.bool)
    start = SamplerState(canvas, canvas, canvas, canvas - 1.0, ~editable[:, 0], editable)
    cfg = SamplerConfig(sampler=sampler, **settings)
    model_cfg = ModelConfig(**SIZES | dict(noise="mask"))
    after = SAMPLERS[sampler](logits, start._replace(**fields), step, cfg, rng_of(R), model_cfg)
    return after.canvas


def always_5(R: int, slots: int) -> torch.Tensor:
    return 60.0 * F.one_hot(torch.full((R, slots), 5), V).float()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_resample_redraws_the_given_share(share):
    canvas = one_step("resample", always_5(100, 100), update_fraction=share)
    assert (canvas == 5).float().mean().item() == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize(
    "slots, share, n", [(10, 0.3, 3), (10, 0.25, 3), (50, 0.3, 15), (10, 1.0, 10)]
)
def test_argmax_unrolled_rewrites_the_least_confident_slots_of_the_last_pass(slots, share, n):
    confidence = torch.randperm(slots, generator=torch.Generator().manual_seed(0))[None].float()
    settings = dict(aux=confidence, update_fraction=share)
    after = one_step("argmax_unrolled", always_5(1, slots), 1, **settings)
    assert torch.equal(after == 5, confidence < n)
    assert (one_step("argmax_unrolled", always_5(1, slots), 0, **settings) == 5).all()


@pytest.mark.parametrize("step, n", [(0, 3), (1, 5), (2, 8), (3, 10)])
def test_confidence_keeps_the_scheduled_number_of_slots(step, n):
    """10 slots in 4 steps: ceil of 2.5, 5, 7.5, 10. The other slots become noise again."""
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))[None]
    logits = torch.zeros(1, 10, V)
    logits[..., 5] = 4.0 + 0.1 * order
    after = one_step("confidence", logits, step, steps=4)
    assert torch.equal(after == 5, order >= 10 - n) and torch.equal(after == MASK, order < 10 - n)
    editable = order < 4  # the six most confident slots are given: they take no other's place
    after = one_step("confidence", logits, step, steps=4, editable=editable)
    assert torch.equal(after == 5, editable & (order >= 3 - step)) and (after[~editable] == 0).all()


@pytest.mark.parametrize(
    "bound, kept", [(0.1, [1, 2, 3]), (0.05, [1, 2]), (0.2, [0, 1, 2, 3]), (0.0, [1, 2])]
)
def test_entropy_bound_keeps_the_slots_of_a_worked_example(bound, kept):
    """Entropies .69 .06 0 .08; sums before each slot, lowest first: 0, 0, 0.06, 0.14."""
    p = torch.tensor([0.5, 0.0114, 0.0, 0.0161])
    logits = torch.full((1, 4, V), -math.inf)
    logits[0, :, 5], logits[0, :, 6] = (1 - p).log(), p.log()
    canvas = one_step("entropy_bound", 0.8 * logits, entropy_bound=bound)  # temperature 0.8
    assert (canvas[0] != MASK).nonzero()[:, 0].tolist() == kept


def test_the_temperature_of_entropy_bound_falls_linearly(monkeypatch):
    seen, draw = [], diffusion.draw_tokens
    monkeypatch.setattr(diffusion, "draw_tokens", lambda x, t, u: seen.append(t) or draw(x, t, u))
    cfg = SamplerConfig(sampler="entropy_bound", steps=5, stop_entropy=0.0)
    generate(Fake(from_table), ids(1, 2), cfg)
    assert seen == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4])


# Converged rows are frozen


def repair_one_slot(prefix, target):
    """Logits of a denoiser that repairs one slot a step, so rows converge at different steps."""
    text = TEXTS[prefix[:, 0]]
    right = (target[:, 1:] == text).cumprod(1).sum(1)  # correct slots from the left
    known = torch.arange(S) <= right[:, None]
    return 60.0 * F.one_hot(torch.where(known, text, target[:, 1:].clamp(max=PAD)), V).float()


@pytest.mark.parametrize("sampler", SCORE_THE_CANVAS)
def test_frozen_rows_cost_nothing_more_and_keep_their_answer(sampler):
    cfg = SamplerConfig(sampler=sampler, temperature=0.0, steps=25, candidates=2)
    prefix, counted = torch.arange(6)[:, None], torch.zeros(12, dtype=torch.long)

    def count(step, canvas, logits, rows):
        counted[rows[rows >= 0]] += step > 0

    frozen = generate(Fake(repair_one_slot), prefix, cfg, on_step=count)
    assert torch.equal(frozen.tokens, TEXTS[:6]) and frozen.score.max() < 1e-6
    assert (frozen.calls < 50).all()
    assert torch.equal(frozen.calls, counted.view(6, 2).sum(1)) and len(counted.unique()) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.2])
@pytest.mark.parametrize("sampler, calls", [("confidence", 4), ("entropy_bound", 2)])
def test_adaptive_samplers_stop_if_the_output_repeats_at_low_entropy(sampler, calls, temperature):
    """Odd prefixes leave half a nat of entropy per slot, so their rows go on."""

    def doubt(prefix, target):
        scale = torch.where(prefix[:, 0] % 2 == 0, 60.0, 4.0)
        return truth(prefix, target, 1.0) * scale[:, None, None]

    prefix = torch.arange(6)[:, None]
    cfg = SamplerConfig(sampler=sampler, steps=8, temperature=temperature)
    found = generate(Fake(doubt), prefix, cfg)
    assert found.calls.tolist() == [calls, 8] * 3
    every_step = generate(Fake(doubt), prefix, replace(cfg, stop_entropy=0.0))
    assert (every_step.calls == 8).all()
    assert torch.equal(found.tokens, TEXTS[:6]) and torch.equal(every_step.tokens, TEXTS[:6])
