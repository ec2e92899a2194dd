"""Make the standard streams safe: any character set, and streams that the caller closed."""

import os
import sys


def secure_streams() -> None:
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed. No file of ours may get its number.
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
