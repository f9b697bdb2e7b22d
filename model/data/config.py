"""The data mix as Hydra reads it: named sources with proportions, a tokenizer, a cache. Pure: no torch."""

import re
from dataclasses import dataclass, field
from fractions import Fraction

FORMATS = ("auto", "jsonl", "text", "parquet", "embedded")


@dataclass(kw_only=True)
class SourceConfig:
    """One source of documents.

    `path` is a file, a folder or a glob at any fsspec URL; for format `embedded` it names one of the corpora that any
    machine with Python has.
    """

    path: str
    proportion: float  # share of the rows that are drawn from here; all proportions sum to 1
    format: str = "auto"  # auto (by ending) | jsonl | text | parquet | embedded
    text_field: str = "text"
    tokens: int | None = None  # its size, where the text is not at hand; else it is measured
    stands_in_for: str | None = None  # which of the paper's sources an embedded corpus plays


@dataclass(kw_only=True)
class TokenizerConfig:
    """A tokenizer in LLaMA's way: byte-pair encoding, digits split one by one, byte fallback."""

    path: str | None = None  # a tokenizer.json at any fsspec URL; null trains one on the mix
    vocab_size: int = 32_000
    train_bytes: int = 20_000_000  # text drawn from the mix to train it


@dataclass(kw_only=True)
class DataConfig:
    """The mix, and where its tokens are kept."""

    name: str
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    root: str = "data"  # where the paths of sources begin, for mixes that use it
    cache: str = "runs/.data"  # tokens are prepared once and shared by all runs with the same sources and tokenizer
    held_out_share: float = 0.005  # of the documents, chosen by content, kept from training for evaluation

    def problems(self) -> list[str]:
        found = []
        if not self.sources:
            found.append("data.sources is empty: name at least one source")
        for name, source in self.sources.items():
            if (
                not re.fullmatch(r"[^./\\][^/\\]*", name)
                or not name.isprintable()
                or name in ("manifest.json", "tokenizer.json")
            ):
                found.append(
                    f"data.sources.{name}: a source's name becomes a folder's: without / and \\, no dot at its beginning, not "
                    "manifest.json or tokenizer.json"
                )
            if not source.path:
                found.append(f"data.sources.{name}.path is empty: name a file, a folder or a glob")
            if source.format not in FORMATS:
                found.append(f"data.sources.{name}.format={source.format} is none of {', '.join(FORMATS)}")
            if source.proportion < 0:
                found.append(f"data.sources.{name}.proportion={source.proportion} must be 0 or more")
        total = sum((Fraction(str(s.proportion)) for s in self.sources.values()), Fraction(0))
        if self.sources and total != 1:
            terms = " + ".join(f"{n} {s.proportion:g}" for n, s in self.sources.items())
            found.append(
                f"data.sources proportions sum to {float(total):g}, not 1 ({terms}): "
                f"change one by {float(1 - total):+g}"
            )
        if self.tokenizer.path == "":
            found.append("data.tokenizer.path is empty: name a tokenizer.json, or null to train one")
        if self.tokenizer.train_bytes < 1:
            found.append(f"data.tokenizer.train_bytes={self.tokenizer.train_bytes} must be at least 1")
        if not self.cache or "://" in self.cache:
            found.append(
                f"data.cache={self.cache} must be a folder of a file system: tokens are memory-mapped from there"
            )
        if not 0 <= self.held_out_share < 1:
            found.append(f"data.held_out_share={self.held_out_share} must be at least 0 and below 1")
        return found
