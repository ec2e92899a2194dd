"""sample.py: prompts, decoders, and what it refuses. The models have random weights."""

import io
import re

import pytest
from eval_models import BYTES, CACHED, JOINT, save_model

import sample
from extras.infilling import parse_template
from model import ModelConfig

PAD = BYTES.pad_id
AR = dict(block_size=24, target_length=12)
MODELS = {"ar": AR, "diffusion": AR | JOINT}
MODELS["cached"] = AR | CACHED | dict(shift=True, self_conditioning=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, settings in MODELS.items():
        save_model(folder / f"{name}.pt", **settings)
    return folder


@pytest.fixture
def generate(checkpoints, capsys):
    """generate("ar", "--prompt=x", ...) -> (stdout, stderr)."""

    def call(name, *flags):
        sample.main([f"--init_from={checkpoints / name}.pt", "--device=cpu", *flags])
        return tuple(capsys.readouterr())

    return call


def samples(stdout: str) -> list[str]:
    parts = re.split("^--- sample ", stdout, flags=re.MULTILINE)[1:]
    return [part.split("\n", 1)[1] for part in parts]


@pytest.mark.parametrize("name", ["ar", "diffusion", "cached"])
def test_a_text_depends_on_the_seed_only(generate, name):
    flags = ["--prompt=abc", "--temperature=1.0"]
    first = generate(name, *flags)[0]
    assert first == generate(name, *flags)[0] != generate(name, *flags, "--seed=2")[0]
    three = samples(generate(name, *flags, "--num_samples=3")[0])
    assert three[0] == first and len(set(three)) == 3
    if name == "ar":
        closing = generate(name, "--prompt=abc", "--num_samples=3")[1]
        assert closing.startswith("all samples are equal; raise --temperature\n")


@pytest.mark.parametrize(("steps", "candidates"), [(3, 2), (5, 1)])
def test_the_calls_are_steps_times_candidates(generate, steps, candidates):
    flags = ["--prompt=abc", f"--steps={steps}", f"--candidates={candidates}"]
    closing = generate("diffusion", *flags, "--temperature=1.0", "--num_samples=2")[1]
    assert f" {steps * candidates} network calls per sample |" in closing


def test_infilling_keeps_the_given_text(generate):
    for name in ("diffusion", "cached"):
        for flags in ([], ["--prompt=abc"], ["--sampler=confidence"]):
            stdout, _ = generate(name, "--infill=ab[[3]]cd", "--candidates=2", *flags)
            assert re.fullmatch(r"ab.{0,3}cd\n", stdout, re.DOTALL), stdout


def test_a_diffusion_model_may_be_read_from_left_to_right(generate):
    ar, line = generate("cached", "--prompt=hello", "--sampler=ar")
    assert ar != generate("cached", "--prompt=hello")[0] and " 11 network calls" in line


def test_a_template_is_slots_and_then_pads():
    m = ModelConfig(**MODELS["diffusion"])
    slots = parse_template("ab[[2]]c[[1]]", BYTES, m)
    assert slots == [97, 98, -1, -1, 99, -1] + [PAD] * 5
    slots = parse_template("[[1], 2][[3]]", BYTES, m)
    assert slots == [*b"[[1], 2]", -1, -1, -1]


def read(monkeypatch, stdin: bytes = b"", **given) -> str:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    cfg = sample.SampleConfig(**{k: v for k, v in given.items() if k != "init_from"})
    return sample.read_prompt(cfg, given | {"init_from": "x"})


def test_the_prompt_comes_from_a_flag_a_file_or_stdin(tmp_path, monkeypatch):
    """One line end at the end is dropped; byte order mark and carriage returns are too."""
    path = tmp_path / "p"
    for content in (b"n\xc3\xa9\n\n", b"\xef\xbb\xbfn\xc3\xa9\r\n\r\n", b"n\xc3\xa9\r\r"):
        path.write_bytes(content)
        assert read(monkeypatch, prompt_file=str(path)) == "né\n"
        assert read(monkeypatch, content) == read(monkeypatch, content, prompt_file="-") == "né\n"
    assert read(monkeypatch, b"unread", prompt="x\n") == "x\n"
    assert read(monkeypatch, b"unread", infill="[[1]]") == ""
    path.write_bytes(b"ab\xff")
    for source, flags in (("p", {"prompt_file": str(path)}), ("stdin", {})):
        with pytest.raises(ValueError, match=f"{source}: not UTF-8 text .byte 2"):
            read(monkeypatch, b"ab\xff", **flags)
    assert sample.read_prompt(sample.SampleConfig(), {}) == sample.DEMO_PROMPT


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ar", "--prompt=a --steps=3", "'steps' is not a setting of autoregressive"),
        ("diffusion", "--prompt=a --top_k=3", "'top_k' is not a setting of diffusion"),
        ("ar", "--prompt=a --shift", "cannot set shift=True: .* has shift=False"),
        ("diffusion", "--prompt=a --noise=mask", "cannot set noise=mask: .* has noise=uniform"),
        ("ar", "--prompt=a --infill=[[2]]", "--infill needs a diffusion model"),
        ("ar", "--prompt=", "the prompt is empty"),
        ("ar", "--prompt=a --prompt_file=b", "not both"),
        ("ar", "--prompt_file=no/file", "No such file"),
        ("cached", "--prompt=a --sampler=resampel", "did you mean 'resample'?"),
        ("cached", "--prompt=a --draft=o", "decoder-only AR model, got paradigm=diffusion"),
        ("ar", "--prompt=a --draft=o --steps=3", "'steps' is not a setting of extras.speculative"),
        ("ar", "--prompt=" + "a" * 13, "the prompt has 13 tokens, the model reads at most 12"),
        ("ar", "--prompt=a\udcff", "surrogate"),
        ("diffusion", "--infill=a[[x]]", r"\[\[x\]\] is not a number of slots"),
        ("diffusion", "--infill=a", "no slot is free"),
        ("diffusion", "--infill=ab[[10]]", "12 slots, 1 more than the model has"),
        ("diffusion", "--infill=[[1]] --prompt=" + "a" * 13, "the prompt has 13 tokens"),
    ],
)
def test_bad_input_is_refused_in_one_line(generate, name, flags, message):
    with pytest.raises((ValueError, OSError), match=message) as refused:
        generate(name, *flags.split())
    assert "\n" not in str(refused.value)


def test_settings_that_agree_with_the_model_are_allowed(generate, tmp_path):
    generate("diffusion", "--prompt=a", "--target_length=12", "--paradigm=diffusion")
    save_model(tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt has target_length=0: train it first"):
        sample.main([f"--init_from={tmp_path / 'x.pt'}", "--prompt=a"])
