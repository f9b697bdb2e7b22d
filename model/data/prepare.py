"""Documents to tokens on disk, once for all runs with the same sources and tokenizer.

<cache>/<fingerprint>/
    manifest.json            per source: tokens, documents, unigram entropy, shards with their SHA-256. Written last: the marker
    tokenizer.json
    <source>/train-0000.bin  token ids, little endian, uint16 (vocabulary up to 65,536) or uint32
    <source>/held_out.bin    documents kept from training
    <source>/counts.npy      how often each id stands in the training tokens

A document is <s>, its tokens, </s>, or what stands for these in a tokenizer of the user's. It goes to the held-out part by a hash
of its text, so that copies of one text never stand on both sides. The folder is built under a temporary name and renamed when
whole: a killed preparation leaves nothing that counts, and of two at once one wins and both use its result.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as HuggingFaceTokenizer

from model.data import embedded
from model.data.config import DataConfig, SourceConfig
from model.data.documents import MEND_PATH, find_files, read_file
from model.data.tokenizer import Tokenizer

FORMAT = 1  # of the folder; part of the fingerprint
SHARD_TOKENS = 100_000_000
VERIFIED_BYTES = 4_000_000_000  # of tokens prepared earlier: a launch verifies them in seconds; of more, sizes alone
_BATCH_DOCUMENTS = 256
_SURROGATES = re.compile("[\ud800-\udfff]")  # halves of a character, which JSON can spell and UTF-8 cannot

Progress = Callable[[str, int, int], None]  # what is done, documents so far, tokens so far


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    name: str
    train_tokens: int
    held_out_tokens: int
    documents: int
    text_bytes: int
    unigram_nats: float  # entropy of the training tokens' own distribution
    shards: list[str]  # file names, in order
    shard_tokens: list[int]
    sha256: dict[str, str]


class PreparedData:
    """An opened folder of prepared tokens. Opening costs one read of the manifest: O(number of shards)."""

    def __init__(self, root: Path, manifest: dict[str, Any]) -> None:
        self.root = root
        self.dtype = np.dtype(manifest["dtype"])
        self.vocab_size: int = manifest["vocab_size"]
        self.bos_id: int = manifest.get("bos_id", 1)
        self.eos_id: int = manifest.get("eos_id", 2)
        self.sources = {s["name"]: PreparedSource(**s) for s in manifest["sources"]}
        digest = manifest.get("tokenizer_sha256")
        self._sha256: dict[str, str] = {"tokenizer.json": digest} if digest else {}
        for source in self.sources.values():
            self._sha256 |= {f"{source.name}/{file}": digest for file, digest in source.sha256.items()}

    @classmethod
    def load(cls, root: str | Path) -> "PreparedData":
        """Raises ValueError where the folder is not whole: a file is missing, or has another size than was written."""
        root = Path(root)
        try:
            text = (root / "manifest.json").read_bytes()
        except OSError as error:
            raise ValueError(f"{root} holds no prepared data ({error}): launch again") from None
        try:
            prepared = cls(root, json.loads(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{root / 'manifest.json'} is damaged ({error}): {anew(root)}") from None
        for source in prepared.sources.values():
            sizes = [*zip(source.shards, source.shard_tokens, strict=True), ("held_out.bin", source.held_out_tokens)]
            for file, tokens in sizes:
                path, expected = root / source.name / file, tokens * prepared.dtype.itemsize
                if not path.exists():
                    raise ValueError(f"{path} is missing: {anew(root)}")
                if (there := path.stat().st_size) != expected:
                    raise ValueError(f"{path} has {there:,} bytes, not {expected:,}: {anew(root)}")
        return prepared

    def tokenizer(self) -> Tokenizer:
        path = self.root / "tokenizer.json"
        try:
            return Tokenizer(HuggingFaceTokenizer.from_file(str(path)), self.bos_id, self.eos_id)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{path} is damaged ({error}): {anew(self.root)}") from None

    def verify(self) -> list[str]:
        """The files whose contents are not what was written (by SHA-256), by path. Reads them all."""
        return [str(self.root / f) for f, digest in self._sha256.items() if _sha256(self.root / f) != digest]

    def unigram_nats(self, proportions: dict[str, float]) -> float:
        """Loss of the best guess that looks at no context: the entropy of the mix's own unigram distribution, in nats."""
        mix = np.zeros(self.vocab_size)
        for name, proportion in proportions.items():
            counts = np.load(self.root / name / "counts.npy", allow_pickle=False)
            mix += proportion * counts / max(1, counts.sum())
        return _entropy_nats(mix)


class OtherTokens(ValueError):
    """The texts, or how they are read, have changed; the text is the fingerprint that they have now."""


def prepare(config: DataConfig, progress: Progress | None = None, expected: str | None = None) -> PreparedData:
    """Prepares the mix's tokens, or opens them where they are there already, and verifies those of up to VERIFIED_BYTES.

    Raises ValueError naming the file and line where a source can't be read, or the file of prepared tokens that is damaged;
    OtherTokens, before anything is prepared, where their fingerprint would not be the `expected` one.
    """
    files = {n: _files(n, s) for n, s in config.sources.items()}
    fingerprint = _fingerprint(config, files)
    if expected and fingerprint != expected:
        raise OtherTokens(fingerprint)
    final = Path(config.cache) / fingerprint
    if (final / "manifest.json").exists():
        return reopen(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    with _locked(final.with_suffix(".lock")):
        if (final / "manifest.json").exists():  # somebody else was faster
            return reopen(final)
        building = final.with_suffix(".building")
        # The lock is ours, so whatever stands here was left by a preparation that was killed.
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        building.mkdir()
        try:
            _build(config, files, building, progress or (lambda *_: None))
            building.rename(final)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    return PreparedData.load(final)


def reopen(root: Path) -> PreparedData:
    """What an earlier launch prepared, verified up to VERIFIED_BYTES: once here, so that no rank has to. Raises ValueError."""
    prepared = PreparedData.load(root)
    tokens = sum(s.train_tokens + s.held_out_tokens for s in prepared.sources.values())
    if tokens * prepared.dtype.itemsize <= VERIFIED_BYTES and (damaged := prepared.verify()):
        raise ValueError(f"{', '.join(damaged)}: damaged, other bytes than were prepared (by SHA-256): {anew(root)}")
    return prepared


def anew(root: Path) -> str:
    """The way out where prepared tokens are damaged."""
    return f"move {root} away and launch again, which prepares it anew from the same texts"


def _sha256(path: Path) -> str:
    if not path.exists():
        return "missing"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Files = list[tuple[Any, str, str]]


def _files(name: str, source: SourceConfig) -> Files:
    if source.format == "embedded":
        return []
    with _naming(f"data.sources.{name}.path={source.path}"):
        return find_files(name, source)


@contextlib.contextmanager
def _naming(field: str) -> Iterator[None]:
    """What a store's client raises (no credentials, no such host) is no OSError and names nothing."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"{field} does not exist: {MEND_PATH}") from None
    except (OSError, ValueError):
        raise
    except Exception as error:
        if "://" not in field:
            raise
        raise OSError(f"{field}: {error}") from error


def _documents(name: str, source: SourceConfig, files: Files) -> Iterator[str]:
    if source.format == "embedded":
        texts = embedded.documents(source.path)
    else:
        texts = (text for filesystem, path, _ in files for text in read_file(name, source, filesystem, path))
    for text in texts:
        yield _SURROGATES.sub("\ufffd", text)


def _fingerprint(config: DataConfig, files: dict[str, Files]) -> str:
    """Changes with whatever changes the tokens. Proportions do not: but with them the tokenizer's training text does."""
    about = {
        "format": FORMAT,
        "tokenizer": asdict(config.tokenizer),
        "held_out_share": config.held_out_share,
        "sources": {
            n: [s.path, s.format, s.text_field, s.proportion if config.tokenizer.path is None else None]
            for n, s in config.sources.items()
        },
        "files": {n: [(path, state) for _, path, state in found] for n, found in files.items()},
        "embedded": embedded.fingerprint() if any(s.format == "embedded" for s in config.sources.values()) else None,
    }
    if config.tokenizer.path is not None:
        with _naming(f"data.tokenizer.path={config.tokenizer.path}"):
            tokenizer = Tokenizer.load(config.tokenizer.path)
        about["tokenizer_json"] = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
        marks = (tokenizer.bos_id, tokenizer.eos_id)
        if marks != (1, 2):  # those left out, as they always were: what was prepared before stays in use
            about["marks"] = marks
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _build(config: DataConfig, files: dict[str, Files], root: Path, progress: Progress) -> None:
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer.load(config.tokenizer.path)
        if tokenizer.vocab_size > config.tokenizer.vocab_size:
            raise ValueError(
                f"data.tokenizer.path={config.tokenizer.path} has {tokenizer.vocab_size} ids, and "
                f"data.tokenizer.vocab_size={config.tokenizer.vocab_size}: set model.vocab_size={tokenizer.vocab_size} "
                f"data.tokenizer.vocab_size={tokenizer.vocab_size}"
            )
    else:
        progress("training the tokenizer", 0, 0)
        tokenizer = Tokenizer.train(_tokenizer_text(config, files), config.tokenizer.vocab_size)
        progress(f"trained a tokenizer of {tokenizer.vocab_size:,} ids", 0, 0)
    tokenizer.save(str(root / "tokenizer.json"))
    dtype = np.dtype("<u2" if config.tokenizer.vocab_size <= 1 << 16 else "<u4")
    sources = [
        _build_source(name, source, files[name], root, tokenizer, dtype, config, progress)
        for name, source in config.sources.items()
    ]
    manifest = {
        "format": FORMAT,
        "dtype": dtype.str,
        "vocab_size": config.tokenizer.vocab_size,
        "tokenizer_ids": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "tokenizer_sha256": _sha256(root / "tokenizer.json"),
        "sources": [asdict(s) for s in sources],
    }
    path = root / "manifest.json"
    with path.open("w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _tokenizer_text(config: DataConfig, files: dict[str, Files]) -> Iterator[str]:
    """The beginning of each source, as much of it as its proportion of `train_bytes`."""
    for name, source in config.sources.items():
        budget = int(config.tokenizer.train_bytes * source.proportion)
        for text in _documents(name, source, files[name]):
            if budget <= 0:
                break
            yield text[:budget]
            budget -= len(text)


def _build_source(
    name: str,
    source: SourceConfig,
    files: Files,
    root: Path,
    tokenizer: Tokenizer,
    dtype: np.dtype[Any],
    config: DataConfig,
    progress: Progress,
) -> PreparedSource:
    folder = root / name
    folder.mkdir()
    train, held_out = _Shards(folder, "train-{:04d}.bin", dtype), _Shards(folder, "held_out.bin", dtype)
    counts = np.zeros(config.tokenizer.vocab_size, dtype=np.int64)
    documents = text_bytes = empty = 0
    texts = _documents(name, source, files)
    while batch := list(islice(texts, _BATCH_DOCUMENTS)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            tokens = np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], dtype=dtype)
            documents += 1
            empty += not text.strip()
            encoded = text.encode("utf-8")
            text_bytes += len(encoded)
            if _is_held_out(encoded, config.held_out_share):
                held_out.write(tokens)
            else:
                counts += np.bincount(tokens, minlength=len(counts))
                train.write(tokens)
        progress(f"tokenizing {name}", documents, train.tokens + held_out.tokens)
    if documents == empty:
        all_empty = f", but {empty:,} that are empty" if empty else ""
        raise ValueError(
            f"data.sources.{name}.path={source.path} holds no document{all_empty}: remove the source or add text"
        )
    if empty:
        progress(f"{empty:,} of {documents:,} documents of {name} are empty", documents, train.tokens + held_out.tokens)
    train.close()
    held_out.close()
    np.save(folder / "counts.npy", counts, allow_pickle=False)
    return PreparedSource(
        name=name,
        train_tokens=train.tokens,
        held_out_tokens=held_out.tokens,
        documents=documents,
        text_bytes=text_bytes,
        unigram_nats=_entropy_nats(counts / max(1, counts.sum())),
        shards=train.names,
        shard_tokens=train.sizes,
        sha256=train.digests | held_out.digests | {"counts.npy": _sha256(folder / "counts.npy")},
    )


def _is_held_out(text: bytes, share: float) -> bool:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()) < share * 2**64


class _Shards:
    """Token files of at most SHARD_TOKENS each, hashed while they are written."""

    def __init__(self, folder: Path, pattern: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.pattern, self.dtype = folder, pattern, dtype
        self.names: list[str] = []
        self.sizes: list[int] = []
        self.digests: dict[str, str] = {}
        self._open()

    @property
    def tokens(self) -> int:
        return sum(self.sizes)

    def _open(self) -> None:
        self.names.append(self.pattern.format(len(self.names)))
        self.sizes.append(0)
        self._file = (self.folder / self.names[-1]).open("wb")
        self._hash = hashlib.sha256()

    def write(self, tokens: npt.NDArray[Any]) -> None:
        if self.sizes[-1] and self.sizes[-1] + len(tokens) > SHARD_TOKENS and "{" in self.pattern:
            self.close()
            self._open()
        data = tokens.astype(self.dtype).tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.sizes[-1] += len(tokens)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.digests[self.names[-1]] = self._hash.hexdigest()


def _entropy_nats(distribution: npt.NDArray[np.float64]) -> float:
    positive = distribution[distribution > 0]
    return float(-(positive * np.log(positive)).sum())


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One preparation at a time; the system frees the lock of a process that is killed. Leaves no file."""
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file):  # whoever held it took the file away: it keeps nobody out who comes now
                continue
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    path.unlink()
            return


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        return False
