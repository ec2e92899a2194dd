"""extras/diffusion_gemma.py against transformers' own classes, on the same random numbers."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import sample
from extras import diffusion_gemma as ours
from infra.checkpoint import load_model
from infra.logits import banned_token_ids, entropy
from infra.rng import CANVAS, RENOISE, SAMPLE, make_rng
from model import ModelConfig, Transformer

R, S, V, PAD = 1000, 8, 24, 16  # rows, slots
SIZES = dict(vocab_size=V, n_ordinary=PAD, pad_id=PAD, sep_id=PAD + 1, mask_id=PAD + 2)
SIZES |= dict(target_length=S + 1, block_size=16, n_layer=1, n_head=2, n_embd=16)
SIZES |= dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")
RNG = make_rng(0, torch.arange(R))


@pytest.fixture(scope="module")
def gemma():
    """Transformers' sampler. Importing it takes seconds, so only here."""
    folder = "transformers.models.diffusion_gemma"
    return pytest.importorskip(f"{folder}.generation_diffusion_gemma", reason="transformers 5.23")


def ramp(gemma, cfg):
    kind = gemma.LinearTemperatureScheduleLogitsProcessor
    return kind(cfg.temperature_end, cfg.temperature_start, cfg.steps)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def random_ids(stream: int, step: int = 0) -> torch.Tensor:
    return (RNG.fold_in(step).uniform(stream, S)[0] * V).long()


@pytest.mark.parametrize("steps", [1, 2, 10, 48, 1000])
@pytest.mark.parametrize("start, end", [(0.8, 0.4), (1.0, 0.0), (0.3, 0.1)])
def test_temperatures_are_theirs(gemma, steps, start, end):
    cfg = ours.SamplerConfig(steps=steps, temperature_start=start, temperature_end=end)
    for step in range(steps):
        theirs = ramp(gemma, cfg)(None, 1.0, cur_step=steps - step)
        assert 1.0 / cfg.temperature_at(step) == theirs
    assert cfg.temperature_at(0) == pytest.approx(start) and cfg.temperature_at(steps - 1) > end


class Network:
    """A toy network: each row repairs its own text, at its own speed and with its own doubts."""

    def __init__(self, **settings):
        self.cfg = ModelConfig(**SIZES | dict(self_conditioning=True) | settings)
        self.weight = normal(V, 6)
        self.text = torch.arange(R * S).view(R, S) % PAD
        self.gain = torch.linspace(1, 9, R)[:, None, None]

    def encode(self, prefix, reserve=0):
        return None

    def decode(self, cache, target, self_cond=None):
        right = (target[:, 1:] == self.text).float().mean(1)[:, None, None]
        logits = normal(R, S, V) + self.gain * (0.5 + right) * F.one_hot(self.text, V)
        logits = logits + self.weight[target[:, 1:].roll(1, 1)] @ normal(6, V) / 2
        if self_cond is not None:
            logits = logits + 3 * self_cond[:, 1:] @ self.weight.T
        other = torch.zeros_like(logits[:, :1])
        return torch.cat([logits, other] if self.cfg.shift else [other, logits], dim=1)

    def expected_embedding(self, logits):
        return logits.softmax(-1) @ self.weight


def their_generation(gemma, monkeypatch, network, cfg):
    """Run transformers' denoising steps with our network and our random numbers.

    Return the text, the calls and all canvases. No decision may depend on rounding.
    """
    transformers = pytest.importorskip("transformers")
    bound = gemma.EntropyBoundSamplerConfig(cfg.entropy_bound)
    sampler = gemma.EntropyBoundSampler(bound, S, V, cfg.steps)
    stop = gemma.StableAndConfidentStoppingCriteria(cfg.stability, cfg.stop_entropy)
    banned = banned_token_ids(network.cfg, "cpu").tolist()
    banned = transformers.SuppressTokensLogitsProcessor(banned)
    tok = SimpleNamespace(embed_tokens=SimpleNamespace(weight=network.weight))
    host = SimpleNamespace(model=SimpleNamespace(decoder=tok))
    host.config = SimpleNamespace(text_config=SimpleNamespace(vocab_size=V))

    def forward(decoder_input_ids, self_conditioning_logits, **_):
        hint = self_conditioning_logits
        if hint is not None:
            hint = F.pad(network.expected_embedding(hint), (0, 0, 1, 0))
        logits = network.decode(None, F.pad(decoder_input_ids, (1, 0), value=PAD + 1), hint)
        return SimpleNamespace(logits=logits[:, :-1] if network.cfg.shift else logits[:, 1:])

    def multinomial(probs, num_samples):
        entropies = entropy(probs.log().view(R, S, V))
        ordered = entropies.sort(1).values
        assert (ordered.cumsum(1) - ordered - cfg.entropy_bound).abs().min() > 1e-6
        assert (entropies.mean(1) - cfg.stop_entropy).abs().min() > 1e-6
        cdf = probs.cumsum(-1)
        uniform = RNG.fold_in(step).uniform(SAMPLE, S)[0].view(-1, 1)
        return torch.searchsorted(cdf, uniform * cdf[:, -1:], right=True)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    # It loads the compiler, which takes seconds.
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: None)
    sampler.initialize_canvas = lambda *_: random_ids(RENOISE, step)
    canvases = [random_ids(CANVAS)]
    text = canvases[0]
    finished = torch.zeros(R, dtype=torch.bool)
    calls = torch.zeros(R, dtype=torch.long)
    hint = None
    for step in range(cfg.steps):
        calls += ~finished
        canvas, text, hint, finished = gemma.DiffusionGemmaGenerationMixin._denoising_step(
            host,
            decoder_forward=forward,
            current_canvas=canvases[-1],
            argmax_canvas=text,
            input_ids=None,
            decoder_position_ids=None,
            self_conditioning_logits=hint,
            mask_mapping=None,
            past_key_values=None,
            finished_denoising=finished,
            cur_step=cfg.steps - step,
            sampler=sampler,
            logits_processor=transformers.LogitsProcessorList([banned, ramp(gemma, cfg)]),
            diffusion_stopping_criteria=stop,
        )
        canvases.append(canvas)
        if finished.all():
            break
    return text, calls, canvases


@pytest.mark.parametrize(
    "stability, shift, bound", [(0, True, 0.1), (1, True, 1.0), (1, False, 0.05), (3, True, 0.1)]
)
def test_whole_generations_are_theirs(gemma, monkeypatch, stability, shift, bound):
    """1,000 rows: the text, the calls and each canvas. Temperatures are exact in float32."""
    network = Network(shift=shift)
    cfg = ours.SamplerConfig(16, 0.75, 0.25, bound, stability)
    found = []
    prefix = torch.zeros(R, 2, dtype=torch.long)
    out = ours.generate(network, prefix, cfg, on_step=lambda step, *x: found.append(x[0]))
    text, calls, canvases = their_generation(gemma, monkeypatch, network, cfg)
    assert torch.equal(out.tokens, text) and torch.equal(out.calls, calls)
    assert len(canvases) == len(found) and all(map(torch.equal, canvases, found))
    assert len(calls.unique()) > 4 and (text <= PAD).all()


# With a trained model


def test_rows_do_not_depend_on_the_batch():
    """The demonstration translates. In float64, where batches of other sizes change no decision."""
    model, tokenizer, _ = load_model(sample.DEMO / "diffusion.pt", "cpu")
    ids = [tokenizer.encode_prompt(f"fr {text}") for text in ("one hundred ten", "twelve", "two")]
    prefix = torch.full((3, max(map(len, ids))), tokenizer.pad_id)
    for row, prompt in zip(prefix, ids):
        row[: len(prompt)] = torch.tensor(prompt)
    counted = torch.zeros(3, dtype=torch.long)

    def count(step, canvas, logits, rows):
        counted[rows[rows >= 0]] += step > 0

    cfg = ours.SamplerConfig(steps=20)
    out = ours.generate(model.double(), prefix, cfg, seed=5, on_step=count)
    texts = [tokenizer.decode(row[row != tokenizer.pad_id]) for row in out.tokens]
    assert texts == ["cent dix", "douze", "deux"]
    assert torch.equal(out.calls, counted) and (out.calls > 1).all() and (out.calls < 20).all()
    for i in range(3):
        alone = ours.generate(model, prefix[i : i + 1], cfg, 5, torch.tensor([i]))
        assert torch.equal(alone.tokens[0], out.tokens[i]) and alone.calls[0] == out.calls[i]
        assert alone.score[0] == pytest.approx(out.score[i].item())
    never = ours.SamplerConfig(steps=20, stop_entropy=0.0)
    assert (ours.generate(model, prefix, never).calls == 20).all()


def test_sample_prints_its_text(capsys):
    flags = ["--prompt=fr twelve", "--sampler=diffusion_gemma", "--num_samples=2", "--steps=9"]
    sample.main(flags)
    stdout, stderr = capsys.readouterr()
    assert stdout.count("douze\n") == 2 and "network calls" in stderr and "greedy" not in stderr
    for flag, message in (
        ("--candidates=2", "'candidates' is not a setting of extras.diffusion_gemma"),
        ("--stability=-1", "stability must be at least 0, got -1"),
        ("--temperature_start=0", "temperature_start must be at least 0.001, got 0.0"),
        ("--infill=a[[2]]", "--infill needs a diffusion model, read by diffusion.py"),
        (f"--init_from={sample.DEMO / 'ar.pt'}", "needs paradigm=diffusion, got ar"),
    ):
        with pytest.raises(ValueError, match=message):
            sample.main([*flags, flag])


def test_a_model_of_mask_noise_is_refused():
    model = Transformer(ModelConfig(**SIZES | dict(noise="mask")))
    with pytest.raises(ValueError, match="sampler=diffusion_gemma needs noise=uniform, got mask"):
        ours.generate(model, torch.zeros(1, 2, dtype=torch.long), ours.SamplerConfig())
