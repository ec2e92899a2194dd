"""Data sets on disk, and batches from them. A data set is a folder:

    meta.json             kind, tokenizer, counts, target_length, block_size, sha256, free fields
    train.bin, valid.bin  all tokens, uint16 or uint32, memory-mapped
    train.idx, valid.idx  kind "pairs" only: int64 rows (start, split, end) into the .bin file

A batch is a function of (seed, step, batch_size). So resuming, gradient accumulation and the number
of processes change nothing, and there is no loader position to save.
"""

import bisect
import hashlib
import importlib
import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch

from configurator import require, suggest
from data import objectives
from data.objectives import Batch, ObjectiveConfig, Tokens, prefix_lm
from data.tokenizer import FILE, Tokenizer, get_tokenizer
from infra.checkpoint import new_folder

FORMAT = 1
OUT = "out/data"  # where data sets are built

# The module that builds each data set.
SETS = dict.fromkeys(("mini", "mini_translation", "mini_qa", "mini_code"), "data.mini")
SETS |= dict.fromkeys(("toy_copy", "toy_reverse", "toy_sort"), "data.toy")
SETS |= {
    "python_code": "data.python_code",
    "squad": "data.squad",
    "mbpp": "data.mbpp",
    "multi30k": "data.parallel",
}


class _Dataset:
    """One split of a data set: the meta data and the memory-mapped tokens."""

    def __init__(self, folder: Path, split: str, meta: dict, objective: ObjectiveConfig):
        self.folder = folder
        self.split = split
        self.meta = meta
        self.objective = objective.objective
        self.tokenizer_name = meta["tokenizer"]
        self.tokenizer: Tokenizer = get_tokenizer(self.tokenizer_name, folder)
        self.target_length = meta["target_length"]
        self.block_size = meta["block_size"]  # longest prefix + target_length
        self.fingerprint = meta["sha256"][:16]  # of the content, wherever the folder lies
        self.longest = self._longest_text()
        count = meta["splits"][split]["tokens"]
        self.tokens = self._memmap(f"{split}.bin", meta["dtype"], count)  # (N,)

    def _memmap(self, name: str, dtype: str, count: int) -> np.ndarray:
        path = self.folder / name
        size = path.stat().st_size if path.is_file() else 0
        expected = count * np.dtype(dtype).itemsize
        if size != expected:
            raise _unusable(path, f"missing or truncated ({size} bytes, expected {expected})")
        return np.memmap(path, dtype=dtype, mode="r")

    def _longest_text(self) -> int:
        """Return how many tokens of a text fit into prefix and target."""
        prefix_room = self.block_size - self.target_length
        target_room = self.target_length - 1
        if self.objective != "span_corruption":
            return prefix_room + target_room

        def too_long(length: int) -> bool:
            hidden, spans = objectives.span_counts(length)
            too_many = spans > len(self.tokenizer.sentinels)
            return too_many or length - hidden + spans > prefix_room or hidden + spans > target_room

        longest = 1 + bisect.bisect_left(range(2, 2 * self.block_size), True, key=too_long)
        lengths = f"target_length={self.target_length} and block_size={self.block_size}"
        require(longest > 1, f"{self.folder}: {lengths} are too small for span_corruption")
        return longest

    def _cut(self, tokens: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Cut a text, or a random window of it if it is too long, into prefix and target."""
        start = int(rng.integers(0, max(len(tokens) - self.longest, 0) + 1))
        tokens = tokens[start : start + self.longest]
        if self.objective == "span_corruption":
            return objectives.span_corruption(tokens, rng, self.tokenizer.sentinels)
        last = min(self.block_size - self.target_length, len(tokens) - 1)
        first = max(min(1, last), len(tokens) - self.target_length + 1)
        return prefix_lm(tokens, int(rng.integers(first, last + 1)), self.target_length)

    def _collate(self, pairs: list, examples: np.ndarray) -> Batch:
        tokenizer = self.tokenizer
        reserved = (tokenizer.pad_id, tokenizer.sep_id)
        batch = objectives.collate(pairs, examples, *reserved, self.target_length)
        for tokens in (batch.prefix, batch.target):
            if tokens.numel() and int(tokens.max()) >= tokenizer.vocab_size:
                fault = f"has ids outside the vocabulary of {tokenizer.name!r}"
                raise _unusable(self.folder / f"{self.split}.bin", fault)
        return batch


class TokenStream(_Dataset):
    """A long text. Each example is a random window. len() counts tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """Return these rows of the global batch of a step. All prefixes have one length.

        The prefix length is drawn once per step, so no batch needs a padding mask.
        A window may cross from one document into the next.
        """
        examples = step * batch_size + np.arange(batch_size)[rows]
        rng = _rng("stream", seed, step)
        spans = self.objective == "span_corruption"
        split = 0 if spans else int(rng.integers(1, self.block_size - self.target_length + 1))
        width = self.longest if spans else split + self.target_length - 1
        starts = rng.integers(0, len(self.tokens) - width + 1, size=batch_size)[rows]
        windows = [self.tokens[start : start + width] for start in starts]
        if spans:
            pairs = [self._cut(w, _rng("spans", seed, e)) for w, e in zip(windows, examples)]
        else:
            pairs = [prefix_lm(window, split, self.target_length) for window in windows]
        return self._collate(pairs, examples)


class Pairs(_Dataset):
    """Given prefixes with given targets. len() counts pairs."""

    def __init__(self, folder: Path, split: str, meta: dict, objective: ObjectiveConfig):
        super().__init__(folder, split, meta, objective)
        n = meta["splits"][split]["pairs"]
        self.index = self._memmap(f"{split}.idx", "int64", 3 * n).reshape(n, 3)  # (N, 3)
        self._order = lru_cache(maxsize=1)(self._shuffled)  # of the last epoch
        start, split_at, end = self.index.T  # (N,) each
        ordered = (0 <= start) & (start <= split_at) & (split_at <= end) & (end <= len(self.tokens))
        if not ordered.all():
            raise _unusable(folder / f"{split}.idx", "points outside the tokens")

    def __len__(self) -> int:
        return len(self.index)

    def pair(self, i: int) -> tuple[list[int], list[int]]:
        """Return (prefix, target) ids of pair i in file order, without separator and padding."""
        start, split, end = self.index[i]
        return self.tokens[start:split].tolist(), self.tokens[split:end].tolist()

    def text(self, i: int) -> tuple[str, str]:
        """Return (prefix, target) of pair i in file order as text."""
        prefix, target = self.pair(i)
        return self.tokenizer.decode(prefix), self.tokenizer.decode(target)

    def batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        """Return these rows of the global batch of a step.

        An epoch has len // batch_size steps and contains no pair twice. It leaves out
        len % batch_size random pairs. If there are fewer pairs than batch_size, pairs repeat.
        Unless the objective is auto, a pair is one text, "prefix\\ntarget", that is cut anew.
        """
        epoch, k = divmod(step, max(1, len(self) // batch_size))
        chosen = self._order(seed, epoch, batch_size)[k]  # (batch_size,)
        place = np.arange(batch_size)
        if len(place[rows]) < batch_size:  # micro-batches of like lengths need less padding
            lengths = self.index[chosen, 1] - self.index[chosen, 0]
            place = np.argsort(lengths, kind="stable")
        examples = step * batch_size + place[rows]
        pairs = [self.pair(i) for i in chosen[place[rows]]]
        if self.objective != "auto":
            line_end = self.tokenizer.encode("\n")
            texts = [prefix + line_end + target for prefix, target in pairs]
            pairs = [self._cut(t, _rng("cut", seed, e)) for t, e in zip(texts, examples)]
        return self._collate(pairs, examples)

    def _shuffled(self, seed: int, epoch: int, batch_size: int) -> np.ndarray:
        """Return the order of the pairs in an epoch, (steps, batch_size)."""
        steps = max(1, len(self) // batch_size)
        order = _rng("epoch", seed, epoch).permutation(len(self))
        return np.resize(order, (steps, batch_size))  # cuts the end, or repeats


def open_dataset(folder, split: str, objective: ObjectiveConfig | None = None):
    """Open the 'train' or 'valid' split of a data set, a TokenStream or Pairs.

    Raises ValueError, with the command that builds the data set, if a file is missing or damaged.
    """
    folder = Path(folder).expanduser()
    meta = _read_meta(folder)
    names = ", ".join(meta["splits"])
    require(split in meta["splits"], f"{folder} has no split {split!r}; available: {names}")
    cls = TokenStream if meta["kind"] == "stream" else Pairs
    return cls(folder, split, meta, objective or ObjectiveConfig())


def build_if_missing(folder: str | Path) -> Path:
    """Return the folder of a data set. If it is missing and its name is in SETS, build it first.

    A bare name such as "mini" means out/data/mini. Only one process may call this at a time.
    """
    folder = Path(folder).expanduser()
    if str(folder) in SETS and not folder.exists():
        folder = Path(OUT) / folder
    if (folder / "meta.json").exists():
        return folder
    require(folder.name in SETS, f"{folder}: no such data set{suggest(folder.name, SETS)}")
    print(f"building {folder}: {_build_command(folder)}", flush=True)
    builder = importlib.import_module(SETS[folder.name])  # here, because it imports this file
    builder.main([f"--out={folder.parent}"])
    return folder


def prefetch(load: Callable, places: Iterable, device: torch.device) -> Iterator[Batch]:
    """Yield load(*place) for each place, on the device. A thread loads the next batch meanwhile."""
    cuda = device.type == "cuda"

    def load_pinned(place: tuple) -> Batch:
        batch = load(*place)
        return Batch(*(part.pin_memory() for part in batch)) if cuda else batch

    with ThreadPoolExecutor(1, "prefetch") as thread:
        futures = (thread.submit(load_pinned, place) for place in places)
        for future, _following in pairwise(chain(futures, [None])):
            batch = future.result()
            yield Batch(*(part.to(device, non_blocking=cuda) for part in batch))


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        sizes = (meta["target_length"], meta["block_size"])
        counted = {"stream": ["tokens"], "pairs": ["tokens", "pairs"]}[meta["kind"]]
        numbers = [counts[name] for counts in meta["splits"].values() for name in counted]
        good = (
            meta["format"] == FORMAT
            and meta["dtype"] in ("uint16", "uint32")
            and all(type(meta[name]) is str for name in ("tokenizer", "sha256"))
            and all(type(n) is int and n > 0 for n in (*numbers, *sizes))
            and 2 <= sizes[0] <= sizes[1] < 1 << 31
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise _unusable(path, "missing, damaged or of another version")
    return meta


def _unusable(path: Path, fault: str) -> ValueError:
    return ValueError(f"{path}: {fault}; build the data set with: {_build_command(path.parent)}")


def _build_command(folder: Path) -> str:
    module = SETS.get(folder.name, "data.text_file")
    flags = [] if folder.name in SETS else ["--input=FILE", f"--name={folder.name}"]
    return shlex.join(["python", "-m", module, *flags, f"--out={folder.parent}"])


def _rng(purpose: str, seed: int, place: int) -> np.random.Generator:
    """Return a generator keyed by purpose and place, so no draw depends on earlier draws."""
    # Two words each: SeedSequence joins its words, so a long seed must not run into the place.
    words = [word for n in (seed, int(place)) for word in (n & 0xFFFFFFFF, n >> 32)]
    entropy = np.random.SeedSequence([*purpose.encode(), *words])
    return np.random.Generator(np.random.Philox(entropy))


def write_stream(folder, splits: dict, tokenizer: str, target_length, block_size, **free) -> dict:
    """Write the token chunks of each split, end to end. Return meta.json. free: more fields."""
    needed = "a stream needs 2 <= target_length < block_size"
    fits = 2 <= target_length < block_size
    require(fits, f"{needed}, got {target_length} and {block_size}")
    with _writer(folder, "stream", tokenizer, target_length, block_size, free) as (meta, write):
        for split, chunks in splits.items():
            n = write(f"{split}.bin", chunks)
            fault = f"{folder}: {split} has {n} tokens, fewer than block_size={block_size}"
            require(n >= block_size, f"{fault}; add text or set a smaller --block_size")
            meta["splits"][split] = {"tokens": n}
    return meta


def write_pairs(folder, splits: dict, tokenizer: str, target_length, block_size, **free) -> dict:
    """Write the (prefix, target) ids of each split. Return meta.json. free: more fields."""
    limits = (block_size - target_length, target_length - 1)
    with _writer(folder, "pairs", tokenizer, target_length, block_size, free) as (meta, write):
        for split, pairs in splits.items():
            sizes = f"target_length={target_length} and block_size={block_size}"
            require(pairs, f"{folder}: no {split} pair fits {sizes}")
            lengths = np.array([[len(side) for side in pair] for pair in pairs])  # (N, 2)
            bad = (lengths > limits).any(axis=1) | (lengths[:, 1] == 0)
            fault = f"{folder}: {split} pair {bad.argmax()} does not fit {sizes}"
            require(not bad.any(), fault)
            n = write(f"{split}.bin", chain.from_iterable(pairs))
            edges = np.append(0, lengths.cumsum())  # (2N + 1,)
            write(f"{split}.idx", [np.column_stack([edges[:-1:2], edges[1::2], edges[2::2]])])
            meta["splits"][split] = {"tokens": n, "pairs": len(pairs)}
    return meta


@contextmanager
def _writer(folder, kind: str, tokenizer_name: str, target_length: int, block_size: int, free):
    """Yield (meta, write). The files become the folder at the end, if there was no error."""
    folder = Path(folder).expanduser()
    replaces = not folder.exists() or (folder / "meta.json").is_file()
    require(replaces, f"{folder}: exists and is no data set; choose another name")
    tokenizer = get_tokenizer(tokenizer_name)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    meta = {"format": FORMAT, "kind": kind, "tokenizer": tokenizer.name, "dtype": dtype}
    meta |= {"splits": {}, "target_length": target_length, "block_size": block_size} | free
    digest = hashlib.sha256(f"{kind} {tokenizer.name} {target_length} {block_size}".encode())

    def write(name: str, parts: Iterable[Tokens]) -> int:
        """Write one file, tokens (.bin) or places (.idx), and return the number of items."""
        digest.update(name.encode())
        n = 0
        with open(new / name, "wb") as file:
            for part in parts:
                array = np.asarray(part, dtype="<i8")
                if name.endswith(".bin"):
                    outside = array[(array < 0) | (array >= tokenizer.n_ordinary)]
                    if len(outside):
                        limit = tokenizer.n_ordinary - 1
                        raise ValueError(f"{folder}: ids must be 0 to {limit}, got {outside[0]}")
                    array = array.astype(dtype)
                n += len(array)
                digest.update(array.tobytes())
                file.write(array.tobytes())
        return n

    with new_folder(folder) as new:
        yield meta, write
        meta["sha256"] = digest.hexdigest()
        if tokenizer.file:
            (new / FILE).write_text(tokenizer.file, encoding="utf-8")
        text = json.dumps(meta, indent=1, ensure_ascii=False)
        (new / "meta.json").write_text(text, encoding="utf-8", errors="backslashreplace")
