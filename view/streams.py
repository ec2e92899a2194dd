"""Make the standard streams safe: any character set, closed streams and terminals, `| head`."""

import errno
import os
import sys
from functools import partial


class Output:
    """A text stream that drops its text once the reader or the terminal has gone."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name):
        method = getattr(self.stream, name)
        return partial(self._call, method) if name in ("write", "flush") else method

    def _call(self, method, *args):
        try:
            return method(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):  # no reader, no terminal
                raise
            # The work goes on, its output is dropped.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def secure_streams() -> None:
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed by the caller: no file of ours may get this number
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)
        stream = getattr(sys, name)
        if number and hasattr(stream, "reconfigure"):
            setattr(sys, name, Output(stream))
