"""Text to tokens in LLaMA's way: byte-pair encoding, every number split into digits, unknown characters as UTF-8 bytes.

Any text round-trips exactly. To that end nothing is normalised, no space is added or replaced, and neither the special
tokens nor the bytes are matched inside text: the words `<s>` or `<0x41>` in a document are ordinary characters.
Ids of a trained one: 0 <unk> (never produced), 1 <s>, 2 </s>, 3 ... 258 the bytes, then single characters and merges.
"""

import json
from collections.abc import Iterable, Sequence

import fsspec
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

SPECIALS = ["<unk>", "<s>", "</s>"]
# What stands before and after a document in tokenizers of others: Llama 1 and 2, Llama 3, GPT-2.
_MARKS = [("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>"), ("<|endoftext|>", "<|endoftext|>")]
BYTES = [f"<0x{b:02X}>" for b in range(256)]
# A word with the space before it, a run of other signs with the space before it, line ends, or a run of spaces.
_WORDS = Regex(r" ?[\p{L}\p{M}_]+| ?[^\s\p{L}\p{M}\p{N}_]+|\r?\n+|\s+(?=\s)|\s+|\p{N}")


class Tokenizer:
    """A trained byte-pair encoding, and the ids before and after each document. `vocab_size` is above every id."""

    def __init__(self, tokenizer: HuggingFaceTokenizer, bos_id: int = 1, eos_id: int = 2) -> None:
        self.bos_id, self.eos_id = bos_id, eos_id
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self._special = {bos_id, eos_id, tokenizer.token_to_id("<unk>"), *_special_ids(tokenizer)}

    @property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def special_tokens(self) -> dict[str, str | None]:
        """As tokenizer_config.json has them."""
        unk = {} if self._tokenizer.token_to_id("<unk>") is None else {"unk_token": "<unk>"}
        return unk | {
            "bos_token": self._tokenizer.id_to_token(self.bos_id),
            "eos_token": self._tokenizer.id_to_token(self.eos_id),
        }

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; specials are left out, bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode([i for i in ids if i not in self._special], skip_special_tokens=False)

    def to_json(self) -> str:
        """The contents of a standard tokenizer.json."""
        return self._tokenizer.to_str()

    @classmethod
    def load(cls, url: str) -> "Tokenizer":
        """The user's own, from a tokenizer.json at any fsspec URL. Raises ValueError where no token marks documents."""
        field = f"data.tokenizer.path={url}"
        try:
            with fsspec.open(url, "r", encoding="utf-8") as file:
                text = file.read()
        except FileNotFoundError:
            raise ValueError(f"{field} does not exist: name a tokenizer.json, or null to train one") from None
        except IsADirectoryError:
            raise ValueError(f"{field} is a folder: name the tokenizer.json in it") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{field} is no tokenizer.json: not UTF-8 ({error.reason} at byte {error.start})"
            ) from None
        try:
            tokenizer = HuggingFaceTokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(f"{field} is no tokenizer.json: {error}") from None
        if [tokenizer.id_to_token(i) for i in range(3)] == SPECIALS:
            return cls(tokenizer)
        special = _special_ids(tokenizer)
        for bos, eos in _MARKS:
            if (bos_id := tokenizer.token_to_id(bos)) in special and (eos_id := tokenizer.token_to_id(eos)) in special:
                return cls(tokenizer, bos_id, eos_id)
        pairs = " or ".join(f"{bos} and {eos}" if bos != eos else bos for bos, eos in _MARKS)
        raise ValueError(
            f"{field} has no tokens that mark a document's begin and end: its added_tokens need {pairs}, "
            "with special: true"
        )

    def save(self, url: str) -> None:
        with fsspec.open(url, "w", encoding="utf-8") as file:
            file.write(self.to_json())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns merges from `texts`. Raises ValueError where `vocab_size` has no room for the bytes.

        A text too small for the vocabulary gives a smaller one; `vocab_size` of the result tells.
        """
        reserved = SPECIALS + BYTES
        if vocab_size <= len(reserved):
            raise ValueError(
                f"data.tokenizer.vocab_size={vocab_size} must be above {len(reserved)}: 3 specials and 256 bytes come first"
            )
        learner = HuggingFaceTokenizer(models.BPE())
        learner.pre_tokenizer = _pre_tokenizer()
        wanted = vocab_size - len(reserved)
        learner.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=wanted, limit_alphabet=max(1, min(2000, wanted // 4)), show_progress=False, special_tokens=[]
            ),
        )
        learned = json.loads(learner.to_str())["model"]
        merges: list[tuple[str, str]] = []
        # A merge that spells a reserved name is dropped, and with it those that build on it: the text must not become it.
        known = {token for token in learned["vocab"] if len(token) == 1}
        for left, right in (tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]):
            if left + right not in reserved and left in known and right in known:
                merges.append((left, right))
                known.add(left + right)
        by_learned_id = sorted(learned["vocab"], key=lambda token: learned["vocab"][token])
        tokens = reserved + [token for token in by_learned_id if token in known]
        tokenizer = HuggingFaceTokenizer(
            models.BPE(
                vocab={token: i for i, token in enumerate(tokens)}, merges=merges, unk_token="<unk>", byte_fallback=True
            )
        )
        tokenizer.pre_tokenizer = _pre_tokenizer()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return cls(tokenizer)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, behavior="isolated"), pre_tokenizers.Digits(individual_digits=True)]
    )


def _special_ids(tokenizer: HuggingFaceTokenizer) -> set[int]:
    return {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
