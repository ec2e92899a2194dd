"""What sample.py prints: the texts on stdout, their cost on stderr."""

import sys
from itertools import takewhile

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
    calls = f"{float(out.calls.float().mean()):g} network calls per sample"
    n = getattr(decoder.sampler, "candidates", 1)
    best = f" | best of {n}" if n > 1 else ""
    speed = f"{n_tokens / seconds:,.0f} tokens/s ({n_tokens} in {seconds:.3f} s)"
    print(f"{speed} | {calls} | score {float(out.score.mean()):.4f}{best}", file=sys.stderr)
