"""Files that are whole or not there: written beside their place and moved, and sealed with the digest of their bytes.

What torch.save writes is a zip archive. Its comment holds the SHA-256 of all that stands before it, so that one flipped
bit is noticed; any reader of such archives still reads it. An archive without a comment, as ours once were, is read as
it is.
"""

import contextlib
import hashlib
import os
import shutil
from pathlib import Path

import torch


class Damaged(ValueError):
    """A checkpoint whose bytes are not those that were written."""


def write_state(path: str | Path, state: dict, keep: int = 0) -> None:
    """Write tensors and plain values, sealed; see write_atomically."""

    def write(file):
        torch.save(state, file)
        _seal(file)

    write_atomically(path, write, keep)


def write_atomically(path: str | Path, write, keep: int = 0) -> None:
    """Let write(file) fill a temporary file, then put it in the place of path. What fails leaves path as it was.

    keep: 0 for a file that stands alone; of a run's checkpoints so many stay, see put_in_place.
    """
    path = Path(path)
    half = path.with_name(path.name + ".tmp")
    try:
        with open(half, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        put_in_place(half, path, keep)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error}); what stood there before is untouched") from None


def history(path: str | Path, n: int) -> Path:
    """The place of the n-th newest checkpoint: ckpt.pt, ckpt.1.pt, ckpt.2.pt, .."""
    path = Path(path)
    return path.with_name(f"{path.stem}.{n}{path.suffix}") if n else path


def put_in_place(new: Path, path: Path, keep: int) -> None:
    """Move a finished file (or folder) to path; what stood there and before moves on in history. keep of them stay.

    keep 0: there is no history. Nothing but path is touched, and a folder there is an error.
    """
    if path.is_dir() and not any((path / name).exists() for name in SHARDS):
        raise IsADirectoryError(f"{path} is a folder, and no checkpoint")
    if keep == 0:
        os.replace(new, path)
        return _sync(path.parent)
    n = max(keep, 2)
    while os.path.lexists(history(path, n)):  # more were kept once
        remove(history(path, n))
        n += 1
    for n in range(keep - 1, 1, -1):
        if os.path.lexists(history(path, n - 1)):
            remove(history(path, n))
            os.replace(history(path, n - 1), history(path, n))
    before, folders = history(path, 1), new.is_dir() or path.is_dir()
    if path.exists() and (keep > 1 or folders):
        remove(before)
        if folders or not _linked(path, before):
            os.replace(path, before)
    os.replace(new, path)
    if keep == 1:
        remove(before)
    _sync(path.parent)


SHARDS = ("fields.pt", ".metadata")  # what tells a checkpoint that is a folder (sharded.py) from any other folder


def _sync(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot sync a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _linked(path: Path, name: Path) -> bool:
    """Give a file a second name, so that at no moment it is without one. Not every file system can."""
    try:
        os.link(path, name)
    except OSError:
        return False
    return True


def remove(path: Path) -> None:
    """A file or a whole folder; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


SEAL = (7 + 64).to_bytes(2, "little") + b"sha256 "  # length of the comment, and how it begins; 64 hex digits follow
UNSEALED = b"PK\x05\x06", b"\0\0"  # how the last record of an archive without a comment begins and ends


def _seal(file) -> None:
    """Write the digest of all that is in the file into the comment of the archive that it is."""
    end = file.seek(-2, os.SEEK_END)  # the last two bytes say how long the comment is
    digest = sha256(file, end)
    file.seek(end)
    file.write(SEAL + digest)


def is_sealed(file) -> bool:
    """Whether the file carries the digest of its bytes. Raises ValueError where it does and they have changed."""
    size = file.seek(0, os.SEEK_END)
    end = size - len(SEAL) - 64
    file.seek(max(end, 0))
    comment = file.read()
    if end >= 0 and comment.startswith(SEAL):
        if sha256(file, end) != comment[len(SEAL) :]:
            raise ValueError("its bytes are not those that were written: the SHA-256 is another")
        return True
    file.seek(max(size - 22, 0))
    last, (begin, close) = file.read(), UNSEALED
    file.seek(0)
    if file.read(4) == b"PK\x03\x04" and not (last.startswith(begin) and last.endswith(close)):
        raise ValueError("its end is missing or has changed")
    return False


def sha256(file, end: int | None = None) -> bytes:
    """Hex digest of the first `end` bytes, or of all."""
    end = file.seek(0, os.SEEK_END) if end is None else end
    digest = hashlib.sha256()
    file.seek(0)
    while end > 0:
        part = file.read(min(end, 1 << 20))
        if not part:
            break
        digest.update(part)
        end -= len(part)
    return digest.hexdigest().encode()


def read_state(path: Path, device: str = "cpu") -> dict:
    """What write_state wrote. Raises ValueError where it cannot be read, Damaged where it has changed."""
    with open(path, "rb") as file:  # what cannot be opened is an OSError that says why
        sealed = False
        try:
            sealed = is_sealed(file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # damaged bytes raise nearly anything, also OSError, IndexError and struct.error
            reason = (str(error).strip() or type(error).__name__).split("\n")[0][:120]
            other = history(path, 1)
            hint = f"; {other} is the one before it" if other.exists() else ""
            kind = ValueError if sealed else Damaged  # what is as it was written is not damaged: memory may be short
            raise kind(f"{path}: not a readable checkpoint (truncated, or not ours): {reason}{hint}") from None
    return state
