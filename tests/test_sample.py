"""sample.py: what it prints, what it refuses, and how the canvas is drawn. Checkpoints are random weights."""

import io
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import autoregressive
import diffusion
import sample
from checkpoint import save
from data.tokenizer import get_tokenizer
from model import ModelConfig, Transformer

ROOT = Path(sample.__file__).parent
BYTES = get_tokenizer("bytes")
PAD = BYTES.pad_id
TINY = dict(n_layer=1, n_head=2, n_embd=16, block_size=24, target_length=12)
DIFFUSION = dict(paradigm="diffusion", prefix_attention="joint", target_attention="bidirectional")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Paths: ar, diffusion, frozen (AR can read it, too), shifted (with everything a diffusion model can have)."""
    folder, paths = tmp_path_factory.mktemp("checkpoints"), {}
    kinds = {
        "ar": {},
        "diffusion": DIFFUSION,
        "frozen": DIFFUSION | dict(prefix_attention="bidirectional", shift=True, self_conditioning=True),
        "shifted": DIFFUSION | dict(prefix_attention="causal", shift=True, lookahead=True, self_conditioning=True),
    }
    for name, settings in kinds.items():
        torch.manual_seed(0)
        paths[name] = str(folder / f"{name}.pt")
        save(paths[name], Transformer(ModelConfig(**TINY | settings)), 0, "bytes")
    return paths


@pytest.fixture
def generate(checkpoints, capsys):
    """generate("ar", "--prompt=x", ...) -> (stdout, stderr)."""

    def call(name, *flags):
        sample.main([f"--init_from={checkpoints[name]}", "--device=cpu", *flags])
        return tuple(capsys.readouterr())

    return call


def samples(stdout: str) -> list[str]:
    return [part.split("\n", 1)[1] for part in re.split("^--- sample ", stdout, flags=re.MULTILINE)[1:]]


@pytest.mark.parametrize("name", ["ar", "diffusion", "shifted"])
def test_one_seed_gives_one_text(generate, name):
    flags = ["--prompt=abc", "--temperature=1.0"]
    first, again, other = generate(name, *flags), generate(name, *flags), generate(name, *flags, "--seed=2")
    assert first[0] == again[0] and first[0] != other[0]
    assert first[0].endswith("\n") and "abc" not in first[0] and "--- sample" not in first[0]


@pytest.mark.parametrize("name", ["ar", "diffusion"])
def test_more_samples_leave_the_first_as_it_was(generate, name):
    flags = ["--prompt=abc", "--temperature=1.0"]
    one, three = generate(name, *flags)[0], samples(generate(name, *flags, "--num_samples=3")[0])
    assert three[0] == one and len(set(three)) == 3


def test_greedy_samples_of_an_ar_model_are_alike_and_it_says_so(generate):
    stdout, stderr = generate("ar", "--prompt=abc", "--num_samples=2")
    assert len(set(samples(stdout))) == 1 and "temperature 0 is greedy" in stderr


def test_bfloat16_is_used_where_asked(generate):
    closing = [generate("ar", "--prompt=abc", f"--dtype={dtype}")[1] for dtype in ("float32", "bfloat16")]
    a, b = (float(re.search(r"score ([\d.]+)", line)[1]) for line in closing)
    assert a != b and a == pytest.approx(b, rel=0.02)


@pytest.mark.parametrize("steps, candidates", [(3, 2), (5, 1)])
def test_calls_printed_are_steps_times_candidates(generate, steps, candidates):
    flags = ["--prompt=abc", "--temperature=1.0", f"--steps={steps}", f"--candidates={candidates}"]
    assert f" {steps * candidates} network calls |" in generate("diffusion", *flags)[1]
    stdout, stderr = generate("diffusion", *flags, "--num_samples=2", "--show")
    assert f" {steps * candidates} network calls a sample |" in stderr
    assert f"step {steps} of {steps} | {steps * candidates} network calls" in stdout


def test_infill_keeps_the_given_text(generate):
    for name in ("diffusion", "shifted"):
        for flags in ([], ["--prompt=abc"], ["--sampler=confidence"]):
            stdout, _ = generate(name, "--infill=ab[[3]]cd", "--candidates=2", *flags)
            assert re.fullmatch(r"ab.{0,3}cd\n", stdout, re.DOTALL), stdout


def test_one_diffusion_checkpoint_is_decoded_in_three_ways(generate):
    """Left to right and by speculation it says the same; by diffusion something else."""
    ar, ar_line = generate("frozen", "--prompt=hello", "--sampler=ar")
    found, line = generate("frozen", "--prompt=hello", "--sampler=speculative", "--draft_steps=3")
    assert found == ar != generate("frozen", "--prompt=hello")[0]
    calls = [int(re.search(r"(\d+) network calls", text)[1]) for text in (ar_line, line)]
    assert calls[0] == 11 and calls[1] % 2 == 0 and 4 <= calls[1] <= 24  # 3 + 1, then 1 + 1 a round
    shown, _ = generate("frozen", "--prompt=hello", "--sampler=speculative", "--show")
    assert shown.endswith(found) and "step 2 of ? | 2 network calls" in shown
    warm = [generate("frozen", "--prompt=a", "--sampler=speculative", f"--temperature={t}")[0] for t in (0, 1.5)]
    assert warm[0] != warm[1]


def test_template_is_slots_then_fixed_pads():
    m = ModelConfig(**TINY | DIFFUSION)
    assert sample.parse_template("ab[[2]]c[[1]]", BYTES, m) == [97, 98, -1, -1, 99, -1] + [PAD] * 5
    assert sample.parse_template("[[1], 2][[3]]", BYTES, m) == [*b"[[1], 2]", -1, -1, -1]


def test_a_pad_ends_a_text_but_not_a_template():
    ids = [97, PAD, 98, PAD]
    assert sample._without_pads(ids, PAD, infilled=False) == [97]
    assert sample._without_pads(ids, PAD, infilled=True) == [97, 98]


def test_prompt_comes_from_flag_file_or_stdin_without_its_last_newline(tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes("né\n\n".encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"piped\r\n")))
    assert sample.read_prompt({"prompt": "x\n"}) == "x\n"
    assert sample.read_prompt({"prompt_file": str(tmp_path / "p")}) == "né\n"
    assert sample.read_prompt({"infill": "[[1]]"}) == ""  # and stdin is left alone
    assert sample.read_prompt({}) == "piped"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"dash")))
    assert sample.read_prompt({"prompt_file": "-"}) == "dash"


REFUSED = [
    ("ar", ["--prompt=a", "--steps=3"], "unknown setting 'steps' for an AR checkpoint"),
    ("diffusion", ["--prompt=a", "--top_k=3"], "unknown setting 'top_k' for a diffusion checkpoint"),
    ("ar", ["--prompt=a", "--stepz=3"], "did you mean 'steps'"),
    ("ar", ["--prompt=a", "--shift"], "shift=False, but shift=True is asked for; a model's settings are fixed"),
    ("diffusion", ["--prompt=a", "--noise=mask"], "noise=uniform, but noise=mask"),
    ("diffusion", ["--prompt=a", "--target_length=9"], "target_length=12, but target_length=9"),
    ("ar", ["--prompt=a", "--infill=[[2]]"], "infill needs a diffusion checkpoint"),
    ("ar", ["--prompt="], "the prompt is empty"),
    ("frozen", ["--prompt=a", "--sampler=speculatve"], "did you mean 'speculative'?"),
    ("ar", ["--prompt=a", "--sampler=speculative"], "speculation drafts with a diffusion model"),
    ("diffusion", ["--prompt=a", "--sampler=speculative"], "this model's is joint"),
    ("shifted", ["--prompt=a", "--sampler=speculative"], "lookahead"),
    (
        "frozen",
        ["--prompt=a", "--sampler=speculative", "--steps=3"],
        "for sampler=speculative and a diffusion checkpoint",
    ),
    ("frozen", ["--infill=[[2]]", "--sampler=ar"], "infill needs a sampler that fills gaps; sampler=ar and"),
    ("ar", ["--prompt=" + "a" * 13], "13 tokens and the target 12, the model's block_size is 24: a prompt of"),
    ("ar", ["--prompt=a\udcff"], "lone surrogate at character 1"),
    ("ar", ["--prompt=a", "--prompt_file=b"], "not both"),
    ("ar", ["--prompt=a", "--num_samples=0"], "num_samples must be 1 or more, got 0"),
    ("ar", ["--prompt=a", "--pause=-1"], "pause must be 0 to 60"),
    ("ar", ["--prompt=a", "--dtype=int8"], "dtype must be one of"),
    ("ar", ["--prompt=a", "--device=gpu"], "device 'gpu' is not there"),
    ("diffusion", ["--infill=a[[x]]"], "[[x]] is no number of slots"),
    ("diffusion", ["--infill=a[[0]]"], "[[0]] is no number of slots"),
    ("diffusion", ["--infill=a[[-1]]"], "[[-1]] is no number of slots"),
    ("diffusion", ["--infill=a"], "has no [[n]]"),
    ("diffusion", ["--infill="], "has no [[n]]"),
    ("diffusion", ["--infill=ab[[10]]"], "takes 12 slots, the model's target has 11"),
    ("diffusion", ["--prompt=" + "a" * 13, "--infill=[[1]]"], "a prompt of at most 12 tokens fits"),
]


@pytest.mark.parametrize("name, flags, message", REFUSED)
def test_bad_input_is_refused_in_one_line(generate, name, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        generate(name, *flags)
    assert "\n" not in str(refused.value)


def test_a_model_without_targets_cannot_sample():
    with pytest.raises(ValueError, match="x.pt has target_length=0: it was never trained"):
        sample.sampler_config({}, ModelConfig(), "x.pt")


def test_undecodable_prompt_file_is_named_with_the_place(tmp_path):
    (tmp_path / "p").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match="p is not UTF-8 text: byte 0xff at 2"):
        sample.read_prompt({"prompt_file": str(tmp_path / "p")})


def test_an_agreeing_model_setting_is_no_conflict(generate):
    generate("diffusion", "--prompt=a", "--target_length=12", "--paradigm=diffusion")


def command(*flags, stdin=b""):
    env = os.environ | {"PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, "sample.py", *flags], input=stdin, capture_output=True, cwd=ROOT, env=env)


@pytest.mark.slow  # starts Python, 5 s
def test_as_a_command_errors_are_one_line_and_status_2(checkpoints, tmp_path):
    torn = tmp_path / "torn.pt"
    torn.write_bytes(Path(checkpoints["ar"]).read_bytes()[:2000])
    for flag, message in [(f"--init_from={torn}", "truncated"), ("--prompt_file=nowhere", "nowhere: No such file")]:
        done = command(f"--init_from={checkpoints['ar']}", flag)
        stderr = done.stderr.decode()
        assert done.returncode == 2 and done.stdout == b"", stderr
        assert stderr.startswith("error: ") and message in stderr and stderr.count("\n") == 1


@pytest.mark.slow  # starts Python, 3 s
def test_as_a_command_a_pipe_gets_the_text_alone_and_show_has_no_escape_codes(checkpoints, generate):
    flags = ["--infill=ab[[2]]c", "--candidates=2", "--steps=4", "--show"]
    done = command(f"--init_from={checkpoints['diffusion']}", *flags)
    stdout = done.stdout.decode()
    assert done.returncode == 0 and "\x1b[" not in stdout and "\r" not in stdout
    assert "step 4 of 4 | 8 network calls" in stdout
    assert stdout.endswith(generate("diffusion", *flags[:-1])[0])
    assert done.stderr.count(b"\n") == 1 and b"tokens/s" in done.stderr


def test_an_ar_text_grows(generate):
    stdout, _ = generate("ar", "--prompt=abc", "--show", "--temperature=1.0")
    assert "step 1 of 11 | 1 network calls | 1 tokens" in stdout
    assert "step 2 of 11 | 2 network calls | 2 tokens" in stdout


def test_a_setting_of_both_paradigms_has_one_type():
    """One parser reads all settings before the checkpoint says which paradigm it is."""
    both = [{f.name: type(f.default) for f in fields(c.SamplerConfig)} for c in (autoregressive, diffusion)]
    assert {"temperature"} == {name for name in both[0] if name in both[1] and both[0][name] is both[1][name]}
