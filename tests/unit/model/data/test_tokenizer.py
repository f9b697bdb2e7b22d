"""The tokenizer: LLaMA's way, and every text comes back as it went in."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models
from tokenizers import Tokenizer as HuggingFaceTokenizer

from model.data.tokenizer import Tokenizer

TEXT = ["the llama leads the train over the pass <s> and </s> <0x41> 1234\n" * 30, "def f(x):\n    return x + 1\n" * 30]
TOKENIZER = Tokenizer.train(TEXT, 400)


@given(text=st.text())
@example("▁ a▁")
@example("\0")
@example("<s></s><unk><0x41>")
@example("  two  spaces \r\n\r\n tab\t")
@example("日本語 🙂 e\u0301 \u2028 ١٢٣ ½")
@settings(deadline=None, max_examples=300)
def test_any_text_round_trips(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(2 < i < TOKENIZER.vocab_size for i in ids)  # no text becomes a special token


def test_batches_encode_as_single_texts_do() -> None:
    texts = [*TEXT, "", "1", "日"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(t) for t in texts]


def test_numbers_are_split_into_digits() -> None:
    ids = TOKENIZER.encode("1234")
    assert [TOKENIZER.decode([i]) for i in ids] == ["1", "2", "3", "4"]


def test_unknown_characters_become_their_bytes() -> None:
    assert TOKENIZER.encode("🙂") == [3 + b for b in "🙂".encode()]


def test_training_compresses() -> None:
    text = "the llama leads the train over the pass"
    assert len(TOKENIZER.encode(text)) < len(text) / 3


def test_a_saved_tokenizer_is_a_standard_file_and_the_same(tmp_path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(str(path))
    text = "the train <s> 12 🙂"
    assert Tokenizer.load(str(path)).encode(text) == TOKENIZER.encode(text)
    theirs = HuggingFaceTokenizer.from_file(str(path))
    assert theirs.encode(text).ids == TOKENIZER.encode(text)
    assert [theirs.id_to_token(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=200 must be above 259"):
        Tokenizer.train(TEXT, 200)


def saved(path: Path, vocab: list[str], *special: str) -> str:
    tokenizer = HuggingFaceTokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[]))
    tokenizer.add_special_tokens(list(special))
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize(
    ("special", "bos", "eos"),
    [
        (("<pad>", "<s>", "</s>"), "<s>", "</s>"),
        (("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), "<|begin_of_text|>", "<|end_of_text|>"),
        (("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>"),
    ],
)
def test_the_marks_of_a_tokenizer_of_ones_own_are_found(
    tmp_path: Path, special: tuple[str, ...], bos: str, eos: str
) -> None:
    vocab = ["a", "b", *"<|>_/"]
    tokenizer = Tokenizer.load(saved(tmp_path / "t.json", vocab, *special))
    ids = {token: len(vocab) + i for i, token in enumerate(special)}
    assert (tokenizer.bos_id, tokenizer.eos_id) == (ids[bos], ids[eos])
    assert tokenizer.special_tokens() == {"bos_token": bos, "eos_token": eos}
    assert tokenizer.vocab_size == len(vocab) + len(special)
    assert tokenizer.decode([0, *ids.values(), 1]) == "a b"  # a BPE without a decoder joins by spaces


def test_ids_with_gaps_count_to_the_largest(tmp_path: Path) -> None:
    tokenizer = HuggingFaceTokenizer(models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2, "a": 400}, merges=[]))
    tokenizer.save(str(tmp_path / "t.json"))
    assert Tokenizer.load(str(tmp_path / "t.json")).vocab_size == 401


def test_a_tokenizer_without_special_marks_is_refused(tmp_path: Path) -> None:
    plain = HuggingFaceTokenizer(models.BPE(vocab={"a": 0, "<s>": 1, "</s>": 2}, merges=[]))
    plain.add_tokens([AddedToken("<|endoftext|>", special=False)])
    plain.save(str(tmp_path / "plain.json"))
    with pytest.raises(
        ValueError, match=r"data\.tokenizer\.path=.*plain\.json has no tokens that mark .* <\|endoftext\|>"
    ):
        Tokenizer.load(str(tmp_path / "plain.json"))
    with pytest.raises(ValueError, match=r"data\.tokenizer\.path=.* is a folder: name the tokenizer\.json in it"):
        Tokenizer.load(str(tmp_path))
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(ValueError, match=r"latin\.json is no tokenizer\.json: not UTF-8"):
        Tokenizer.load(str(tmp_path / "latin.json"))


def test_ones_own_specials_are_named_for_others() -> None:
    assert TOKENIZER.special_tokens() == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
