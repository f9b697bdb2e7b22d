"""Preparation: every format, every broken file, twice at once and killed in the middle."""

import gzip
import json
import multiprocessing
import os
import signal
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from model.data.config import DataConfig, SourceConfig, TokenizerConfig
from model.data.loader import Loader
from model.data.prepare import PreparedData, prepare

DOCUMENTS = [f"document {i}: the llama carries {i * 7} loads over the pass, and comes back.\n" for i in range(60)]


def config(tmp_path: Path, source: SourceConfig, **more: object) -> DataConfig:
    return DataConfig(
        name="test",
        sources={"only": source},
        tokenizer=TokenizerConfig(vocab_size=400),
        cache=str(tmp_path / "cache"),
        held_out_share=0.1,
        **more,  # type: ignore[arg-type]
    )


def write_jsonl(path: Path, documents: list[str] = DOCUMENTS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps({"text": d}) + "\n" for d in documents).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    if path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def all_text(prepared: PreparedData) -> list[str]:
    """Every document that was prepared, training and held-out, in order within each."""
    source, tokenizer = prepared.sources["only"], prepared.tokenizer()
    found = []
    for file in [*source.shards, "held_out.bin"]:
        tokens = np.fromfile(prepared.root / "only" / file, dtype=prepared.dtype)
        starts = np.flatnonzero(tokens == tokenizer.bos_id)
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            assert tokens[end - 1] == tokenizer.eos_id
            found.append(tokenizer.decode(tokens[start + 1 : end - 1].tolist()))
    return found


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_plain_and_compressed(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name)
    assert sorted(all_text(prepare(config(tmp_path, SourceConfig(path=str(path), proportion=1))))) == sorted(DOCUMENTS)


def test_a_folder_of_text_files(tmp_path: Path) -> None:
    for i, document in enumerate(DOCUMENTS):
        path = tmp_path / "texts" / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document)
    prepared = prepare(config(tmp_path, SourceConfig(path=str(tmp_path / "texts"), proportion=1)))
    assert sorted(all_text(prepared)) == sorted(DOCUMENTS)


def test_parquet_with_a_column_of_another_name(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"content": DOCUMENTS}), tmp_path / "a.parquet")
    source = SourceConfig(path=str(tmp_path / "*.parquet"), proportion=1, text_field="content")
    assert sorted(all_text(prepare(config(tmp_path, source)))) == sorted(DOCUMENTS)


def test_another_filesystem_than_the_local_one(tmp_path: Path) -> None:
    with fsspec.open("memory://corpus/a.jsonl", "wb") as file:
        file.write("".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS).encode())
    prepared = prepare(config(tmp_path, SourceConfig(path="memory://corpus/a.jsonl", proportion=1)))
    assert sorted(all_text(prepared)) == sorted(DOCUMENTS)


def broken(tmp_path: Path, name: str, data: bytes) -> SourceConfig:
    (tmp_path / name).write_bytes(data)
    return SourceConfig(path=str(tmp_path / name), proportion=1)


GOOD = b'{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "torn\n', r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", GOOD * 2 + b'{"body": "x"}\n', r"a\.jsonl:3: no field 'text' \(it has body\): set text_field"),
        ("a.jsonl", GOOD + b'{"text": 7}\n', r"a\.jsonl:2: field 'text' is int, not text"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8"),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt:2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(GOOD * 500, mtime=0)[:-20], r"a\.jsonl\.gz: broken compression"),
        ("a.jsonl.zst", b"not zstandard at all", r"a\.jsonl\.zst: broken compression"),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a whole Parquet file"),
        ("a.jsonl", b"", r"data\.sources\.only\.path=.*a\.jsonl holds no document"),
        ("a.unknown", b"x", r"set data\.sources\.only\.format to jsonl, text or parquet"),
    ],
)
def test_what_is_broken_is_named_with_file_and_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path, broken(tmp_path, name, data)))
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert not list((tmp_path / "cache").glob("*.building"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.only\.path=.*nowhere\.jsonl does not exist"):
        prepare(config(tmp_path, SourceConfig(path=str(tmp_path / "nowhere.jsonl"), proportion=1)))


def test_copies_of_a_text_never_stand_on_both_sides(tmp_path: Path) -> None:
    prepared = prepare(
        config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl", DOCUMENTS * 3)), proportion=1))
    )
    texts = all_text(prepared)
    source = prepared.sources["only"]
    held = np.fromfile(prepared.root / "only" / "held_out.bin", dtype=prepared.dtype)
    held_out = texts[len(texts) - int((held == 1).sum()) :]
    assert source.held_out_tokens > 0
    assert not set(held_out) & set(texts[: len(texts) - len(held_out)])


def test_changed_data_is_prepared_anew_and_the_same_data_is_not(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl")
    about = config(tmp_path, SourceConfig(path=str(path), proportion=1))
    first = prepare(about)
    assert prepare(about).root == first.root
    write_jsonl(path, [*DOCUMENTS, "one more"])
    assert prepare(about).root != first.root


def test_damage_is_seen(tmp_path: Path) -> None:
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    prepared = prepare(about)
    shard = prepared.root / "only" / "train-0000.bin"
    data = bytearray(shard.read_bytes())
    assert prepared.verify() == []
    data[100] ^= 1
    shard.write_bytes(data)
    assert prepared.verify() == [str(shard)]
    shard.write_bytes(data[:-2])
    with pytest.raises(ValueError, match=r"train-0000\.bin has \d+ bytes, not \d+"):
        PreparedData.load(prepared.root)


def _prepare_and_tell(about: DataConfig, queue: "multiprocessing.Queue[str]") -> None:
    queue.put(str(prepare(about).root))


def _prepare_and_die(about: DataConfig) -> None:
    prepare(about, lambda what, documents, tokens: os.kill(os.getpid(), signal.SIGKILL) if documents else None)


def test_two_at_once_and_one_killed_give_one_whole_result(tmp_path: Path) -> None:
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    context = multiprocessing.get_context("spawn")
    doomed = context.Process(target=_prepare_and_die, args=(about,))
    doomed.start()
    doomed.join()
    assert doomed.exitcode == -signal.SIGKILL
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    queue: multiprocessing.Queue[str] = context.Queue()
    both = [context.Process(target=_prepare_and_tell, args=(about, queue)) for _ in range(2)]
    for process in both:
        process.start()
    roots = {queue.get(timeout=120) for _ in both}
    for process in both:
        process.join()
    assert len(roots) == 1
    assert PreparedData.load(roots.pop()).verify() == []
    assert not list((tmp_path / "cache").glob("*.building"))


def test_rows_are_the_documents_text(tmp_path: Path) -> None:
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    prepared = prepare(about)
    loader = Loader(prepared, about, sequence_length=16, batch_sequences=8, seed=1, skips=[])
    stream = np.fromfile(prepared.root / "only" / "train-0000.bin", dtype=prepared.dtype).astype(np.int32)
    circle = np.concatenate([stream, stream])
    whole = loader.batch(5, 0, 1)
    assert whole.shape == (8, 17)
    for row, offset in zip(whole, loader.mixture.batch_rows(5, 8, [])[1], strict=True):
        assert np.array_equal(row, circle[offset : offset + 17])
    assert np.array_equal(whole, np.concatenate([loader.batch(5, r, 4) for r in range(4)]))


def test_unigram_level_is_the_entropy_of_the_training_tokens(tmp_path: Path) -> None:
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    prepared = prepare(about)
    tokens = np.fromfile(prepared.root / "only" / "train-0000.bin", dtype=prepared.dtype)
    shares = np.bincount(tokens) / len(tokens)
    expected = -sum(p * np.log(p) for p in shares if p)
    assert prepared.unigram_nats({"only": 1.0}) == pytest.approx(expected)
    assert prepared.sources["only"].unigram_nats == pytest.approx(expected)


def test_a_file_that_is_no_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    about.tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer.json"), vocab_size=400)
    with pytest.raises(ValueError, match=r"data.tokenizer.path=.* is no tokenizer.json: "):
        prepare(about)


def test_a_tokenizer_with_more_ids_is_refused_with_a_way_out_that_works(tmp_path: Path) -> None:
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    ids = prepare(about).tokenizer().vocab_size
    about.tokenizer = TokenizerConfig(path=str(prepare(about).root / "tokenizer.json"), vocab_size=ids - 1)
    with pytest.raises(ValueError, match=f"set model.vocab_size={ids} data.tokenizer.vocab_size={ids}$"):
        prepare(about)
    about.tokenizer.vocab_size = ids
    assert prepare(about).vocab_size == ids
    about.tokenizer.path = str(tmp_path / "nope.json")
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path=.*nope\.json does not exist"):
        prepare(about)


def test_a_store_without_credentials_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nowhere"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(OSError, match=r"data\.sources\.only\.path=s3://bucket/\*\.jsonl: Unable to locate credentials"):
        prepare(config(tmp_path, SourceConfig(path="s3://bucket/*.jsonl", proportion=1)))
