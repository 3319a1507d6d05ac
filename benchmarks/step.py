"""The case "step": a whole training step of a small CLIP, the towers always the same and the loss swapped.

Legend: images [N, 3, 32, 32] float32, ids [N, T] int64; image, text [N, D] features of unit length.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastclip import ClipLoss, clip_loss
from fastclip.benchmarks.case import Call, Case, Found, Peer, Problem, Truth, by_name
from fastclip.benchmarks.config import Config
from fastclip.benchmarks.foreign import missing, open_clip_losses, stand_in_for_torchvision, why_not_open_clip
from fastclip.grad_cache import GradCache

SIZE, TOKENS, VOCABULARY = 32, 16, 1000
PIECE = 256  # pairs encoded at a time where gradients are cached
LOGIT_SCALE = 20.0
STEP = "one step"
QUICK, FULL = (512,), (2048, 4096)


class Towers(nn.Module):
    """Two convolutions over patches; the mean of word vectors: small, so that the loss shows."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.image = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=4, stride=4),
            nn.GELU(),
            nn.Conv2d(64, 128, kernel_size=3, stride=2, padding=1),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, d),
        )
        self.text = nn.Sequential(nn.EmbeddingBag(VOCABULARY, 128), nn.GELU(), nn.Linear(128, d))
        self.log_scale = nn.Parameter(torch.tensor(math.log(LOGIT_SCALE)))

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(images), dim=1)

    def encode_text(self, ids: Tensor) -> Tensor:
        return F.normalize(self.text(ids), dim=1)

    def forward(self, images: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """What OpenCLIP's models return with output_dict."""
        features = {"image_features": self.encode_image(images), "text_features": self.encode_text(ids)}
        return {**features, "logit_scale": self.log_scale.exp()}


class _SentenceModel(nn.Sequential):
    """The towers as sentence-transformers calls a model: a dictionary of inputs gives one of embeddings."""

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        encode = self[0].encode_image if "images" in inputs else self[0].encode_text
        return {"sentence_embedding": encode(inputs.get("images", inputs.get("input_ids")))}


def start(problem: Problem) -> tuple[Towers, Tensor, Tensor]:
    """The towers and a batch, the same for every peer; a caption's words follow its picture's colours."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.seed)
        towers = Towers(problem.d)
        colours = torch.rand(problem.n, 3, 4, 4)
        images = F.interpolate(colours, SIZE) + 0.1 * torch.randn(problem.n, 3, SIZE, SIZE)
        ids = (colours.flatten(1)[:, :TOKENS] * (VOCABULARY - 1)).long()
    return towers, images, ids


def stepper(problem: Problem, backward: Callable[[Towers, Tensor, Tensor], Tensor]) -> Call:
    """A call that makes one step as OpenCLIP's training loop does; `backward` leaves gradients, returns the loss."""
    towers, images, ids = start(problem)
    optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-4)

    def call() -> Found:
        optimizer.zero_grad()
        loss = backward(towers, images, ids)
        # Views, read before the next step; copies would be counted as the peer's memory.
        grads = {name: parameter.grad for name, parameter in towers.named_parameters() if parameter.grad is not None}
        optimizer.step()
        with torch.no_grad():
            towers.log_scale.clamp_(0, math.log(100))
        return {"loss": loss.detach(), **grads}

    return call


def whole_batch(loss: nn.Module) -> Callable[[Towers, Tensor, Tensor], Tensor]:
    """OpenCLIP's loop at accum_freq 1."""

    def backward(towers: Towers, images: Tensor, ids: Tensor) -> Tensor:
        total = sum(loss(**towers(images, ids), output_dict=True).values())
        total.backward()
        return total

    return backward


def cached(towers: Towers, images: Tensor, ids: Tensor) -> Tensor:
    """fastclip's gradient cache around the towers, and its loss."""
    features = GradCache([towers.encode_image, towers.encode_text], PIECE)(images, ids)
    loss = clip_loss(*features, towers.log_scale.exp(), normalize=False)
    loss.backward()
    return loss


def accumulated(towers: Towers, images: Tensor, ids: Tensor) -> Tensor:
    """OpenCLIP's loop with accum_freq: features of all pieces first, then a whole loss for each piece's gradient."""
    loss = open_clip_losses().ClipLoss()
    pieces = list(zip(images.split(PIECE), ids.split(PIECE), strict=True))
    with torch.no_grad():
        known = [towers(*piece) for piece in pieces]
    for j, piece in enumerate(pieces):
        fresh = towers(*piece)
        inputs = {"logit_scale": fresh["logit_scale"]}
        for key in ("image_features", "text_features"):
            inputs[key] = torch.cat([(fresh if i == j else out)[key] for i, out in enumerate(known)])
        total = sum(loss(**inputs, output_dict=True).values())
        total.backward()
    return total


def sentence_transformers(module: Callable[[], object]) -> Callable[[Problem], Call]:
    """The training step of sentence-transformers with a loss that caches gradients, both directions."""

    def prepare(problem: Problem) -> Call:
        make_loss = module().CachedMultipleNegativesRankingLoss
        both = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}

        def backward(towers: Towers, images: Tensor, ids: Tensor) -> Tensor:
            loss = make_loss(_SentenceModel(towers), scale=LOGIT_SCALE, mini_batch_size=PIECE, **both)
            value = loss([{"images": images}, {"input_ids": ids}], None)
            value.backward()
            return value

        return stepper(problem, backward)

    return prepare


def _their_losses():
    stand_in_for_torchvision()
    from sentence_transformers.sentence_transformer import losses

    return losses


def _our_losses():
    stand_in_for_torchvision()
    from fastclip.integrations import sentence_transformers

    return sentence_transformers


def _why_not_sentence_transformers() -> str | None:
    return missing("sentence_transformers", "sentence-transformers")


class StepCase(Case):
    """Time of the step, not of the loss alone: what a user gains in the end."""

    name = "step"
    title = "Training step of a small CLIP"
    reference = "openclip"
    peers = by_name(
        Peer(
            "fastclip",
            "fastclip in OpenCLIP's loop",
            lambda problem: stepper(problem, whole_batch(ClipLoss())),
        ),
        Peer(
            "openclip",
            "OpenCLIP's loop and ClipLoss",
            lambda problem: stepper(problem, whole_batch(open_clip_losses().ClipLoss())),
            matrices=4,
            why_not=why_not_open_clip,
        ),
        Peer(
            "fastclip-cached",
            "fastclip, gradients cached",
            lambda problem: stepper(problem, cached),
        ),
        Peer(
            "openclip-accum",
            "OpenCLIP's loop with accum_freq",
            lambda problem: stepper(problem, accumulated),
            matrices=4,
            why_not=why_not_open_clip,
        ),
        Peer(
            "st-fastclip",
            "fastclip in sentence-transformers' cached loss",
            sentence_transformers(_our_losses),
            why_not=_why_not_sentence_transformers,
        ),
        Peer(
            "st",
            "sentence-transformers' cached loss",
            sentence_transformers(_their_losses),
            why_not=_why_not_sentence_transformers,
        ),
    )

    def problems(self, config: Config) -> list[Problem]:
        sizes = config.sizes or (QUICK if config.quick else FULL)
        return [Problem(self.name, n, config.d, "fp32", STEP) for n in sorted(sizes)]

    def truth(self, problem: Problem) -> Truth:
        """The dense loss through the same towers in float64: loss and every parameter's gradient."""
        towers, images, ids = start(problem)
        towers.double()
        out = towers(images.double(), ids)
        S = out["logit_scale"] * out["image_features"] @ out["text_features"].T
        labels = torch.arange(len(S))
        loss = (F.cross_entropy(S, labels) + F.cross_entropy(S.T, labels)) / 2
        loss.backward()
        return Truth({"loss": loss.detach(), **{name: p.grad for name, p in towers.named_parameters()}})

    def floor(self, problem: Problem) -> tuple[float, float]:
        """FLOP of the towers, forward and backward, and of a loss without the matrix; bytes of the batch."""
        small = problem.of_size(64)
        towers, images, ids = start(small)
        with FlopCounterMode(display=False) as counter:
            out = towers(images, ids)
            (out["image_features"].sum() + out["text_features"].sum()).backward()
        flop = counter.get_total_flops() / small.n * problem.n + 8 * problem.n**2 * problem.d
        return flop, problem.n * (images[0].nbytes + ids[0].nbytes)
