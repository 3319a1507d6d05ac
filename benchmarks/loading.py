"""The case "loading": a tar shard of JPEGs and captions -> batches of preprocessed pictures and token ids, one process.

The other pipeline is the one that OpenCLIP builds of webdataset and torchvision, without its shuffling.
"""

import io
import shutil
import tarfile
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastclip.benchmarks.case import Call, Case, Found, Peer, Problem, Truth, by_name
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.foreign import missing, stand_in_for_torchvision

WIDE, HIGH, SIZE, TOKENS, BATCH = 320, 256, 224, 16, 64
EPOCH = "one epoch"
QUICK, FULL = (64,), (512,)


def tokenize(captions: list[str]) -> Tensor:
    """int64 [N, TOKENS]: the letters; a tokenizer that costs nothing, the same for both."""
    rows = [[ord(letter) for letter in caption[:TOKENS].ljust(TOKENS)] for caption in captions]
    return torch.tensor(rows, dtype=torch.int64)


def samples(n: int, seed: int) -> list[tuple[bytes, str]]:
    """(JPEG, caption): smooth random colours with some noise, which compress about as photographs do."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    made = []
    for i in range(n):
        coarse = Image.fromarray(draw.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDE, HIGH), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(smooth + draw.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "JPEG", quality=90)
        made.append((file.getvalue(), f"picture number {i}"))
    return made


def write_shard(path: Path, problem: Problem) -> None:
    """WebDataset's layout: 000000.jpg, 000000.txt, ..."""
    with tarfile.open(path, "w") as shard:
        for i, (jpeg, caption) in enumerate(samples(problem.n, problem.seed)):
            for kind, content in (("jpg", jpeg), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{i:06d}.{kind}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def summary(batches) -> Found:
    """What is compared: each picture's mean of each channel [N, 3], and its token ids."""
    pixels, tokens = zip(*((images.mean((2, 3)), ids) for images, ids in batches), strict=True)
    return {"pixels": torch.cat(pixels), "tokens": torch.cat(tokens)}


def _prepared(pipeline):
    """Peer.prepare: a shard in a folder of its own, which goes when the call does."""

    def prepare(problem: Problem) -> Call:
        folder = tempfile.mkdtemp(prefix="fastclip-bench-")
        shard = Path(folder) / "shard.tar"
        write_shard(shard, problem)
        read = pipeline(str(shard))

        def call() -> Found:
            return summary(read())

        weakref.finalize(call, shutil.rmtree, folder)
        return call

    return prepare


def _fastclip(shard: str):
    from fastclip.data.config import DataConfig
    from fastclip.data.loader import make_loader
    from fastclip.data.transform import Preprocess

    config = DataConfig(shard, kind="shards", captions=("caption",), shuffle=False, last="keep")

    def read():
        loader = make_loader(config, tokenize, Preprocess(SIZE), BATCH)
        return ((batch.images, batch.tokens) for batch in loader)

    return read


def _open_clip(shard: str):
    stand_in_for_torchvision()
    import webdataset as wds
    from torchvision import transforms

    from fastclip.data.transform import OPENAI_MEAN, OPENAI_STD

    preprocess = transforms.Compose(
        [
            transforms.Resize(SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(SIZE),
            lambda image: image.convert("RGB"),
            transforms.ToTensor(),
            transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
        ]
    )

    def read():
        return wds.DataPipeline(
            wds.SimpleShardList(shard),
            wds.tarfile_to_samples(),
            wds.decode("pilrgb"),
            wds.rename(image="jpg;png;jpeg;webp", text="txt"),
            wds.map_dict(image=preprocess, text=lambda text: tokenize([text])[0]),
            wds.to_tuple("image", "text"),
            wds.batched(BATCH),
        )

    return read


class LoadingCase(Case):
    """Decoding and resizing are most of it; what a pipeline adds is the difference."""

    name = "loading"
    title = "Data loading"
    reference = "open_clip"
    peers = by_name(
        Peer("fastclip", "fastclip", _prepared(_fastclip), why_not=lambda: missing("PIL", "pillow")),
        Peer(
            "open_clip",
            "OpenCLIP's webdataset pipeline",
            _prepared(_open_clip),
            why_not=lambda: missing("webdataset", "webdataset") or missing("torchvision", "torchvision"),
        ),
    )

    def problems(self, config: Config) -> list[Problem]:
        sizes = config.sizes or (QUICK if config.quick else FULL)
        return [Problem(self.name, n, SIZE, "fp32", EPOCH) for n in sorted(sizes)]

    def truth(self, problem: Problem) -> Truth:
        """Pillow's decoding and resizing, the rest in float64."""
        from PIL import Image

        from fastclip.data.transform import OPENAI_MEAN, OPENAI_STD

        pixels, tokens = [], []
        for jpeg, caption in samples(problem.n, problem.seed):
            image = Image.open(io.BytesIO(jpeg)).convert("RGB")
            image = image.resize((WIDE * SIZE // HIGH, SIZE), Image.Resampling.BICUBIC)
            left = round((image.width - SIZE) / 2)
            cut = np.asarray(image.crop((left, 0, left + SIZE, SIZE)), dtype=np.float64) / 255
            pixels.append(((cut - OPENAI_MEAN) / OPENAI_STD).mean((0, 1)))
            tokens.append(tokenize([caption])[0].double())
        return Truth({"pixels": torch.tensor(np.stack(pixels)), "tokens": torch.stack(tokens)})

    def floor(self, problem: Problem) -> tuple[float, float]:
        """Unknown: Pillow's decoder is both pipelines' floor."""
        return 0.0, 0.0
