"""Byte-pair encoding learnt from the captions at hand, through Hugging Face's `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

PADDING, UNKNOWN = "[PAD]", "[UNK]"


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
        texts = [texts] if isinstance(texts, str) else list(texts)
        return torch.tensor([encoding.ids for encoding in self.tokenizer.encode_batch(texts)])
