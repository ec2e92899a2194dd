"""What the builders of data sets share: settings, downloads, text files, and examples to pairs.

A source is a path or a URL. Downloads are kept in out/downloads, under their host and path.
An example is a dict with at least "prefix" (what the model reads) and "target".
"""

import gzip
import hashlib
import http.client
import json
import os
import re
import shlex
import tarfile
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from configurator import setting, validate
from data.hashing import hash_number
from data.loader import OUT, SETS, summary, write_pairs, write_stream
from data.tokenizer import Tokenizer, get_tokenizer

DOWNLOADS = "out/downloads"
STREAM_TARGET = 128  # tokens of a target in a stream, by default
STREAM_BLOCK = 256  # tokens of prefix and target in a stream, by default
FIT = 99  # percent of the training targets, and of the prefixes, that fit by default
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes
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
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                while chunk := response.read(CHUNK):
                    file.write(chunk)
                    digest.update(chunk)
            size = partial.stat().st_size
            expected = int(response.headers.get("Content-Length") or size)
        if size != expected:  # a broken connection looks like the end of the file
            raise ValueError(f"got {size:,} bytes, expected {expected:,}")
        if sha256 and digest.hexdigest() != sha256:
            raise ValueError(f"its sha256 is {digest.hexdigest()}, expected {sha256}")
        os.replace(partial, path)
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
    Line i of a translation must stay line i, so a lone "\\r" ends a line only if no "\\n" does.
    """
    number = 0
    try:
        with ExitStack() as stack:
            for line in _split_lines(_open(path, stack)):
                number += 1
                # str.splitlines would also split at a form feed and at U+2028.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        fault = f"line {number}: not UTF-8 text (byte {error.start})"
        raise ValueError(f"{path}, {fault}; convert it first") from None
    except DAMAGED as error:
        raise ValueError(f"{path}: cannot be read after line {number} ({error})") from None


def _split_lines(file: Iterable[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(file):
        if number == 0 and not line.endswith(b"\n"):  # the whole file
            yield from line.removesuffix(b"\r").split(b"\r")
        else:
            yield line


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
        names = archive.namelist()
        texts = [name for name in names if re.search(r"(^|/)[^_/][^/]*\.(txt|tsv)$", name)]
        if len(texts) != 1:
            raise ValueError(f"{path}: must hold one text file, has {', '.join(names) or 'none'}")
        file = archive.open(texts[0])
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
    cfg: SetConfig, train: Iterable[dict], valid: Iterable[dict], command: str, fit=FIT, **free
) -> None:
    """Write the data set out/name and print a summary.

    Pairs with an empty target or "source", and pairs that are too long, are left out and counted.
    They are never cut, because at test time nobody knows where in a text the answer is.
    fit: percent of the training pairs that automatic lengths fit. free: fields of meta.json.
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
        if not splits[split]:
            sizes = f"target_length={target_length} and block_size={block_size}"
            counts = f"{empty} of {len(pairs)} have an empty target"
            raise ValueError(f"{cfg.name}: no {split} pair fits {sizes} ({counts})")
    folder = Path(cfg.out) / cfg.name
    free |= {"command": command, "left_out": left_out}
    meta = write_pairs(folder, splits, cfg.tokenizer, target_length, block_size, **free)
    print(summary(folder, meta))
    for split, counts in left_out.items():
        if any(counts.values()):
            print(
                f"left out in {split}: {counts['empty']:,} empty, {counts['too_long']:,} too long"
            )


def _encode(examples: Iterable[dict], tokenizer: Tokenizer) -> list[tuple[array, array]]:
    """Return the pairs of token ids. An empty source makes the target empty, too."""
    typecode = "H" if tokenizer.vocab_size <= 1 << 16 else "I"  # a list needs four times as much
    pairs = []
    for number, example in enumerate(examples, start=1):
        target = example["target"] if example.get("source") != "" else ""
        try:
            sides = [tokenizer.encode_prompt(example["prefix"]), tokenizer.encode(target)]
        except ValueError as error:
            raise ValueError(f"{example.get('where', f'example {number}')}: {error}") from None
        pairs.append(tuple(array(typecode, side) for side in sides))
    return pairs


def write_texts(cfg: SetConfig, splits: dict, command: str, **free) -> None:
    """Write the texts of each split as a stream, with a blank line after each text."""
    tokenizer = get_tokenizer(cfg.tokenizer)
    chunks = {
        split: (tokenizer.encode(text.strip("\n") + "\n\n") for text in texts)
        for split, texts in splits.items()
    }
    folder = Path(cfg.out) / cfg.name
    sizes = (cfg.target_length or STREAM_TARGET, cfg.block_size or STREAM_BLOCK)
    print(
        summary(
            folder, write_stream(folder, chunks, cfg.tokenizer, *sizes, command=command, **free)
        )
    )


def write_generated(out: str, name: str, examples, target_length: int, prefix_length: int) -> None:
    """Write a data set of generated examples. examples: (name, split) -> examples."""
    sizes = {"target_length": target_length, "block_size": prefix_length + target_length}
    cfg = SetConfig(out=out, name=name, **sizes)
    train, valid = (examples(name, split) for split in ("train", "valid"))
    write_set(cfg, train, valid, shlex.join(["python", "-m", SETS[name], f"--out={out}"]))
