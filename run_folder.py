"""What a run leaves in its folder and how it ends: the log, the signals, what a resumed run may be given anew."""

import json
import signal
from pathlib import Path

from checkpoint import write_atomically

# What a resumed run may be given anew; any other change would make it a different run.
MAY_CHANGE = {
    "max_steps",
    "resume",
    "init_from",
    "out_dir",
    "overwrite",
    "plan",
    "device",
    "dtype",
    "compile",
    "gradient_checkpointing",
    "grad_accum_steps",
}
MAY_CHANGE |= {"log_interval", "eval_interval", "eval_batches", "sample_interval", "save_interval"}


class Log:
    """JSON lines beside the checkpoint. A resumed run drops the lines after its checkpoint: they are written again."""

    def __init__(self, path: Path, first: int):
        kept = []
        if first and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    break  # the last line of a killed run may be torn
                if entry["step"] <= first:
                    kept.append(entry)
        self.last = kept[-1] if kept else {}
        write_atomically(path, lambda file: file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode()))
        self.file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, entry: dict) -> None:
        self.file.write(json.dumps(entry) + "\n")
        self.last = entry

    @staticmethod
    def line(entry: dict) -> str:
        rates = "".join(f" {rate}:{value:.3f}" for rate, value in entry.get("val_loss_by_rate", {}).items())
        ar = f" | AR {entry['val_ar_loss']:.4f}" if "val_ar_loss" in entry else ""
        return f"step {entry['step']:6d} | loss {entry['loss']:.4f} | held-out {entry['val_loss']:.4f}{rates}{ar}"


class StopSignals:
    """Ctrl-C and SIGTERM finish the step, save and stop; a second one stops at once."""

    asked, name = 0, ""

    def __enter__(self):
        self.before = {}
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        except ValueError:
            pass  # not the main thread: whoever called us decides about signals
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked, self.name = number, signal.Signals(number).name
