"""Data whose samples tell who they are: sample i is a picture of colour (i % 256, i // 256, 90), "number i"."""

import io
import json

import torch
from PIL import Image

SIDE = 4


def picture(number: int, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 90)).save(file, format)
    return file.getvalue()


def write_table(folder, count: int, captions=lambda i: f"number {i}"):
    """A CSV of `count` pictures below `folder`."""
    (folder / "images").mkdir(parents=True)
    lines = ["path,caption"]
    for i in range(count):
        (folder / "images" / f"{i}.png").write_bytes(picture(i))
        lines.append(f"images/{i}.png,{captions(i)}")
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    return folder / "table.csv"


class Letters:
    """A tokenizer of one id per character, at most `context`."""

    def __init__(self, context: int = 24) -> None:
        self.context = context

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [[ord(c) for c in text[: self.context]] for text in texts]
        return torch.tensor([row + [0] * (self.context - len(row)) for row in rows], dtype=torch.int64)

    def truncated(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([len(text) > self.context for text in texts])


def plain(image) -> torch.Tensor:
    """The first pixel's colour, float32 [3, 1, 1] in 0 to 255."""
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32).view(3, 1, 1)


def noisy(image, generator: torch.Generator) -> torch.Tensor:
    """The colour, and noise below 1/2."""
    return plain(image) + 0.5 * torch.rand(3, 1, 1, generator=generator)


def numbers(batch) -> list[int]:
    """Which samples a batch holds, told from the pictures."""
    colours = batch.images.floor().int()
    return (colours[:, 0, 0, 0] + 256 * colours[:, 1, 0, 0]).tolist()


def texts(batch) -> list[str]:
    return ["".join(chr(c) for c in row if c) for row in batch.tokens.tolist()]


def same(a, b) -> bool:
    """Bit for bit."""
    ids = (a.pair_ids is None) == (b.pair_ids is None) and (a.pair_ids is None or torch.equal(a.pair_ids, b.pair_ids))
    return torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens) and ids


def captions_json(*captions: str) -> bytes:
    return json.dumps({"caption": list(captions)}).encode()
