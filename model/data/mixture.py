"""The batch is a function: which rows step s trains on, in O(1) time and memory, the same for every world size.

A *row* is `sequence_length` tokens of one source. The chain from a step to tokens, each link a pure function:

1. step -> data batch: the step-th one that the skip list leaves in.
2. data batch -> row numbers 0, 1, 2 ... of the whole run: `batch_sequences` in a row of numbers.
3. row number -> block of B rows and a slot in it. B is the smallest block in which every proportion is a whole number of
   rows (the paper's mix: 200 rows, 134 + 30 + 9 + 9 + 9 + 5 + 4), so that proportions hold exactly over each block.
   Slots are shuffled by a keyed permutation of their own for each block.
4. slot -> source, and the how-manieth row of that source since the run began.
5. row of a source -> epoch and place in it; each epoch is a keyed permutation of the source's rows.
6. place -> token offset. A source is a circle of tokens: epoch e starts at e x (rows x sequence_length) around it, so the
   tail that fills no row in one epoch comes first in the next.

Nothing is built or saved: resume, resize and skipping a bad range are arithmetic. Pure: numpy only.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]
_Uint64s = npt.NDArray[np.uint64]

MAX_BLOCK_ROWS = 1_000_000


@dataclass(frozen=True)
class SourceSize:
    """A source as the mixture sees it. `proportion` is its share of rows; shares sum to 1."""

    name: str
    tokens: int
    proportion: float


@dataclass(frozen=True, order=True)
class Skip:
    """Data batches from `first_batch` up to, not including, `end_batch` are not trained on."""

    first_batch: int
    end_batch: int


def data_batch_index(step: int, skips: Sequence[Skip]) -> int:
    """The data batch that 0-based `step` trains on: the step-th one that no skip covers. O(len(skips)).

    Appending a skip that begins at or after the data batch of step s changes nothing before s.
    """
    batch = step
    for skip in _merged(skips):
        if batch < skip.first_batch:
            break
        batch += skip.end_batch - skip.first_batch
    return batch


def _merged(skips: Sequence[Skip]) -> list[Skip]:
    merged: list[Skip] = []
    for skip in sorted(s for s in skips if s.end_batch > s.first_batch):
        if merged and skip.first_batch <= merged[-1].end_batch:
            merged[-1] = Skip(merged[-1].first_batch, max(merged[-1].end_batch, skip.end_batch))
        else:
            merged.append(skip)
    return merged


class Mixture:
    """Sources in fixed proportions, each walked through in whole shuffled epochs.

    Raises ValueError where proportions do not sum to 1, or a source is drawn from that has less than one row.
    """

    def __init__(self, sources: Sequence[SourceSize], sequence_length: int, seed: int) -> None:
        shares = [Fraction(str(s.proportion)) for s in sources]
        if sum(shares) != 1:
            raise ValueError(f"proportions sum to {float(sum(shares)):g}, not 1")
        self.block_rows = math.lcm(*(s.denominator for s in shares))
        if self.block_rows > MAX_BLOCK_ROWS:
            raise ValueError(
                f"proportions {[s.proportion for s in sources]} hold exactly only over blocks of {self.block_rows:,} rows "
                f"(at most {MAX_BLOCK_ROWS:,}): give them with fewer decimals"
            )
        for source, share in zip(sources, shares, strict=True):
            if share and source.tokens < sequence_length + 1:
                raise ValueError(
                    f"source {source.name} has {source.tokens} tokens, less than one row of {sequence_length} + 1: "
                    f"add text, shorten model.sequence_length, or set its proportion to 0"
                )
        self.sources = list(sources)
        self.sequence_length = sequence_length
        self.seed = seed
        self.rows_per_block = np.array([int(s * self.block_rows) for s in shares], dtype=np.int64)
        self.rows_per_epoch = np.array([s.tokens // sequence_length for s in sources], dtype=np.int64)
        self._tokens = np.array([s.tokens for s in sources], dtype=np.int64)
        self._first_slot = np.concatenate([[0], np.cumsum(self.rows_per_block)])

    def rows(self, first_row: int, count: int) -> tuple[Int64s, Int64s]:
        """Rows `first_row` ... `first_row + count - 1` of the run: (index of the source [count], token offset [count]).

        A row reads sequence_length + 1 tokens from its offset, around the end of the source's circle where need be.
        """
        numbers = np.arange(first_row, first_row + count, dtype=np.int64)
        blocks, places = np.divmod(numbers, self.block_rows)
        slots = np.empty(count, dtype=np.int64)
        for block in np.unique(blocks):
            inside = blocks == block
            slots[inside] = permute(places[inside], self.block_rows, self._key("block", int(block)))
        source = np.searchsorted(self._first_slot, slots, side="right") - 1
        row_of_source = blocks * self.rows_per_block[source] + slots - self._first_slot[source]
        epoch, place = np.divmod(row_of_source, np.maximum(self.rows_per_epoch[source], 1))
        offset = np.empty(count, dtype=np.int64)
        for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            inside = (source == s) & (epoch == e)
            rows, tokens = int(self.rows_per_epoch[s]), int(self._tokens[s])
            shuffled = permute(place[inside], rows, self._key(f"source/{self.sources[s].name}", e))
            start = e * rows * self.sequence_length % tokens  # Python's integers: no overflow at any epoch
            offset[inside] = (start + shuffled * self.sequence_length) % tokens
        return source, offset

    def batch_rows(
        self, step: int, batch_sequences: int, skips: Sequence[Skip], part: slice | None = None
    ) -> tuple[Int64s, Int64s]:
        """The rows of 0-based `step`'s global batch, or of a contiguous `part` of it (one rank's share)."""
        start, stop, _ = (part or slice(None)).indices(batch_sequences)
        return self.rows(data_batch_index(step, skips) * batch_sequences + start, stop - start)

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each source has been walked through after `rows` rows of the run."""
        blocks, rest = divmod(rows, self.block_rows)
        done = blocks * self.rows_per_block.astype(float)
        if rest:
            source, _ = self.rows(blocks * self.block_rows, rest)
            done += np.bincount(source, minlength=len(self.sources))
        return {
            s.name: float(done[i]) * self.sequence_length / s.tokens if s.tokens else 0.0
            for i, s in enumerate(self.sources)
        }

    def _key(self, purpose: str, number: int) -> bytes:
        return hashlib.blake2b(f"{self.seed}/{purpose}/{number}".encode(), digest_size=48).digest()


def permute(places: Int64s, size: int, key: bytes) -> Int64s:
    """Each of `places` (0 <= place < size) to its image under the keyed permutation of `size` things.

    A Feistel network of six rounds over the smallest even number of bits that holds `size`, walked along its cycle until
    it lands inside (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002): at most four tries on average.
    """
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    round_keys = np.frombuffer(key, dtype=np.uint64)
    images = places.astype(np.uint64)
    todo = np.arange(len(images))
    while len(todo):
        left, right = images[todo] >> shift, images[todo] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        images[todo] = left << shift | right
        todo = todo[images[todo] >= size]
    return images.astype(np.int64)


def _mix(x: _Uint64s) -> _Uint64s:
    """SplitMix64's finalizer: each input bit flips about half of the output's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
