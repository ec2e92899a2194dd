"""Token files on disk and batches from them. One format for every set, a folder with

    meta.json             format number, kind, tokenizer, dtype, counts, target_length, block_size, sha256, free fields
    train.bin, valid.bin  all tokens in a row, uint16 or uint32, memory-mapped
    train.idx, valid.idx  kind "pairs" only: int64 rows (start, split, end) into the .bin; prefix | target

A batch is a function of (seed, step, batch_size) alone, so that resuming, accumulating and the number of processes
change nothing. There is no loader position to save.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.objectives import Batch, ObjectiveConfig, Tokens, collate, prefix_lm, seq2seq, span_corruption, span_counts
from data.tokenizer import FILE, Tokenizer, get_tokenizer

FORMAT = 1
OUT = "out/data"  # where the sets are built
DOCUMENT_BREAK = "\n\n"  # between the documents of a stream; a pad would be invisible inside a prefix

# Sets that can be built with no input, and the module that does it.
SETS = {
    "mini": "data.mini",
    "mini_translation": "data.mini",
    "mini_qa": "data.mini",
    "mini_code": "data.mini",
    "toy_copy": "data.toy",
    "toy_reverse": "data.toy",
    "toy_sort": "data.toy",
    "python_code": "data.python_code",
    "python_pairs": "data.python_code",
    "squad": "data.squad",  # from here on fetched
    "mbpp": "data.mbpp",
    "multi30k": "data.parallel",
}


# Reading


class _Set:
    """What a stream and pairs share: the folder's meta and the memory-mapped tokens of one split."""

    def __init__(self, folder: Path, split: str, meta: dict, objective: ObjectiveConfig):
        self.folder, self.split, self.meta, self.objective = folder, split, meta, objective
        self.tokenizer_name, self.target_length = meta["tokenizer"], meta["target_length"]
        self.block_size = meta["block_size"]  # longest prefix + target_length
        if self.tokenizer_name.startswith(f"{FILE}@"):
            get_tokenizer(self.tokenizer_name, folder)  # read now: from here on its name is enough
        self.fingerprint = meta["sha256"][:16]  # of the content: two sets are equal if and only if this is
        self.tokens = _map(folder, f"{split}.bin", meta["dtype"], meta["splits"][split]["tokens"], meta)  # (N,)

    @property
    def tokenizer(self) -> Tokenizer:
        return get_tokenizer(self.tokenizer_name, self.folder)

    @functools.cached_property
    def longest(self) -> int:
        """Tokens of the longest text that prefix and target have room for under the objective."""
        room, width = self.block_size - self.target_length, self.target_length - 1
        if self.objective.objective != "span_corruption":
            return room + width

        def fits(length: int) -> bool:
            hidden, spans = span_counts(length, self.objective.span_density, self.objective.mean_span)
            return length - hidden + spans <= room and hidden + spans <= width

        return max((length for length in range(2, 2 * self.block_size) if fits(length)), default=0)

    def _cut(self, tokens: Tokens, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
        """Prefix and target from a text of at least 2 tokens, or a random part of it where it is too long."""
        start = int(rng.integers(0, max(len(tokens) - self.longest, 0) + 1))
        tokens = tokens[start : start + self.longest]
        if self.objective.objective == "span_corruption":
            sentinels = range(self.tokenizer.sentinel(0), self.tokenizer.vocab_size)
            return span_corruption(tokens, rng, sentinels, self.objective.span_density, self.objective.mean_span)
        first = max(1, len(tokens) - self.target_length + 1)
        split = int(rng.integers(first, min(self.block_size - self.target_length, len(tokens) - 1) + 1))
        return prefix_lm(tokens, split, self.target_length)

    def _collate(self, pairs: list, step: int, batch_size: int, rows: slice) -> Batch:
        examples = step * batch_size + np.arange(batch_size)[rows]
        batch = collate(pairs, examples, self.tokenizer.pad_id, self.tokenizer.sep_id, self.target_length)
        if any(part.numel() and int(part.max()) >= self.tokenizer.vocab_size for part in batch[:2]):
            raise ValueError(
                f"{self.folder}/{self.split}.bin: holds ids that tokenizer {self.tokenizer_name!r} has not; build the "
                f"set with: {_command(self.folder)}"
            )
        return batch


class TokenStream(_Set):
    """A long text: every example is a random window of it, cut into prefix and target. len() counts tokens."""

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None), bucket: int = 1) -> Batch:
        """The part `rows` of the global batch of this step; the same for every process and micro-batch.

        The prefix length is drawn once per step, from 1 to block_size - target_length, so that no batch needs a mask
        and bucket has nothing to do. A window may cross from one document into the next. Under span corruption all
        windows have one length, and so have all prefixes.
        """
        rng = _rng("stream", seed, step)
        if self.objective.objective == "span_corruption":
            starts = rng.integers(0, len(self.tokens) - self.longest + 1, size=batch_size)
            pairs = [
                self._cut(self.tokens[starts[i] : starts[i] + self.longest], _rng("spans", seed, step * batch_size + i))
                for i in range(batch_size)[rows]
            ]
            return self._collate(pairs, step, batch_size, rows)
        split = int(rng.integers(1, self.block_size - self.target_length + 1))
        width = split + self.target_length - 1
        starts = rng.integers(0, len(self.tokens) - width + 1, size=batch_size)[rows]
        windows = self.tokens[starts[:, None] + np.arange(width)]  # (B, split + target_length - 1)
        return self._collate([prefix_lm(w, split, self.target_length) for w in windows], step, batch_size, rows)


class Pairs(_Set):
    """Given prefixes with given targets. len() counts pairs."""

    def __init__(self, folder: Path, split: str, meta: dict, objective: ObjectiveConfig):
        super().__init__(folder, split, meta, objective)
        n = meta["splits"][split]["pairs"]
        self.index = _map(folder, f"{split}.idx", "int64", 3 * n, meta).reshape(n, 3)  # (N, 3) start, split, end
        self._plans = {}
        start, split, end = self.index.T  # (N,) each
        if not ((0 <= start) & (start <= split) & (split <= end) & (end <= len(self.tokens))).all():
            raise ValueError(
                f"{folder}/{self.split}.idx: points outside the tokens; build the set with: {_command(folder)}"
            )

    def __len__(self) -> int:
        return len(self.index)

    def pair(self, i: int) -> tuple[list[int], list[int]]:
        """(prefix, target) token ids of the i-th pair in file order, without separator and padding."""
        prefix, target = self._pair(i)
        return prefix.tolist(), target.tolist()

    def text(self, i: int) -> tuple[str, str]:
        """(prefix, target) of the i-th pair in file order, as text."""
        prefix, target = self._pair(i)
        return self.tokenizer.decode(prefix), self.tokenizer.decode(target)

    def batch(self, seed: int, step: int, batch_size: int, rows: slice = slice(None), bucket: int = 1) -> Batch:
        """The part `rows` of the global batch of this step; the same for every process and micro-batch.

        An epoch is len // batch_size steps and shows no pair twice; the len % batch_size pairs it leaves out are
        another random few each time. With fewer pairs than batch_size every batch holds all of them, some more often
        than others. bucket: so many neighbouring rows have prefixes of one length where possible and, read together,
        need no mask; it divides batch_size. Under another objective than auto each pair is one text, prefix, line end
        and target, that is cut anew every time.
        """
        if bucket < 1 or batch_size % bucket:
            raise ValueError(f"bucket must divide batch_size, got {bucket} and {batch_size}")
        per_epoch = max(1, len(self) // batch_size)
        epoch, k = divmod(step, per_epoch)
        chosen = self._plan(seed, epoch, batch_size, bucket)[k, rows]
        if self.objective.objective == "auto":
            return self._collate([self._pair(i) for i in chosen], step, batch_size, rows)
        line_end, examples = self.tokenizer.encode("\n"), range(step * batch_size, (step + 1) * batch_size)[rows]
        texts = [np.concatenate([prefix, line_end, target]) for prefix, target in map(self._pair, chosen)]
        pairs = [self._cut(text, _rng("cut", seed, example)) for text, example in zip(texts, examples)]
        return self._collate(pairs, step, batch_size, rows)

    def _pair(self, i: int) -> tuple[Tokens, Tokens]:
        if not 0 <= i < len(self):
            raise ValueError(f"{self.folder} has {self.split} pairs 0 to {len(self) - 1}, got {i}")
        start, split, end = self.index[i]
        return seq2seq(self.tokens[start:split], self.tokens[split:end])

    def _plan(self, seed: int, epoch: int, batch_size: int, bucket: int) -> np.ndarray:
        """Which pair goes where in an epoch: (n_batches, batch_size). Kept, for every step asks; else recomputed."""
        key = seed, epoch, batch_size, bucket
        plan = self._plans.get(key)
        if plan is None:
            lengths = self.index[:, 1] - self.index[:, 0]
            plan = bucketed_epoch(lengths, batch_size, bucket, _rng("epoch", seed, epoch))
            self._plans = {key: plan}  # in one piece: a thread may ask for another epoch meanwhile
        return plan


def bucketed_epoch(lengths: np.ndarray, batch_size: int, bucket: int, rng: np.random.Generator) -> np.ndarray:
    """A shuffled order of all examples, (n_batches, batch_size), in runs of `bucket` of equal length where possible.

    With bucket 2 and lengths 5 5 5 7 7 8: two full runs (5 5) (7 7), and what is left over, sorted, (5 8).
    The remainder is dropped at random before sorting: dropped after it, the longest examples would never be seen.
    """
    n_batches = max(1, len(lengths) // batch_size)
    order = np.resize(rng.permutation(len(lengths)), n_batches * batch_size)  # resize drops the end, or wraps around
    if bucket > 1:
        order = order[np.argsort(lengths[order], kind="stable")]
        _, first, count = np.unique(lengths[order], return_index=True, return_counts=True)
        place = np.arange(len(order)) - np.repeat(first, count)  # of an example among those of its length
        full = place < np.repeat(count - count % bucket, count)
        runs = np.concatenate([order[full], order[~full]]).reshape(-1, bucket)
        order = runs[rng.permutation(len(runs))]
    return order.reshape(n_batches, batch_size)


def open_set(folder: str | Path, split: str, objective: ObjectiveConfig | None = None) -> TokenStream | Pairs:
    """The 'train' or 'valid' split of a set, memory-mapped. objective: what its batches ask for.

    Raises ValueError, naming the file and the command that builds it, if the set is missing, truncated or of another
    format.
    """
    folder = Path(folder)
    meta = _read_meta(folder)
    if split not in meta["splits"]:
        raise ValueError(f"{folder} has the splits {', '.join(map(repr, meta['splits']))}, got {split!r}")
    return {"stream": TokenStream, "pairs": Pairs}[meta["kind"]](folder, split, meta, objective or ObjectiveConfig())


def build_if_missing(folder: str | Path) -> Path:
    """The folder of a set, built first if it is not there and its name is in SETS; the line that builds it is printed.

    A bare name such as "mini" means out/data/mini. Raises ValueError for a missing folder that is not in SETS. With
    several processes only one may call this.
    """
    folder = Path(folder)
    if str(folder) in SETS and not folder.exists():
        folder = Path(OUT) / folder
    if (folder / "meta.json").exists():
        return folder
    if folder.name not in SETS:
        raise ValueError(f"{folder}: no such set, and it is none of those that can be built: {', '.join(SETS)}")
    module = SETS[folder.name]
    print(f"building {folder}: {_command(folder)}", flush=True)
    # A process of its own: a set imports this file, never the other way round.
    root, out = Path(__file__).absolute().parent.parent, folder.parent.absolute()
    out = out.relative_to(root) if out.is_relative_to(root) else out  # what a set says of itself names no machine
    done = subprocess.run([sys.executable, "-m", module, f"--out={out.as_posix()}"], check=False, cwd=root)
    if done.returncode:
        raise ValueError(f"{folder}: {_command(folder)} failed with exit status {done.returncode}")
    return folder


def _read_meta(folder: Path) -> dict:
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; build the set with: {_command(folder)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); build the set with: {_command(folder)}") from None
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: format {found!r}, this code reads {FORMAT}; build the set with: {_command(folder)}")
    wrong = _wrong_field(meta)
    if wrong:
        raise ValueError(f"{path}: its field {wrong!r} is missing or wrong; build the set with: {_command(folder)}")
    return meta


def _wrong_field(meta: dict) -> str:
    """The first field of a header that is not what a writer puts there, or ""."""
    kinds = {"tokenizer": str, "sha256": str, "target_length": int, "block_size": int, "splits": dict}
    for name, kind in kinds.items():
        if type(meta.get(name)) is not kind:
            return name
    if meta.get("kind") not in ("stream", "pairs") or meta.get("dtype") not in ("uint16", "uint32"):
        return "kind" if meta.get("kind") not in ("stream", "pairs") else "dtype"
    if not 2 <= meta["target_length"] <= meta["block_size"]:
        return "target_length"
    counted = ("tokens", "pairs") if meta["kind"] == "pairs" else ("tokens",)
    for split, counts in meta["splits"].items():
        if not isinstance(counts, dict) or not all(type(counts.get(c)) is int and counts[c] > 0 for c in counted):
            return f"splits.{split}"
    return ""


def _map(folder: Path, name: str, dtype: str, count: int, meta: dict) -> np.ndarray:
    """Memory-mapped array (count,). Its size must be what meta.json says: a copy broken off would train in silence."""
    path, expected = folder / name, count * np.dtype(dtype).itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        fault = "not found" if size is None else f"{size} bytes, meta.json says {expected}"
        raise ValueError(f"{path}: {fault}; build the set with: {meta.get('command') or _command(folder)}")
    return np.memmap(path, dtype=dtype, mode="r")


def _command(folder: Path) -> str:
    if folder.name in SETS:
        return f"python -m {SETS[folder.name]} --out={folder.parent}"
    return f"python -m data.text_file --input=FILE --name={folder.name} --out={folder.parent}"


def _rng(purpose: str, seed: int, place: int) -> np.random.Generator:
    """A generator keyed by what is drawn and where, never by what was drawn before."""
    if seed < 0 or place < 0:
        raise ValueError(f"seed and step must be 0 or more, got seed={seed}, step or epoch={place}")
    # Two words each: SeedSequence glues its words together, and a long seed must not run into the step behind it.
    words = [word for value in (seed, place) for word in (value & 0xFFFFFFFF, value >> 32)]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([*purpose.encode(), *words])))


# Writing


def write_stream(
    folder: str | Path,
    splits: dict[str, Iterable[Tokens]],
    tokenizer_name: str,
    target_length: int,
    block_size: int,
    **meta,
) -> dict:
    """Write a stream set: each split is an iterable of token chunks, laid end to end (see `join_documents`).

    Returns the meta as written; `meta` adds free fields. Raises ValueError if a split is shorter than block_size.
    """
    if not 2 <= target_length < block_size:
        raise ValueError(f"want 2 <= target_length < block_size, got {target_length} and {block_size}")
    with _Writer(folder, "stream", tokenizer_name, target_length, block_size, meta) as writer:
        for split, chunks in splits.items():
            n = writer.tokens(split, chunks)
            if n < block_size:
                raise ValueError(
                    f"{folder}: {split} has {n} tokens, fewer than block_size={block_size}: more text, please"
                )
            writer.counts[split] = {"tokens": n}
    return writer.meta


def write_pairs(
    folder: str | Path,
    splits: dict[str, Sequence[tuple[Tokens, Tokens]]],
    tokenizer_name: str,
    target_length: int,
    block_size: int,
    **meta,
) -> dict:
    """Write a set of pairs: each split is a sequence of (prefix, target) token ids, without separator.

    Returns the meta as written; `meta` adds free fields. Raises ValueError, naming the pair, if a target has more than
    target_length - 1 tokens or a prefix more than block_size - target_length.
    """
    with _Writer(folder, "pairs", tokenizer_name, target_length, block_size, meta) as writer:
        for split, pairs in splits.items():
            for i, (prefix, target) in enumerate(pairs):
                for side, tokens, limit in (
                    ("prefix", prefix, block_size - target_length),
                    ("target", target, target_length - 1),
                ):
                    if len(tokens) > limit:
                        raise ValueError(
                            f"{folder}: {split} pair {i}: its {side} has {len(tokens)} tokens, limit {limit}"
                        )
            if not len(pairs):
                raise ValueError(f"{folder}: {split} has no pairs")
            n = writer.tokens(split, (side for pair in pairs for side in pair))
            ends = np.cumsum([len(side) for pair in pairs for side in pair], dtype=np.int64).reshape(-1, 2)  # (N, 2)
            starts = np.concatenate([[0], ends[:-1, 1]])
            writer.file(f"{split}.idx", [np.column_stack([starts, ends]).astype("<i8")])
            writer.counts[split] = {"tokens": n, "pairs": len(pairs)}
    return writer.meta


def join_documents(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Token chunks of the documents, each followed by DOCUMENT_BREAK: what `write_stream` lays end to end."""
    for text in texts:
        yield tokenizer.encode(text.strip("\n") + DOCUMENT_BREAK)


class _Writer:
    """Writes a set beside its place and moves it there whole, so that a half-written set is never opened."""

    def __init__(self, folder, kind: str, tokenizer_name: str, target_length: int, block_size: int, meta: dict):
        self.folder, self.counts = Path(folder), {}
        self.tokenizer = get_tokenizer(tokenizer_name)
        self.n_ordinary, tokenizer_name = self.tokenizer.n_ordinary, self.tokenizer.name  # a path is no name to keep
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"
        self.meta = {
            "format": FORMAT,
            "kind": kind,
            "tokenizer": tokenizer_name,
            "dtype": self.dtype,
            "target_length": target_length,
            "block_size": block_size,
            "splits": self.counts,
        }
        if self.folder.exists() and not (self.folder / "meta.json").is_file():
            raise ValueError(f"{folder}: exists and is no data set, so it is not replaced; choose another name")
        taken = set(self.meta) & set(meta)
        if taken:
            raise ValueError(f"{folder}: free meta fields may not be called {', '.join(sorted(taken))}")
        self.meta |= meta
        self.digest = hashlib.sha256(f"{kind} {tokenizer_name} {target_length} {block_size}".encode())
        self.scratch = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")

    def __enter__(self):
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        return self

    def tokens(self, split: str, chunks: Iterable[Tokens]) -> int:
        """Write `<split>.bin`; the number of tokens. Only ordinary ids: a pad in a prefix is never seen."""
        return self.file(f"{split}.bin", (self._ordinary(chunk) for chunk in chunks))

    def _ordinary(self, chunk: Tokens) -> np.ndarray:
        ids = np.asarray(chunk, dtype=np.int64)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.n_ordinary):
            raise ValueError(
                f"{self.folder}: token ids must be 0 to {self.n_ordinary - 1}, got {ids.min()} to {ids.max()}"
            )
        return ids.astype(self.dtype)

    def file(self, name: str, arrays: Iterable[np.ndarray]) -> int:
        self.digest.update(name.encode())
        n = 0
        with open(self.scratch / name, "wb") as f:
            for array in arrays:
                n += len(array)
                self.digest.update(array.tobytes())
                f.write(array.tobytes())
        return n

    def __exit__(self, kind, error, trace):
        if kind is None:
            self.meta["sha256"] = self.digest.hexdigest()
            if self.tokenizer.file:
                (self.scratch / FILE).write_text(self.tokenizer.file, encoding="utf-8")
            (self.scratch / "meta.json").write_text(
                json.dumps(self.meta, indent=1, ensure_ascii=False), encoding="utf-8"
            )
            old = self.scratch.with_suffix(".old")
            if self.folder.exists():
                self.folder.rename(old)  # a folder that is not empty cannot be renamed over
            self.scratch.rename(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
