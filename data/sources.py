"""What the builders of data sets share: settings, downloads, text files, and examples to pairs.

A source is a path or a URL. Downloads are kept in out/downloads, under their host and path.
An example is a dict with at least "prefix" (what the model reads) and "target".
"""

import gzip
import hashlib
import http.client
import json
import os
import shlex
import shutil
import tarfile
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from configurator import configure, setting, validate
from data.hashing import hash_number
from data.loader import OUT, SETS, write_pairs, write_stream
from data.tokenizer import Tokenizer, get_tokenizer

DOWNLOADS = "out/downloads"
STREAM_SIZES = (128, 256)  # target_length and block_size of a stream, by default
FIT = 99  # percent of the training targets, and of the prefixes, that fit by default
TIMEOUT = 30  # seconds without a byte
GZIP = b"\x1f\x8b"  # how gzip files begin
# What a damaged or encrypted archive raises.
DAMAGED = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError)


@dataclass
class OutConfig:
    out: str = setting(OUT, "the folder for the data sets", path=True)

    def __post_init__(self):
        validate(self)


@dataclass
class SetConfig(OutConfig):
    """Settings of a data set of pairs. Their defaults differ from set to set."""

    name: str = setting("", "the data set becomes the folder out/name")
    tokenizer: str = setting("bytes", "bytes, gpt2, or the path of a tokenizer.json")
    target_length: int = setting(0, "tokens with separator; 0: automatic", minimum=2, zero_ok=True)
    block_size: int = setting(0, "tokens of prefix and target; 0: automatic", minimum=0)

    def __post_init__(self):
        super().__post_init__()
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"--name=NAME must be a plain folder name, got {self.name!r}")


# Downloads


def local(source: str, checksums: dict[str, str] | None = None) -> str:
    """Return the path of a source. Download a URL first, unless its copy is in DOWNLOADS.

    checksums: sha256 by URL. ARCHIVE::MEMBER stays so.
    """
    if "://" not in source:
        return os.path.expanduser(source)
    address, separator, member = source.partition("::")
    url = urlsplit(address)
    parts = [part for part in unquote(url.path).split("/") if part not in ("", ".", "..")]
    path = Path(DOWNLOADS, url.netloc, *parts)
    if not path.exists():
        print(f"downloading {address}", flush=True)
        try:
            _download(address, path, (checksums or {}).get(address, ""))
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
            remedy = f"give a copy on disk with --source, or put it at {path}"
            raise ValueError(f"{address}: cannot be downloaded ({reason}); {remedy}") from None
    return f"{path}{separator}{member}"


def _download(url: str, path: Path, sha256: str) -> None:
    """Write the whole file to path, or nothing."""
    # Some hosts refuse a client without a known name.
    request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (ar2diff data)"})
    partial = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            with open(partial, "w+b") as file:
                shutil.copyfileobj(response, file)
                size = file.tell()
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            expected = int(response.headers.get("Content-Length") or size)
        if size != expected:  # a broken connection looks like the end of the file
            raise ValueError(f"got {size:,} bytes, expected {expected:,}")
        if digest != (sha256 or digest):
            raise ValueError(f"its sha256 is {digest}, expected {sha256}")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


# Reading


def normalize_text(raw: bytes, source: str) -> str:
    """Decode UTF-8. Remove a byte order mark; write each line end (CRLF, CR, LF) as "\\n"."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 text (byte {error.start})"
        raise ValueError(f"{source}: {fault}; convert it first") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: str | Path) -> str:
    """Return the text of a file, gunzipped if needed. Raises ValueError that names the file."""
    try:
        raw = Path(path).expanduser().read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(GZIP) else raw
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except DAMAGED as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    text = normalize_text(raw, str(path))
    if not text.strip():
        raise ValueError(f"{path}: empty")
    return text


def parse_json(text: str, where: str):
    """Return the JSON value. Raises ValueError that names the place, also for a huge number."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable as JSON ({str(error)[:60]})") from None


def read_json_lines(path: str | Path) -> Iterator[tuple[int, object]]:
    """Yield (line number, value) for each line of JSON. Blank lines are skipped."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_json(line, f"{path}, line {number}")


def read_lines(path: str) -> Iterator[str]:
    """Yield the lines of a UTF-8 file, without line ends and byte order mark.

    The file is plain or .gz, or ARCHIVE::MEMBER of a .tar or .tgz, or a .zip with one text file.
    Line i of a translation must stay line i, so only "\\n" ends a line, and no form feed.
    """
    number = 0
    try:
        with ExitStack() as stack:
            for number, line in enumerate(_open(path, stack), start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 text (byte {error.start})") from None
    except DAMAGED as error:
        raise ValueError(f"{path}: cannot be read at or after line {number} ({error})") from None


def _open(path: str, stack: ExitStack) -> Iterable[bytes]:
    path, _, member = path.partition("::")
    if member:
        # Read from front to back, nothing is unpacked.
        archive = stack.enter_context(tarfile.open(path, "r|*"))
        entry = next((e for e in archive if e.name.removeprefix("./") == member), None)
        if entry is None:
            raise ValueError(f"{path}: has no member {member!r}; is it truncated, or another file?")
        file = archive.extractfile(entry)
    elif path.endswith(".zip"):
        archive = stack.enter_context(zipfile.ZipFile(path))
        names = [n for n in archive.namelist() if n.endswith((".txt", ".tsv")) and n[0] != "_"]
        if len(names) != 1:
            raise ValueError(f"{path}: must hold one text file, has {', '.join(names) or 'none'}")
        file = archive.open(names[0])
    else:
        file = open(path, "rb")
    stack.enter_context(file)
    gzipped = (member or path).endswith(".gz")
    return stack.enter_context(gzip.open(file)) if gzipped else file


def is_held_out(key: str, share: float) -> bool:
    """Decide by a hash of the letters and digits: "Go on!" and "go on." are one key."""
    letters = "".join(c for c in key.casefold() if c.isalnum()) or key
    return hash_number(letters) < share * 2**256


# Writing


def write_set(
    cfg: SetConfig,
    train: Iterable[dict],
    valid: Iterable[dict],
    command: list[str],
    fit=FIT,
    **free,
) -> None:
    """Write the data set out/name and print a summary.

    Pairs with an empty target or "source", and pairs that are too long, are left out and counted.
    They are never cut, because at test time nobody knows where in a text the answer is.
    command: module and flags. fit: percent of the training pairs that automatic lengths fit.
    free: fields of meta.json.
    """
    tokenizer = get_tokenizer(cfg.tokenizer)
    splits = {"train": _encode(train, tokenizer), "valid": _encode(valid, tokenizer)}
    lengths = np.array([[len(side) for side in pair] for pair in splits["train"] or [((), ())]])
    prefix, target = np.percentile(lengths, fit, axis=0, method="inverted_cdf").astype(int).tolist()
    target_length = cfg.target_length or max(2, target + 1)
    block_size = cfg.block_size or prefix + target_length
    left_out = {}
    for split, pairs in splits.items():
        splits[split] = [
            (prefix, target)
            for prefix, target in pairs
            if len(prefix) <= block_size - target_length and 0 < len(target) < target_length
        ]
        empty = sum(not target for _, target in pairs)
        left_out[split] = {"empty": empty, "too_long": len(pairs) - len(splits[split]) - empty}
    sizes = (target_length, block_size)
    _write(write_pairs, cfg, splits, sizes, command, left_out=left_out, **free)


def _encode(examples: Iterable[dict], tokenizer: Tokenizer) -> list[tuple[array, array]]:
    """Return the pairs of token ids. An empty source makes the target empty, too."""
    typecode = "H" if tokenizer.vocab_size <= 1 << 16 else "I"  # a list needs four times as much
    pairs = []
    for example in examples:
        target = example["target"] if example.get("source") != "" else ""
        try:
            sides = [tokenizer.encode_prompt(example["prefix"]), tokenizer.encode(target)]
        except ValueError as error:
            raise ValueError(f"{error}; in {str(example)[:80]}") from None
        pairs.append(tuple(array(typecode, side) for side in sides))
    return pairs


def write_texts(cfg: SetConfig, splits: dict, command: list[str], **free) -> None:
    """Write the texts of each split as a stream, with a blank line after each text."""
    tokenizer = get_tokenizer(cfg.tokenizer)
    chunks = {
        split: (tokenizer.encode(text.strip("\n") + "\n\n") for text in texts)
        for split, texts in splits.items()
    }
    sizes = (cfg.target_length or STREAM_SIZES[0], cfg.block_size or STREAM_SIZES[1])
    _write(write_stream, cfg, chunks, sizes, command, **free)


def _write(
    writer: Callable, cfg: SetConfig, splits: dict, sizes: tuple, command: list[str], **free
):
    folder = Path(cfg.out) / cfg.name
    free["command"] = shlex.join(["python", "-m", *command])
    meta = writer(folder, splits, cfg.tokenizer, *sizes, **free)
    settings = [f"{name} {meta[name]}" for name in ("tokenizer", "target_length", "block_size")]
    print(f"{folder}: {', '.join(settings)}")
    for field in ("splits", "left_out"):
        for split, counts in meta.get(field, {}).items():
            numbers = ", ".join(f"{n:,} {what}" for what, n in counts.items())
            print(f"  {field} {split}: {numbers}")


def write_generated(
    argv: list[str], names: list[str], examples: Callable, target_length: int, prefix_length: int
) -> None:
    """Write data sets of generated examples. examples: (name, split) -> examples."""
    out = configure(OutConfig, argv).out
    sizes = {"target_length": target_length, "block_size": prefix_length + target_length}
    for name in names:
        cfg = SetConfig(out=out, name=name, **sizes)
        splits = [examples(name, split) for split in ("train", "valid")]
        write_set(cfg, *splits, [SETS[name], f"--out={out}"])
