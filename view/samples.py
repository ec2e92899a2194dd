"""Print samples: those of sample.py with their cost, and one of a run. Print checks."""

import sys
from itertools import takewhile

import torch

from view.cells import printable


def print_samples(decoder, out, seconds: float, chat: bool) -> None:
    """Print texts to stdout; speed, calls and score (mean NLL per slot) to stderr."""
    pad_id = decoder.tokenizer.pad_id
    ends = {pad_id}
    if chat:
        from hf.chat import end_ids

        ends |= set(end_ids(decoder.tokenizer))
    n_tokens = 0
    for i, (row, score, calls) in enumerate(zip(*(part.tolist() for part in out))):
        # The first pad ends a text. In a template it is a free slot that was not needed.
        if decoder.template is None:
            row = list(takewhile(lambda token: token not in ends, row))
        row = [token for token in row if token != pad_id]
        n_tokens += len(row)
        if len(out.calls) > 1:
            print(f"--- sample {i} | {calls} network calls | score {score:.4f}")
        text = decoder.tokenizer.decode(row)
        print(printable(text) if sys.stdout.isatty() else text, flush=True)
    if len(out.tokens) > 1 and bool((out.tokens == out.tokens[0]).all()):
        print("all samples are equal; raise --temperature", file=sys.stderr)
    calls = f"{float(out.calls.float().mean()):g} network calls per sample"
    n = getattr(decoder.sampler, "candidates", 1)
    best = f" | best of {n}" if n > 1 else ""
    speed = f"{n_tokens / seconds:,.0f} tokens/s ({n_tokens} in {seconds:.3f} s)"
    print(f"{speed} | {calls} | score {float(out.score.mean()):.4f}{best}", file=sys.stderr)


def print_checks(checks: list) -> bool:
    """Print (claim, measured, ok) of each check. Return whether all hold."""
    for claim, measured, ok in checks:
        print(f"{'ok  ' if ok else 'FAIL'}  {claim:<52} {measured}")
    n = sum(not ok for *_, ok in checks)
    failed = f"FAILED: {n} of {len(checks)} checks. The converted model does not match its source."
    print(failed if n else f"passed: {len(checks)} checks")
    return n == 0


def sample_line(run, step: int) -> str:
    """Generate a target for one validation prefix of a training run."""
    run.model.eval()
    tokenizer = run.valid_set.tokenizer
    batch = run.valid_set.batch(0, 0, 8)
    prompt = batch.prefix[:1].to(run.ctx.device)
    if run.cfg.model.sep_id < 0:
        prompt = torch.cat([prompt, batch.target[:1, :1].to(run.ctx.device)], dim=1)
    out = run.paradigm.generate(run.model, prompt, run.paradigm.SamplerConfig())
    answer = out.tokens[0]
    answer = answer[(answer == tokenizer.pad_id).cumsum(0) == 0]  # up to the first pad
    texts = [repr(tokenizer.decode(part.tolist())) for part in (prompt[0], answer)]
    return f"step {step} sample: {' -> '.join(texts)}"
