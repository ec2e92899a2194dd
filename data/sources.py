"""What the real data sets share: files fetched and read, and examples made into a set of pairs that fits a model.

A source is a file on this machine or a URL. What is fetched is kept in out/downloads, under its host and path, and is
there the next time. An example is a dict with at least "id", "prefix" (what the model reads) and "target".
"""

import gzip
import hashlib
import http.client
import os
import re
import sys
import tarfile
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import numpy as np

from data.loader import OUT, write_pairs
from data.tokenizer import get_tokenizer

DOWNLOADS = "out/downloads"  # where fetched files are kept
FIT = 99  # percent of the training targets, and of the prefixes, that target_length=0 and block_size=0 make room for
TIMEOUT = 30  # seconds without a byte, after which a server counts as gone
CHUNK = 1 << 20  # bytes
BROKEN = (OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile, RuntimeError)  # damaged or encrypted


class Download(NamedTuple):
    """A file on the internet; size and sha256 where they are published for good, else 0 and ""."""

    url: str
    size: int = 0  # bytes
    sha256: str = ""


@dataclass
class SetConfig:
    """Settings of every set that is made from a real source."""

    source: str = ""
    name: str = ""  # the set becomes the folder out/name
    tokenizer: str = "bytes"  # bytes | gpt2 | the path of a tokenizer.json
    target_length: int = 0  # tokens, separator included; 0: room for FIT percent of the training targets
    block_size: int = 0  # tokens, prefix and target; 0: room for FIT percent of the training prefixes
    out: str = OUT  # the folder the set goes into

    def __post_init__(self):
        if not self.name or Path(self.name).name != self.name:
            raise ValueError(f"--name=NAME must be a plain folder name, got {self.name!r}")
        if self.target_length < 0 or self.target_length == 1 or self.block_size < 0:
            raise ValueError(
                f"target_length must be 0 or at least 2 and block_size 0 or more, got {self.target_length} and "
                f"{self.block_size}"
            )


# Fetching


def local(source: str, known: Iterable[Download] = ()) -> str:
    """The path of a source on this machine: itself, or if it is a URL, its copy in DOWNLOADS, fetched if need be.

    known: what sizes and checksums there are. Raises ValueError, naming the way out, where it cannot be fetched.
    """
    if "://" not in source:
        return source
    download = next((d for d in known if d.url == source), Download(source))
    parts = urlsplit(source)
    path = Path(DOWNLOADS, parts.netloc, *(p for p in unquote(parts.path).split("/") if p not in ("", ".", "..")))
    if not path.exists():
        try:
            _fetch(download, path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
            raise ValueError(f"{source}: cannot be fetched ({reason}); give a copy on disk with --source") from None
    return str(path)


def _fetch(download: Download, path: Path) -> None:
    """Fill path, whole and as published, or not at all."""
    half = path.with_name(path.name + ".part")
    # Some hosts turn away a client without a name that they know.
    request = urllib.request.Request(download.url, headers={"User-Agent": "Mozilla/5.0 (ar2diff data)"})
    try:
        with ExitStack() as opened:
            response = opened.enter_context(urllib.request.urlopen(request, timeout=TIMEOUT))
            path.parent.mkdir(parents=True, exist_ok=True)
            file = opened.enter_context(open(half, "wb"))
            total, done, digest = int(response.headers.get("Content-Length") or download.size), 0, hashlib.sha256()
            of, watched = f" of {total / 1e6:,.1f}" if total else "", sys.stderr.isatty()
            while chunk := response.read(CHUNK):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if watched:
                    print(f"\r{path.name}: {done / 1e6:,.1f}{of} MB", end="", file=sys.stderr, flush=True)
            if watched:
                print(file=sys.stderr)
            file.flush()
            os.fsync(file.fileno())
        # A connection that breaks off looks like the end of the file.
        wanted = download.size or total
        if wanted and done != wanted:
            raise ValueError(f"{done:,} bytes came, {wanted:,} were expected")
        if download.sha256 and digest.hexdigest() != download.sha256:
            raise ValueError(f"its sha256 is {digest.hexdigest()}, {download.sha256} was expected")
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
    print(f"{path}: {done / 1e6:,.1f} MB fetched from {download.url}", flush=True)


# Reading


def read_lines(path: str, member: str = "") -> Iterator[str]:
    """The lines of a UTF-8 file without their ends, one at a time; only "\\n" and "\\r\\n" end a line.

    The file is plain or .gz; or a .tar or .tgz with this member; or a .zip with one text file, those whose name begins
    with "_" aside. Raises ValueError that names file and line.
    """
    where, number = f"{path} ({member})" if member else path, 0
    try:
        with ExitStack() as opened:
            for number, line in enumerate(_open(path, member, opened), start=1):
                # str.splitlines would also cut at a form feed or U+2028, which are inside of sentences.
                yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}, line {number}: not UTF-8 text (byte {error.start}); convert it first") from None
    except BROKEN as error:
        raise ValueError(f"{where}: cannot be read after line {number} ({error})") from None


def _open(path: str, member: str, opened: ExitStack) -> Iterable[bytes]:
    if path.endswith((".tar", ".tgz", ".tar.gz")):
        archive = opened.enter_context(tarfile.open(path, "r|*"))  # read once from front to back, nothing unpacked
        found = next((archive.extractfile(entry) for entry in archive if entry.name.removeprefix("./") == member), None)
        if found is None:
            raise ValueError(f"{path}: has no member {member!r} (another archive, or it breaks off before it)")
    elif path.endswith(".zip"):
        archive = opened.enter_context(zipfile.ZipFile(path))
        texts = [name for name in archive.namelist() if re.search(r"(^|/)[^_/][^/]*\.(txt|tsv)$", name)]
        if len(texts) != 1:
            raise ValueError(f"{path}: wants one text file in it, has {', '.join(archive.namelist()) or 'nothing'}")
        found = archive.open(texts[0])
    else:
        found = open(path, "rb")
    found = opened.enter_context(found)
    return opened.enter_context(gzip.open(found)) if (member or path).endswith(".gz") else found


def is_held_out(key: str, share: float) -> bool:
    """Whether an example with this key is held out, by a hash of its letters and digits: the same on every machine.

    "Go on!" and "go on." are one key, so that no model is tested on what it was trained on but for a full stop.
    """
    bare = "".join(c for c in key.casefold() if c.isalnum()) or key
    return int.from_bytes(hashlib.sha256(bare.encode("utf-8", "surrogatepass")).digest()[:8], "big") < share * 2**64


# Writing


def write_set(cfg: SetConfig, train: Iterable[dict], valid: Iterable[dict], command: str, **meta) -> dict:
    """Write the set out/name and print what became of the examples; the meta as written, with the free fields `meta`.

    A pair that does not fit target_length and block_size is left out, never cut, and so is one with an empty target or
    "source". How many is printed and kept in the meta (too_long, empty), for the held-out split too: its loss is that
    of the pairs that are left, and an evaluator, which reads the source again, scores every example.
    seen_in_training: held-out prefixes that training has as well.

    Raises ValueError for a split without pairs that fit, or that names an example whose text is no Unicode.
    """
    tokenizer, seen = get_tokenizer(cfg.tokenizer), {}
    typecode = "H" if tokenizer.vocab_size <= 1 << 16 else "I"
    splits, empty = {"train": _Packed(typecode), "valid": _Packed(typecode)}, {"train": 0, "valid": 0}
    for split, examples in (("valid", valid), ("train", train)):
        for example in examples:
            if not example["target"] or example.get("source") == "":
                empty[split] += 1
                continue
            try:
                splits[split].append(tokenizer.encode(example["prefix"]), tokenizer.encode(example["target"]))
            except ValueError as error:
                raise ValueError(f"{split} example {example['id']}: {error}") from None
            if split == "valid" or example["prefix"] in seen:
                seen[example["prefix"]] = split == "train"
        if not len(splits[split]):
            raise ValueError(f"{cfg.source}: leaves no example for {split}")
    prefixes, targets = splits["train"].lengths().T
    target_length = cfg.target_length or _room(targets) + 1
    block_size = cfg.block_size or _room(prefixes) + target_length
    counts = {split: len(pairs) for split, pairs in splits.items()}
    for split, pairs in splits.items():
        pairs.keep(block_size - target_length, target_length - 1)
        if not len(pairs):
            raise ValueError(
                f"none of the {counts[split]:,} {split} pairs fits target_length={target_length} and "
                f"block_size={block_size}"
            )
    too_long = {split: counts[split] - len(pairs) for split, pairs in splits.items()}
    free = {"too_long": too_long, "empty": empty, "seen_in_training": sum(seen.values()), "command": command}
    folder = Path(cfg.out) / cfg.name
    written = write_pairs(folder, splits, cfg.tokenizer, target_length, block_size, **free, **meta)
    print(
        f"{folder}: {len(splits['train']):,} pairs, {len(splits['valid']):,} held out; tokenizer {cfg.tokenizer}, "
        f"target_length {target_length}, block_size {block_size}\n"
        f"left out as too long: {too_long['train']:,} of {counts['train']:,} in training, {too_long['valid']:,} of "
        f"{counts['valid']:,} held out; as empty: {empty['train']:,} and {empty['valid']:,}; held-out prefixes seen in "
        f"training: {free['seen_in_training']:,}"
    )
    return written


class _Packed:
    """Pairs of token ids in two flat arrays: as lists of Python's numbers WMT14 would not fit into memory."""

    def __init__(self, typecode: str):
        self.ids, self.ends, self.rows = array(typecode), array("q", [0]), None

    def append(self, prefix: list[int], target: list[int]) -> None:
        for side in (prefix, target):
            self.ids.extend(side)
            self.ends.append(len(self.ids))

    def lengths(self) -> np.ndarray:
        """(N, 2): tokens of prefix and target."""
        return np.diff(np.array(self.ends)).reshape(-1, 2)

    def keep(self, prefix: int, target: int) -> None:
        """Leave only the pairs of at most so many tokens."""
        self.rows = np.flatnonzero((self.lengths() <= (prefix, target)).all(axis=1))

    def __len__(self) -> int:
        return len(self.ends) // 2 if self.rows is None else len(self.rows)

    def __getitem__(self, i: int) -> tuple[array, array]:
        a, b, c = self.ends[2 * self.rows[i] : 2 * self.rows[i] + 3]
        return self.ids[a:b], self.ids[b:c]


def _room(lengths: np.ndarray) -> int:
    """The smallest length that FIT percent of them do not exceed."""
    return int(np.percentile(lengths, FIT, method="inverted_cdf"))
