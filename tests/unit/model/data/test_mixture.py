"""The data order: exact proportions, whole epochs, the same for every world size, arithmetic instead of state."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.mixture import Mixture, Skip, SourceSize, data_batch_index, permute

PAPER = {  # sampling share, epochs in 1.4T tokens (arXiv 2302.13971, table 1)
    "commoncrawl": (0.67, 1.10),
    "c4": (0.15, 1.06),
    "github": (0.045, 0.64),
    "wikipedia": (0.045, 2.45),
    "books": (0.045, 2.23),
    "arxiv": (0.025, 1.06),
    "stackexchange": (0.02, 1.03),
}


def paper_mixture(seed: int = 1) -> Mixture:
    return Mixture([SourceSize(n, int(1.4e12 * p / e), p) for n, (p, e) in PAPER.items()], 2048, seed)


def small_mixture(tokens: list[int], length: int, seed: int) -> Mixture:
    shares = {1: [1.0], 2: [0.75, 0.25], 3: [0.5, 0.3, 0.2]}[len(tokens)]
    return Mixture(
        [SourceSize(f"s{i}", t, p) for i, (t, p) in enumerate(zip(tokens, shares, strict=True))], length, seed
    )


@given(size=st.integers(1, 3000), key=st.binary(min_size=48, max_size=48))
@settings(deadline=None)
def test_permutation_meets_everything_once(size: int, key: bytes) -> None:
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


def test_permutation_is_spread_evenly() -> None:
    """Over many keys, each image is about equally likely (chi-square), and neighbours do not stay neighbours."""
    size, keys = 16, 4000
    images = np.array([permute(np.arange(size), size, np.random.default_rng(k).bytes(48)) for k in range(keys)])
    for place in range(size):
        counts = np.bincount(images[:, place], minlength=size)
        chi_square = ((counts - keys / size) ** 2 / (keys / size)).sum()
        assert chi_square < 50  # 15 degrees of freedom: above 50 once in 10^5
    assert np.mean(np.diff(images, axis=1) == 1) == pytest.approx(1 / size, rel=0.15)


@given(
    tokens=st.lists(st.integers(40, 400), min_size=1, max_size=3),
    length=st.integers(3, 12),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
@settings(deadline=None, max_examples=60)
def test_each_token_of_an_epoch_comes_exactly_once(tokens: list[int], length: int, seed: int, epochs: int) -> None:
    mixture = small_mixture(tokens, length, seed)
    needed = max(
        -(-epochs * int(rows) // int(share))
        for rows, share in zip(mixture.rows_per_epoch, mixture.rows_per_block, strict=True)
    )
    source, offset = mixture.rows(0, needed * mixture.block_rows)
    for s, total in enumerate(tokens):
        rows = int(mixture.rows_per_epoch[s])
        offsets = offset[source == s]
        seen: Counter[int] = Counter()
        walked = _in_order_of_epochs(mixture, s, epochs)
        for epoch in range(epochs):
            inside = walked[epoch * rows : (epoch + 1) * rows]
            read = Counter(int((o + i) % total) for o in inside for i in range(length))
            assert set(read.values()) == {1}
            assert len(read) == rows * length
            seen += read
        # Over the epochs the tail takes its turn: no token falls behind another by more than one.
        counts = [seen.get(t, 0) for t in range(total)]
        assert max(counts) - min(counts) <= 1
        assert set(offsets.tolist()) >= set(walked.tolist())


def _in_order_of_epochs(mixture: Mixture, s: int, epochs: int) -> np.ndarray:
    """Offsets of source `s` by the how-manieth row they are: whole blocks, so every row number up to it is there."""
    share, rows = int(mixture.rows_per_block[s]), int(mixture.rows_per_epoch[s])
    blocks = -(-epochs * rows // share)
    # Within a block the slots of a source come shuffled: put them back in the order of their numbers.
    found = {}
    for block in range(blocks):
        source, offset = mixture.rows(block * mixture.block_rows, mixture.block_rows)
        slots = permute(np.arange(mixture.block_rows), mixture.block_rows, mixture._key("block", block))
        for slot, of, at in zip(slots, source, offset, strict=True):
            if of == s:
                found[block * share + int(slot - mixture._first_slot[s])] = int(at)
    return np.array([found[i] for i in range(epochs * rows)])


def test_proportions_hold_exactly_over_each_block() -> None:
    mixture = paper_mixture()
    assert mixture.block_rows == 200
    for block in (0, 1, 17, 3_000_000):
        source, _ = mixture.rows(block * 200, 200)
        assert np.bincount(source).tolist() == [134, 30, 9, 9, 9, 5, 4]


@given(step=st.integers(0, 400_000), ranks=st.sampled_from([1, 2, 4, 8, 16, 64]), seed=st.integers(0, 3))
@settings(deadline=None, max_examples=40)
def test_the_batch_is_the_same_for_every_world_size(step: int, ranks: int, seed: int) -> None:
    mixture, batch = paper_mixture(seed), 64
    whole = mixture.batch_rows(step, batch, [])
    share = batch // ranks
    parts = [mixture.batch_rows(step, batch, [], slice(r * share, (r + 1) * share)) for r in range(ranks)]
    for i in range(2):
        assert np.array_equal(whole[i], np.concatenate([p[i] for p in parts]))


@given(first=st.integers(0, 10_000), count=st.integers(1, 500))
@settings(deadline=None, max_examples=40)
def test_random_access_equals_sequential(first: int, count: int) -> None:
    mixture = paper_mixture()
    source, offset = mixture.rows(first, count)
    singly = [mixture.rows(first + i, 1) for i in range(count)]
    assert source.tolist() == [int(s[0]) for s, _ in singly]
    assert offset.tolist() == [int(o[0]) for _, o in singly]


skips_strategy = st.lists(
    st.tuples(st.integers(0, 300), st.integers(0, 40)).map(lambda t: Skip(t[0], t[0] + t[1])), max_size=6
)


@given(skips=skips_strategy, step=st.integers(0, 300))
def test_a_step_trains_on_the_batch_that_is_left_in(skips: list[Skip], step: int) -> None:
    covered = {b for s in skips for b in range(s.first_batch, s.end_batch)}
    left = [b for b in range(1000) if b not in covered]
    assert data_batch_index(step, skips) == left[step]


@given(skips=skips_strategy, step=st.integers(0, 200), ahead=st.integers(0, 50), length=st.integers(1, 60))
def test_a_new_skip_changes_nothing_before_it(skips: list[Skip], step: int, ahead: int, length: int) -> None:
    start = data_batch_index(step, skips) + ahead
    longer = [*skips, Skip(start, start + length)]
    for earlier in range(step):
        assert data_batch_index(earlier, skips) == data_batch_index(earlier, longer)


def test_the_papers_epochs_come_out() -> None:
    epochs = paper_mixture().epochs(int(1.4e12 / 2048))
    for name, (_, expected) in PAPER.items():
        assert epochs[name] == pytest.approx(expected, abs=0.005)


def test_another_seed_gives_another_order() -> None:
    first, other = paper_mixture(1).rows(0, 2048), paper_mixture(2).rows(0, 2048)
    assert not np.array_equal(first[0], other[0])
    assert not np.array_equal(first[1], other[1])


def test_proportions_that_do_not_sum_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sum to 0\.9, not 1"):
        Mixture([SourceSize("a", 100, 0.5), SourceSize("b", 100, 0.4)], 8, 1)


def test_a_source_shorter_than_a_row_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="source tiny has 5 tokens"):
        Mixture([SourceSize("tiny", 5, 1.0)], 8, 1)
