"""Text -> token ids: CLIP's own byte-pair encoding, and one learnt from the captions at hand.

Both run on Hugging Face's `tokenizers`. A tokenizer is called with one text or several and gives int64 [N, L]; it has
`context` (the most tokens a text keeps), `len` (the vocabulary) and `to_json`.
"""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from fastclip.clip.vocabulary import Merges, byte_characters, find_vocabulary, pieces, read_merges, vocabulary_in
from fastclip.errors import UserError

PADDING, UNKNOWN = "[PAD]", "[UNK]"
START, END = "<start_of_text>", "<end_of_text>"
FILE = "tokenizer.json"
# OpenCLIP's rule: special tokens, contractions, runs of letters, single digits, runs of the rest. It ignores case,
# under which "s" is also the long s.
WORDS = r"<[sſ]tart_of_text>|<end_of_text>|'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
SPECIAL = re.compile(r"(?:<[sſ]tart_of_text>|<end_of_text>)+")


class BpeTokenizer:
    """Text -> ids [N, L] int64, 0 = padding. Ignores case; parts at spaces, punctuation and each digit."""

    def __init__(self, tokenizer, context: int) -> None:
        self.tokenizer = tokenizer
        self.context = context
        tokenizer.enable_truncation(context)
        tokenizer.enable_padding(pad_id=0, pad_token=PADDING)

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int, context: int) -> BpeTokenizer:
        """Learn at most `vocabulary` pieces: frequent words stay whole, rare ones are spelt from parts."""
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
        )
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[PADDING, UNKNOWN], show_progress=False)
        tokenizer.train_from_iterator(captions, trainer)
        return cls(tokenizer, context)

    @classmethod
    def load(cls, path: Path, context: int) -> BpeTokenizer:
        """From the JSON that to_json gave."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_str(Path(path).read_text(encoding="utf-8")), context)

    def to_json(self) -> str:
        return self.tokenizer.to_str(pretty=True)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        return ids_of(self.tokenizer, [whole(text) for text in texts], self.context)

    def truncated(self, texts: Sequence[str]) -> torch.Tensor:
        """bool [N]: the texts of which the context cuts something off."""
        return too_long(self.tokenizer, [whole(text) for text in texts])


class ClipTokenizer:
    """CLIP's encoding: text -> ids [N, context] int64: start, pieces, end, then zeros. The same ids as OpenCLIP's.

    `merges`: pairs of pieces, first one first (vocabulary.read_merges). The ids are: 256 bytes, the same at the end of
    a word, the merged pieces, start, end; the end of text is the highest id, where the text towers pool. A text that
    is too long keeps its end token. Lone surrogates (bad UTF-8) become U+FFFD. ValueError unless context >= 2.

    Source: Radford et al., arXiv 2103.00020, section 2.4. Characters that Unicode 17 or a later one added may be
    split differently from OpenCLIP, whose regular expressions know other tables.
    """

    def __init__(self, merges: Merges, context: int = 77) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

        if context < 2:
            raise ValueError(f"context must hold at least the start and end tokens, got {context}")
        vocabulary = {piece: number for number, piece in enumerate([*pieces(merges), START, END])}
        self.context = context
        self.start, self.end = vocabulary[START], vocabulary[END]
        self.tokenizer = tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (START, END)])
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A {END}", special_tokens=[(START, self.start), (END, self.end)]
        )
        tokenizer.enable_truncation(context)
        tokenizer.enable_padding(length=context, pad_id=0, pad_token=byte_characters()[0])

    @classmethod
    def load(cls, path: str | Path | None = None, context: int = 77) -> ClipTokenizer:
        """CLIP's own, from `path` or from where find_vocabulary finds it. UserError if it cannot be read."""
        return cls(read_merges(find_vocabulary(path)), context)

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int, context: int = 77) -> ClipTokenizer:
        """Learn the merges from `captions`: at most `vocabulary` ids, the 514 of bytes and special tokens included.

        ValueError if there is no room for them.
        """
        from tokenizers import trainers

        if vocabulary < 514:
            raise ValueError(f"vocabulary must be at least 514 (bytes and special tokens), got {vocabulary}")
        tokenizer = cls([], context).tokenizer
        # The trainer counts the 256 bytes, and those ends of words that occur.
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            initial_alphabet=byte_characters(),
            end_of_word_suffix="</w>",
            show_progress=False,
        )
        tokenizer.train_from_iterator((clean(caption) for caption in captions), trainer)
        learnt = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
        return cls(learnt[: vocabulary - 514], context)

    def to_json(self) -> str:
        """In the format of `tokenizers`; the cleaning of `clean` is not part of it."""
        return self.tokenizer.to_str(pretty=True)

    def __len__(self) -> int:
        return self.end + 1

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        return ids_of(self.tokenizer, [part_false_tokens(clean(text)) for text in texts], self.context)

    def truncated(self, texts: Sequence[str]) -> torch.Tensor:
        """bool [N]: the texts of which the context cuts something off."""
        return too_long(self.tokenizer, [part_false_tokens(clean(text)) for text in texts])


Tokenizer = BpeTokenizer | ClipTokenizer


def load_tokenizer(folder: str | Path, context: int | None = None) -> Tokenizer:
    """The tokenizer of a model folder: its tokenizer.json, or CLIP's vocabulary from its files.

    context: None takes the one in tokenizer.json, or 77. UserError if the folder has no tokenizer or it is damaged.
    """
    folder = Path(folder)
    try:
        path = folder / FILE
        if not path.is_file():
            return ClipTokenizer(read_merges(vocabulary_in(folder) or find_vocabulary()), context or 77)
        stored = json.loads(path.read_text(encoding="utf-8"))
        context = context or (stored.get("truncation") or {}).get("max_length") or 77
        if stored["model"].get("end_of_word_suffix") == "</w>":
            return ClipTokenizer(read_merges(path), context)
        if stored["model"]["vocab"].get(PADDING) != 0:
            raise ValueError("it is neither CLIP's nor fastclip's kind of tokenizer")
        return BpeTokenizer.load(path, context)
    except UserError:
        raise
    except Exception as error:  # `tokenizers` raises Exception itself
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error


def ids_of(tokenizer, texts: list[str], context: int) -> torch.Tensor:
    if not texts:
        return torch.zeros(0, context, dtype=torch.int64)
    return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch_fast(texts)])


def too_long(tokenizer, texts: list[str]) -> torch.Tensor:
    return torch.tensor([bool(encoding.overflowing) for encoding in tokenizer.encode_batch(texts)], dtype=torch.bool)


def whole(text: str) -> str:
    """Lone surrogates (bad UTF-8) become "?": `tokenizers` takes none."""
    return text.encode("utf-8", "replace").decode("utf-8")


def clean(text: str) -> str:
    """OpenCLIP's cleaning: mended encoding (ftfy), HTML entities unescaped twice, single spaces, lower case.

    ModuleNotFoundError naming ftfy where it is not installed.
    """
    # Printable ASCII without an entity has nothing to mend, and most captions are that.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(mend(text)))
        # OpenCLIP's rule leaves this sign out: ignoring case, it is the letter iota.
        text = text.replace("\N{COMBINING GREEK YPOGEGRAMMENI}", " ")
    return " ".join(text.split()).lower()


def mend(text: str) -> str:
    try:
        import ftfy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "CLIP's tokenizer cleans its texts with ftfy: pip install ftfy", name="ftfy"
        ) from error
    return ftfy.fix_text(text)


def part_false_tokens(text: str) -> str:
    """Puts a space into special tokens that follow a sign, where OpenCLIP's rule reads them as text.

    In "!<end_of_text>" the run of signs is "!<"; a space behind it changes no id, and keeps `tokenizers`, which looks
    for special tokens first, from finding one.
    """

    def part(run: re.Match) -> str:
        before = text[run.start() - 1 : run.start()]
        sign = before.strip() and unicodedata.category(before)[0] not in "LN"
        return run[0].replace("<", "< ") if sign else run[0]

    return SPECIAL.sub(part, text)
