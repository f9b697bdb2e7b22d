"""Rows of tokens for a step: the mixture's answer, read from the prepared shards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from model.data.config import DataConfig
from model.data.mixture import Mixture, Skip, SourceSize, data_batch_index
from model.data.prepare import PreparedData, anew


class Loader:
    """The batch of any step, whole or one rank's share. Holds memory maps and no position: nothing to save or restore."""

    def __init__(
        self,
        prepared: PreparedData,
        config: DataConfig,
        *,
        sequence_length: int,
        batch_sequences: int,
        seed: int,
        skips: Sequence[Skip],
    ) -> None:
        self.prepared = prepared
        self.proportions = {n: s.proportion for n, s in config.sources.items()}
        self.sources = list(config.sources)
        self.batch_sequences = batch_sequences
        self.skips = list(skips)
        for name, proportion in self.proportions.items():
            if proportion and not (source := prepared.sources[name]).train_tokens:
                raise ValueError(
                    f"data.sources.{name}: all of its documents ({source.documents:,}) are held out "
                    f"(data.held_out_share={config.held_out_share:g}), and none is left to train on: add documents, or lower "
                    "data.held_out_share (0 holds out none)"
                )
        sizes = [SourceSize(n, prepared.sources[n].train_tokens, s.proportion) for n, s in config.sources.items()]
        self.mixture = Mixture(sizes, sequence_length, seed)
        self._train = [_Circle(prepared, n) for n in self.sources]

    def data_batch(self, step: int) -> int:
        """The data batch that 0-based `step` trains on."""
        return data_batch_index(step, self.skips)

    def batch(self, step: int, rank: int, ranks: int) -> npt.NDArray[np.int32]:
        """Data-parallel `rank`'s contiguous share of 0-based `step`'s batch: [batch_sequences / ranks, sequence_length + 1]."""
        share = self.batch_sequences // ranks
        part = slice(rank * share, (rank + 1) * share)
        source, offset = self.mixture.batch_rows(step, self.batch_sequences, self.skips, part)
        length = self.mixture.sequence_length + 1
        rows = np.empty((share, length), dtype=np.int32)
        for i in range(share):
            rows[i] = self._train[source[i]].read(int(offset[i]), length)
        return rows

    def held_out_rows(self, source: str, rows: int) -> npt.NDArray[np.int32]:
        """The first `rows` rows of a source's held-out tokens, fewer where it has fewer: [n, sequence_length + 1]."""
        length = self.mixture.sequence_length + 1
        there = self.prepared.sources[source].held_out_tokens
        count = min(rows, (there - 1) // self.mixture.sequence_length) if there else 0
        if count < 1:
            return np.empty((0, length), dtype=np.int32)
        path = self.prepared.root / source / "held_out.bin"
        tokens = np.memmap(path, dtype=self.prepared.dtype, mode="r")
        starts = np.arange(count) * self.mixture.sequence_length
        return np.stack([_read(self.prepared, path, tokens[s : s + length]) for s in starts])

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source has been walked through after `steps` steps, skipped batches counted as walked past."""
        return self.mixture.epochs(self.data_batch(steps) * self.batch_sequences)


class _Circle:
    """A source's training tokens as a circle over its shards, memory-mapped when first read."""

    def __init__(self, prepared: PreparedData, source: str) -> None:
        entry = prepared.sources[source]
        self._prepared = prepared
        self._paths = [prepared.root / source / shard for shard in entry.shards]
        self._ends = np.cumsum(entry.shard_tokens)
        self._maps: dict[int, npt.NDArray[np.integer]] = {}

    def read(self, offset: int, length: int) -> npt.NDArray[np.int32]:
        """`length` tokens from `offset` on, around the end and over shard borders."""
        pieces, total = [], int(self._ends[-1])
        while length:
            offset %= total
            shard = int(np.searchsorted(self._ends, offset, side="right"))
            if shard not in self._maps:
                self._maps[shard] = np.memmap(self._paths[shard], dtype=self._prepared.dtype, mode="r")
            tokens = self._maps[shard]
            start = offset - (int(self._ends[shard - 1]) if shard else 0)
            piece = tokens[start : start + length]
            pieces.append(_read(self._prepared, self._paths[shard], piece))
            offset += len(piece)
            length -= len(piece)
        return np.concatenate(pieces)


def _read(prepared: PreparedData, path: Path, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """Damage that no launch has seen (what is large is not verified there) would be an index outside the embedding, or worse."""
    if (largest := int(tokens.max())) >= prepared.vocab_size:
        raise ValueError(
            f"{path} is damaged: it holds id {largest:,} of a vocabulary of {prepared.vocab_size:,}: {anew(prepared.root)}"
        )
    return tokens.astype(np.int32)
