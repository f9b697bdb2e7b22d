"""The tokenizer: LLaMA's way, and every text comes back as it went in."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
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
