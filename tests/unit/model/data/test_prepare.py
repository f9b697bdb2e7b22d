"""Preparation: every format, every broken file, twice at once and killed in the middle."""

import fcntl
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import string
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from model.data import prepare as preparing
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
LETTERS = "".join(random.Random(1).choices(string.ascii_letters, k=131_058))
# Eight lines of 128 KiB each, a block of zstandard's: cut at a line's end, what is left is JSON without a fault.
BLOCKS = b"".join(json.dumps({"text": LETTERS[i:] + LETTERS[:i]}).encode() + b"\n" for i in range(8))


def parquet(cut: slice) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": [LETTERS[i : i + 3000] for i in range(500)]}), sink)
    data = bytearray(sink.getvalue().to_pybytes())
    data[cut] = b"\xff" * len(data[cut])
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "torn\n', r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", GOOD * 2 + b'{"body": "x"}\n', r"a\.jsonl:3: no field 'text' \(it has body\): set text_field"),
        ("a.jsonl", GOOD + b'{"text": 7}\n', r"a\.jsonl:2: field 'text' is int, not text"),
        (
            "a.jsonl",
            GOOD + b'{"text": "\xff"}\n',
            r"a\.jsonl:2: not UTF-8 .*: write the file as UTF-8, or remove the line",
        ),
        ("a.txt", b"one\ntwo \xff\n", r"a\.txt:2: not UTF-8 .*: write the file as UTF-8"),
        ("a.jsonl.gz", gzip.compress(GOOD * 500, mtime=0)[:-20], r"a\.jsonl\.gz: broken compression"),
        ("a.jsonl.zst", b"not zstandard at all", r"a\.jsonl\.zst: broken compression"),
        (
            "a.jsonl.zst",
            zstandard.compress(BLOCKS)[: len(zstandard.compress(BLOCKS)) // 2],
            r"zst: broken compression \(T",
        ),
        ("a.txt.zst", zstandard.compress(BLOCKS)[:-1], r"a\.txt\.zst: broken compression \(Truncated"),
        (
            "a.jsonl.zst",
            zstandard.compress(GOOD) * 9 + zstandard.compress(GOOD)[:3],
            r"zst: broken compression \(Truncated",
        ),
        ("a.jsonl", GOOD + b"[" * 100_000, r"a\.jsonl:2: broken JSON \(nested too deeply\): mend or remove it"),
        (
            "a.jsonl",
            GOOD + b'{"n": ' + b"1" * 5000 + b"}",
            r"a\.jsonl:2: broken JSON \(a number of more than 4,300 digits\)",
        ),
        ("a.jsonl", (GOOD.decode() * 9).encode("utf-16"), r"a\.jsonl:1: looks like UTF-16 and must be UTF-8: iconv"),
        ("a.jsonl", (GOOD.decode() * 9).encode("utf-16-be"), r"a\.jsonl:1: looks like UTF-16 and must be UTF-8"),
        ("a.txt", "one\n".encode("utf-16-le"), r"a\.txt:1: looks like UTF-16 and must be UTF-8"),
        (
            "a.jsonl",
            b'{"text": " "}\n' * 200,
            r"a\.jsonl holds no document, but 200 that are empty: remove .* or add text",
        ),
        ("a.parquet", parquet(slice(500, 4000)), r"a\.parquet: damaged Parquet \("),
        ("a.parquet", b"PAR1 no", r"a\.parquet: not a whole Parquet file"),
        ("a.jsonl", b"", r"data\.sources\.only\.path=.*a\.jsonl holds no document"),
        ("a.unknown", b"x", r"set data\.sources\.only\.format to jsonl, text or parquet"),
    ],
)
def test_what_is_broken_is_named_with_file_and_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(config(tmp_path, broken(tmp_path, name, data)))
    assert not list((tmp_path / "cache").glob("*/manifest.json"))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.jsonl", r"nowhere\.jsonl does not exist: mend the path"),
        ("*.jsonl", r"\*\.jsonl matches no file: mend the path"),
        ("empty", r"empty is an empty folder: put files there, or mend the path"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, path: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"data\.sources\.only\.path=.*" + message):
        prepare(config(tmp_path, SourceConfig(path=str(tmp_path / path), proportion=1)))


def test_a_zst_of_many_frames_is_read_to_its_end(tmp_path: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0mark"  # pzstd and seekable files have such frames
    lines = [json.dumps({"text": d}).encode() + b"\n" for d in DOCUMENTS]
    (tmp_path / "a.jsonl.zst").write_bytes(b"".join(zstandard.compress(line) + skippable for line in lines))
    prepared = prepare(config(tmp_path, SourceConfig(path=str(tmp_path / "a.jsonl.zst"), proportion=1)))
    assert sorted(all_text(prepared)) == sorted(DOCUMENTS)


def test_what_is_there_under_a_globs_name_is_taken(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "br[1]" / "a[1].jsonl")
    for taken in (path, path.parent):
        prepared = prepare(config(tmp_path, SourceConfig(path=str(taken), proportion=1)))
        assert prepared.sources["only"].documents == len(DOCUMENTS)


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "bad \ud800 surrogate", "whole \U0001f642"])
    assert rb"bad \ud800 surrogate" in path.read_bytes()
    prepared = prepare(config(tmp_path, SourceConfig(path=str(path), proportion=1)))
    assert sorted(all_text(prepared)) == sorted([*DOCUMENTS, "bad \ufffd surrogate", "whole \U0001f642"])


def test_empty_documents_are_counted_aloud(tmp_path: Path) -> None:
    path, said = write_jsonl(tmp_path / "a.jsonl", [*DOCUMENTS, "", " \n"]), set[str]()
    prepare(config(tmp_path, SourceConfig(path=str(path), proportion=1)), lambda what, *_: said.add(what))
    assert "2 of 62 documents of only are empty" in said


@pytest.mark.parametrize("name", ["../../evil", "a/b", "/a", ".hidden", "", "a\nb", "manifest.json", "tokenizer.json"])
def test_a_source_whose_name_is_no_folders_is_refused(name: str) -> None:
    source = SourceConfig(path="x.jsonl", proportion=1)
    (problem,) = DataConfig(name="test", sources={name: source}).problems()
    assert problem.startswith(f"data.sources.{name}: a source's name becomes a folder's")
    assert DataConfig(name="test", sources={"web-2.1_é": source}).problems() == []


def test_what_can_be_no_cache_path_or_size_is_refused() -> None:
    about = DataConfig(name="test", sources={"only": SourceConfig(path="", proportion=1)}, cache="s3://b/x")
    about.tokenizer = TokenizerConfig(path="", train_bytes=0)
    assert [problem.split(":")[0] for problem in about.problems()] == [
        "data.sources.only.path is empty",
        "data.tokenizer.path is empty",
        "data.tokenizer.train_bytes=0 must be at least 1",
        "data.cache=s3",
    ]


def test_a_source_that_is_held_out_whole_is_told_so(tmp_path: Path) -> None:
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    about.held_out_share = 1 - 1e-12
    message = (
        r"data\.sources\.only: all of its documents \(60\) are held out \(data\.held_out_share=1\), and none is left"
    )
    with pytest.raises(ValueError, match=message):
        Loader(prepare(about), about, sequence_length=16, batch_sequences=8, seed=1, skips=[])


def test_nobody_else_has_the_lock_that_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, waited = tmp_path / "a.lock", fcntl.flock, list[int]()

    def flock(file: int, operation: int) -> None:
        real(file, operation)
        waited.append(operation)
        if len(waited) == 1:  # whoever had it took it away
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with preparing._locked(path):
        assert len(waited) == 2
        with path.open("w") as another, pytest.raises(BlockingIOError):
            real(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not path.exists()


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
    root = prepare(about).root
    for file in ("only/train-0000.bin", "only/held_out.bin", "only/counts.npy", "tokenizer.json"):
        whole = (root / file).read_bytes()
        data = bytearray(whole)
        data[100] ^= 1
        (root / file).write_bytes(data)
        assert PreparedData.load(root).verify() == [str(root / file)]
        with pytest.raises(
            ValueError, match=rf"{file}: damaged, .*: move {root} away and launch again, which prepares it anew"
        ):
            prepare(about)
        (root / file).write_bytes(whole)
    assert prepare(about).verify() == []
    shard = root / "only" / "train-0000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(
        ValueError, match=rf"train-0000\.bin has [\d,]+ bytes, not [\d,]+: move {root} away and launch again"
    ):
        prepare(about)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"train-0000\.bin is missing: move {root} away and launch again"):
        prepare(about)
    for manifest in (b"{", b"[]", b"\xff", b"{}"):
        (root / "manifest.json").write_bytes(manifest)
        with pytest.raises(ValueError, match=rf"manifest\.json is damaged \(.*\): move {root} away and launch again"):
            prepare(about)
    shutil.rmtree(root)
    assert prepare(about).verify() == []


def test_damage_of_what_is_too_large_to_verify_is_seen_when_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "VERIFIED_BYTES", 100)
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    root = prepare(about).root
    for file in ("train-0000.bin", "held_out.bin"):
        path = root / "only" / file
        path.write_bytes(b"\xff" * path.stat().st_size)
    loader = Loader(prepare(about), about, sequence_length=16, batch_sequences=8, seed=1, skips=[])
    message = rf"{{}} is damaged: it holds id 65,535 of a vocabulary of 400: move {root} away"
    with pytest.raises(ValueError, match=message.format("train-0000.bin")):
        loader.batch(0, 0, 1)
    with pytest.raises(ValueError, match=message.format("held_out.bin")):
        loader.held_out_rows("only", 1)


def test_what_was_prepared_before_marks_were_recorded_is_read(tmp_path: Path) -> None:
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl")), proportion=1))
    path = prepare(about).root / "manifest.json"
    manifest = json.loads(path.read_text())
    for key in ("bos_id", "eos_id", "tokenizer_sha256"):
        del manifest[key]
    del manifest["sources"][0]["sha256"]["counts.npy"]
    path.write_text(json.dumps(manifest))
    assert sorted(all_text(prepare(about))) == sorted(DOCUMENTS)


def test_documents_stand_between_the_marks_of_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    theirs = HuggingFaceTokenizer(models.BPE())  # GPT-2's form: " has id 1 and # id 2
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    theirs.train_from_iterator(
        DOCUMENTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[])
    )
    theirs.save(str(tmp_path / "plain.json"))
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.save(str(tmp_path / "gpt2.json"))
    documents = [f'{d}"<|endoftext|>#' for d in DOCUMENTS]
    about = config(tmp_path, SourceConfig(path=str(write_jsonl(tmp_path / "a.jsonl", documents)), proportion=1))
    about.tokenizer = TokenizerConfig(path=str(tmp_path / "gpt2.json"), vocab_size=400)
    prepared = prepare(about)
    end = theirs.token_to_id("<|endoftext|>")
    tokens = np.fromfile(prepared.root / "only" / "train-0000.bin", dtype=prepared.dtype)
    tokens = np.append(tokens, np.fromfile(prepared.root / "only" / "held_out.bin", dtype=prepared.dtype))
    texts = [prepared.tokenizer().decode(t[1:].tolist()) for t in np.split(tokens, np.flatnonzero(tokens == end))]
    assert sorted(filter(None, texts)) == sorted(documents)
    assert (prepared.tokenizer().bos_id, prepared.tokenizer().eos_id) == (end, end)
    about.tokenizer.path = str(tmp_path / "plain.json")
    with pytest.raises(
        ValueError, match=r"plain\.json has no tokens that mark a document's begin and end: its added_tokens"
    ):
        prepare(about)


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
