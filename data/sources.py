"""What the builders of data sets share: settings, downloads, text files, and examples to pairs.

A source is a path or a URL. An example is a dict with "prefix" (what the model reads) and "target".
"""

import gzip
import hashlib
import http.client
import json
import os
import shlex
import socket
import urllib.request
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from configurator import configure, require, setting, validate
from data.loader import OUT, SETS, write_pairs, write_stream
from data.tokenizer import Tokenizer, get_tokenizer

DOWNLOADS = "out/downloads"


@dataclass
class OutConfig:
    out: str = setting(OUT, "the folder for the data sets", path=True)

    def __post_init__(self):
        validate(self)


@dataclass
class SetConfig(OutConfig):
    name: str = setting("", "the data set becomes the folder out/name")
    tokenizer: str = setting("bytes", "bytes, gpt2, or the path of a tokenizer.json")
    target_length: int = setting(0, "tokens with separator; 0: automatic", minimum=2, zero_ok=True)
    block_size: int = setting(0, "tokens of prefix and target; 0: automatic", minimum=0)


def local(source: str, checksums: dict[str, str] | None = None) -> str:
    """Return the path of a source. A URL is downloaded once. checksums: sha256 by URL."""
    if "://" not in source:
        return os.path.expanduser(source)
    url = urlsplit(source)
    path = Path(DOWNLOADS, url.netloc, unquote(url.path).lstrip("/"))
    if not path.exists():
        print(f"downloading {source}", flush=True)
        opener = urllib.request.build_opener()
        opener.addheaders = [("User-Agent", "Mozilla/5.0 (ar2diff data)")]  # some hosts want a name
        urllib.request.install_opener(opener)
        socket.setdefaulttimeout(30)
        partial = path.with_name(path.name + ".part")
        wanted = (checksums or {}).get(source)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            urllib.request.urlretrieve(source, partial)  # raises if the connection breaks
            if wanted and hashlib.sha256(partial.read_bytes()).hexdigest() != wanted:
                raise ValueError(f"its sha256 is not {wanted}")
            partial.rename(path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            partial.unlink(missing_ok=True)
            reason = str(error).removeprefix("<urlopen error ").removesuffix(">")
            remedy = f"give a copy on disk, or put it at {path}"
            raise ValueError(f"{source}: cannot be downloaded ({reason}); {remedy}") from None
    return str(path)


def normalize_text(raw: bytes, source: str) -> str:
    """Decode UTF-8. Remove a byte order mark; write each line end (CRLF, CR, LF) as "\\n"."""
    return unix_lines(_decoded(raw, source))


def unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _decoded(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 text (byte {error.start})"
        raise ValueError(f"{source}: {fault}; convert it first") from None


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file: plain, gzipped, or a .zip with one text file."""
    text = normalize_text(_read_bytes(path), str(path))
    if not text.strip():
        raise ValueError(f"{path}: empty")
    return text


def read_lines(path: str | Path) -> list[str]:
    """Return the lines of a file that `read_text` can read, without line ends.

    Line i of a translation must stay line i, so only "\\n" ends a line, and no form feed.
    """
    lines = _decoded(_read_bytes(path), str(path)).split("\n")
    if not lines[-1]:  # the file ends with a line end
        lines.pop()
    return [line.rstrip("\r") for line in lines]


def _read_bytes(path: str | Path) -> bytes:
    """Return the unpacked bytes of a file. Raises ValueError that names the file."""
    try:
        path = Path(path).expanduser()
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                names = [n for n in archive.namelist() if n[0] != "_"]
                texts = [n for n in names if n.endswith((".txt", ".tsv"))]
                require(len(texts) == 1, f"{path}: must hold one text file, has {texts}")
                return archive.read(texts[0])
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None


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


def has_json(path: str) -> bool:
    """Return whether a file has lines of JSON. A .json file is never meant as plain text."""
    return path.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson", ".json"))


def read_prompts(path: str) -> list[str]:
    """Return the prompts of a file: lines of text, or of JSON with "prompt" or "text"."""
    if has_json(path):
        items = [item for _, item in read_json_lines(path) if isinstance(item, dict)]
        texts = [item.get("prompt", item.get("text")) for item in items]
    else:
        texts = read_lines(path)
    usable = [text for text in texts if isinstance(text, str) and text.strip()]
    hint = 'write a prompt a line, or JSON lines with "prompt" or "text"'
    require(len(usable) > 1, f"{path}: {len(usable)} usable lines, 2 are needed; {hint}")
    return usable


def hash_number(key: str) -> int:
    """Return 256 bits: the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest(), "big")


def percent(key: str) -> int:
    """Return 0 to 99, by a hash of the key."""
    return (hash_number(key) >> 192) % 100


def is_held_out(key: str, share: float) -> bool:
    """Decide by a hash of the letters and digits: "Go on!" and "go on." are one key."""
    letters = "".join(c for c in key.casefold() if c.isalnum()) or key
    return hash_number(letters) < share * 2**256


def write_set(cfg: SetConfig, examples: dict, command: list[str], fit=99, **free) -> None:
    """Write the data set out/name from the examples of each split, and print a summary.

    Pairs with an empty target or "source", and pairs that are too long, are left out and counted.
    They are never cut, because at test time nobody knows where in a text the answer is.
    fit: percent of the training pairs that automatic lengths fit. free: fields of meta.json.
    """
    tokenizer = get_tokenizer(cfg.tokenizer)
    splits = {split: _encode(examples[split], tokenizer) for split in ("train", "valid")}
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
    free |= {"command": shlex.join(["python", "-m", *command]), "left_out": left_out}
    _write(write_pairs, cfg, splits, target_length, block_size, free)


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
    free["command"] = shlex.join(["python", "-m", *command])
    _write(write_stream, cfg, chunks, cfg.target_length or 128, cfg.block_size or 256, free)


def _write(writer, cfg: SetConfig, splits: dict, target_length: int, block_size: int, free: dict):
    folder = Path(cfg.out) / cfg.name
    if folder.parent != Path(cfg.out):
        raise ValueError(f"--name=NAME must be a plain folder name, got {cfg.name!r}")
    meta = writer(folder, splits, cfg.tokenizer, target_length, block_size, **free)
    sizes = f"target_length {target_length} | block_size {block_size}"
    print(f"{folder} | {meta['tokenizer']} | {sizes}")
    for field in ("splits", "left_out"):
        for split, counts in meta.get(field, {}).items():
            numbers = ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items())
            print(f"  {split}{' left out' if field == 'left_out' else ''}: {numbers}")


def write_generated(argv, names, examples, target_length: int, prefix_length: int) -> None:
    """Write data sets of generated examples. examples: (name, split) -> examples."""
    out = configure(OutConfig, argv).out
    sizes = {"target_length": target_length, "block_size": prefix_length + target_length}
    for name in names:
        cfg = SetConfig(out=out, name=name, **sizes)
        splits = {split: examples(name, split) for split in ("train", "valid")}
        write_set(cfg, splits, [SETS[name], f"--out={out}"])
