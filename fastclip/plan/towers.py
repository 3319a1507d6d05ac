"""What one sample costs in each tower, counted from its config: FLOPs of the forward pass, bytes kept for backward.

FLOPs are those of matrix products, convolutions and attention, two per multiplication, as torch.utils.flop_counter
counts them; the rest of a tower is small beside them. Kept is what autograd saves between forward and backward in eager
PyTorch with fused attention: inputs of linear layers, norms and activations, the attention's query, key, value and
output. torch.compile may keep less.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastclip.clip.config import (
    AnyTextConfig,
    CausalTextConfig,
    CbowConfig,
    ConvConfig,
    ImageConfig,
    ResNetConfig,
    TextConfig,
    VitConfig,
)

STATISTICS = 8  # mean and inverse deviation of a normalised row, float32
INDEX = 8  # int64


@dataclass(frozen=True)
class Part:
    """A piece of a tower, for one sample. input: bytes that stay where it is recomputed in backward; None if never."""

    flops: float
    kept: float
    input: float | None = None


@dataclass(frozen=True)
class TowerCost:
    """Of one sample: FLOPs of the forward pass, bytes kept for backward (as they are freed, gradients come), and bytes
    of the largest part that backward recomputes, while it does."""

    flops: float
    kept: float
    recomputed: float = 0.0


def tower_cost(config: ImageConfig | AnyTextConfig, embed_dim: int, number: int, recompute: bool) -> TowerCost:
    """number: bytes of the towers' activations, 4 for fp32, 2 for autocast to a 16-bit type on a GPU.

    recompute: gradient checkpointing, which keeps the inputs of the parts that can be recomputed.
    """
    parts = TOWERS[type(config)](config, embed_dim, number)
    flops = sum(part.flops for part in parts)
    if not recompute:
        return TowerCost(flops, sum(part.kept for part in parts))
    kept = sum(part.kept if part.input is None else part.input for part in parts)
    return TowerCost(flops, kept, max((part.kept for part in parts if part.input is not None), default=0.0))


def _block(tokens: int, width: int, hidden: int, heads: int, number: int, stream: int = 4) -> Part:
    """A transformer's block (transformer.py): norm, attention, norm, MLP. stream: bytes of the residual stream."""
    flops = 2 * tokens * width * (3 * width + width + 2 * hidden) + 4 * tokens**2 * width
    # Two norms, whose input is float32 under autocast too; the inputs of four linear layers (two of them the norms'
    # outputs, one the attention's); query, key and value; the activation's input; the attention's log-sum-exps.
    kept = 2 * (4 * width + STATISTICS) + number * (2 * width + 3 * width + width + 2 * hidden) + 4 * heads
    return Part(flops, tokens * kept, tokens * width * stream)


def _pooling_block(tokens: int, width: int, hidden: int, heads: int, number: int, stream: int = 4) -> Part:
    """The last one: one token is read, so that one goes through the attention's query, output and the MLP."""
    one = _block(1, width, hidden, heads, number)
    flops = 2 * tokens * width * 3 * width + 4 * tokens * width + 2 * width * (width + 2 * hidden)
    kept = tokens * (4 * width + STATISTICS + number * (width + 3 * width))
    return Part(flops, kept + one.kept - 3 * number * width, tokens * width * stream)


def _vit(config: VitConfig, embed_dim: int, number: int) -> list[Part]:
    width, heads, hidden = config.width, config.width // config.head_width, round(config.mlp_ratio * config.width)
    patches = (config.image_size // config.patch_size) ** 2
    pixels = config.channels * config.image_size**2
    rounded = pixels * number if number < 4 else 0  # the float32 images belong to the batch
    first = Part(2 * pixels * width, rounded + (patches + 1) * (4 * width + STATISTICS))
    tokens = max(1, int(patches * (1 - config.patch_dropout))) + 1 if config.patch_dropout else patches + 1
    shape = (tokens, width, hidden, heads, number, number)
    blocks = [_block(*shape)] * (config.layers - 1)
    return [first, *blocks, _pooling_block(*shape), _head(width, embed_dim, number)]


def _causal(config: CausalTextConfig, embed_dim: int, number: int) -> list[Part]:
    """Captions that fill the context. Embeddings are float32 under autocast, and with them the residual stream."""
    width, heads, hidden = config.width, config.width // config.head_width, round(config.mlp_ratio * config.width)
    shape = (config.context, width, hidden, heads, number)
    blocks = [_block(*shape)] * (config.layers - 1)
    return [*blocks, _pooling_block(*shape), _head(width, embed_dim, number)]


def _head(width: int, embed_dim: int, number: int) -> Part:
    return Part(2 * width * embed_dim, 4 * width + STATISTICS + number * width)


def _mean_text(config: TextConfig, embed_dim: int, number: int) -> list[Part]:
    """Captions that fill the context."""
    width, tokens = config.width, config.context
    block = _block(tokens, width, 4 * width, width // config.head_width, number)
    # Query, key and value are kept as they come and padded, the attention's output padded and without; and its mask.
    block = Part(block.flops, block.kept + tokens * (4 * width * number + 4), block.input)
    ends = tokens * (2 * 4 * width + STATISTICS + 3 * INDEX) + number * width  # what is normalised, what is averaged
    return [*[block] * config.layers, Part(2 * width * embed_dim, ends)]


def _bag(config: CbowConfig, embed_dim: int, number: int) -> list[Part]:
    return [Part(2 * config.width * embed_dim, number * config.width + (config.context + 3) * INDEX)]


def _convolution(side: int, before: int, after: int, kernel: int, number: int) -> Part:
    """To a map of `side` pixels, its batch normalisation and ReLU in place: their inputs, the first one's not."""
    pixels = side**2
    return Part(2 * pixels * kernel**2 * before * after, 2 * number * pixels * after)


def _conv(config: ConvConfig, embed_dim: int, number: int) -> list[Part]:
    before, side = config.channels, config.image_size
    inside: list[Part] = []
    for i, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
        side = (side + 1) // 2
        inside.append(_convolution(side, before, width, 5 if i == 0 else 3, number))
        inside += [_convolution(side, width, width, 3, number)] * (2 * blocks)
        before = width
    colours = config.channels > 1  # maps are then channels last, the images and the flattened map copies
    copied = number * config.channels * config.image_size**2 if colours or number < 4 else 0
    last = 0 if colours else number * before * side**2
    features = Part(sum(p.flops for p in inside), copied + sum(p.kept for p in inside) - last, copied)
    flat = before * side**2
    head = Part(2 * (flat * config.hidden + config.hidden * embed_dim), number * (flat + 2 * config.hidden))
    return [features, head]


def _resnet(config: ResNetConfig, embed_dim: int, number: int) -> list[Part]:
    side, width = config.image_size // 2, config.width
    stem = [
        _convolution(side, config.channels, width // 2, 3, number),
        _convolution(side, width // 2, width // 2, 3, number),
        _convolution(side, width // 2, width, 3, number),
    ]
    side //= 2
    pixels = config.channels * config.image_size**2  # kept channels last
    parts = [Part(sum(p.flops for p in stem), number * pixels + sum(p.kept for p in stem))]
    before = width
    for stage, blocks in enumerate(config.layers):
        inner = width * 2**stage
        for i in range(blocks):
            stride = 2 if stage and i == 0 else 1
            parts.append(_bottleneck(side, before, inner, stride, number))
            side, before = side // stride, 4 * inner
    return [*parts, _attention_pool(side, before, before // config.head_width, embed_dim, number)]


def _bottleneck(side: int, before: int, inner: int, stride: int, number: int) -> Part:
    after, small = 4 * inner, side // stride
    layers = [_convolution(side, before, inner, 1, number), _convolution(side, inner, inner, 3, number)]
    last = _convolution(small, inner, after, 1, number)  # its ReLU's output is the sum with the shortcut
    kept = sum(p.kept for p in layers) + last.kept
    flops = sum(p.flops for p in layers) + last.flops
    if stride > 1:
        kept += number * small**2 * inner  # the pooled map
    if stride > 1 or before != after:
        flops += 2 * small**2 * before * after
        kept += number * small**2 * (after + (before if stride > 1 else 0))
    return Part(flops, kept, number * side**2 * before)


def _attention_pool(side: int, width: int, heads: int, embed_dim: int, number: int) -> Part:
    tokens = side**2 + 1
    flops = 2 * width**2 * (1 + 2 * tokens) + 4 * tokens * width + 2 * width * embed_dim
    return Part(flops, number * width * (3 * tokens + 3) + 4 * heads)


TOWERS: dict[type, Callable[..., list[Part]]] = {
    VitConfig: _vit,
    ResNetConfig: _resnet,
    ConvConfig: _conv,
    CausalTextConfig: _causal,
    TextConfig: _mean_text,
    CbowConfig: _bag,
}
