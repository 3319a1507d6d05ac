"""One forward and backward pass of a model against OpenCLIP's with the same weights, on the CPU.

    OMP_NUM_THREADS=2 python -m fastclip.benchmarks.models --name ViT-B-32 --batch 16 --rounds 15

Features and gradients are compared first. Then the two take turns, and the ratio is that of neighbours. "full":
captions that fill 77 tokens. "usual": captions of 8 to 20 tokens, padded to 77, which is what tokenizers return.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from statistics import median

import torch
from torch import nn

from fastclip.benchmarks.foreign import stand_in_for_torchvision, why_not_open_clip
from fastclip.benchmarks.measure import interleaved, paired
from fastclip.benchmarks.report import extra_text
from fastclip.clip import Clip, export_openclip, model_config
from fastclip.clip.convert import OPENCLIP

CONTEXT, END = 77, 49407
SEED = 0
LARGEST_ERROR = 1e-4  # of a feature or gradient, over the largest entry of its tensor


def captions(n: int, shortest: int, longest: int) -> torch.Tensor:
    """Random ids [N, 77] int64: the end token after `shortest` to `longest` tokens, then padding."""
    ids = torch.randint(1, END, (n, CONTEXT))
    for row, length in enumerate(torch.randint(shortest, longest + 1, (n,)).tolist()):
        ids[row, length - 1] = END
        ids[row, length:] = 0
    return ids


def step(model: nn.Module, images: torch.Tensor | None, ids: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Features of the towers asked for, and the gradients of half their square in every parameter of these."""
    features = {}
    if images is not None:
        features["image features"] = model.encode_image(images)
    if ids is not None:
        features["text features"] = model.encode_text(ids)
    model.zero_grad(set_to_none=True)
    sum(0.5 * x.square().sum() for x in features.values()).backward()
    return {name: x.detach() for name, x in features.items()}


def largest_error(ours: Clip, theirs: nn.Module, images: torch.Tensor, ids: torch.Tensor) -> float:
    """Of all features and gradients. SystemExit above LARGEST_ERROR."""
    found, expected = step(ours, images, ids), step(theirs, images, ids)
    found |= OPENCLIP.to({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    expected |= {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    errors = {name: ((found[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items()}
    worst = max(errors, key=errors.get)
    if errors[worst] > LARGEST_ERROR:
        raise SystemExit(f"{worst} differs by {errors[worst]:.1e} of its largest entry: nothing is timed")
    return errors[worst]


def measure(quick: bool) -> list[dict]:
    """For `fastclip bench`: ViT-B/32, 15 rounds of 16 pairs, or 2 of 2."""
    if reason := why_not_open_clip():
        return [{"not run": reason}]
    return compare("ViT-B-32", *((2, 2) if quick else (16, 15)))


def compare(name: str, batch: int, rounds: int) -> list[dict]:
    """One line for each kind of input: medians of both in seconds, their ratio and its 10th to 90th percentile.

    SystemExit where features or gradients differ.
    """
    library = stand_in_for_torchvision()  # noqa: F841 - kept: its definitions go when it is collected
    import open_clip

    logging.disable(logging.WARNING)  # OpenCLIP warns that the weights are random
    torch.manual_seed(SEED)
    ours = Clip(model_config(name))
    theirs = open_clip.create_model(name).train()
    theirs.load_state_dict(export_openclip(ours))
    size = ours.config.image.image_size
    images = torch.randn(batch, 3, size, size)
    texts = {"full": captions(batch, CONTEXT, CONTEXT), "usual": captions(batch, 8, 20)}
    error = max(largest_error(ours, theirs, images, ids) for ids in texts.values())
    work = {"image": (images, None)}
    for kind, ids in texts.items():
        work |= {f"text, {kind}": (None, ids), f"both, {kind}": (images, ids)}

    lines = []
    for what, inputs in work.items():
        calls = {"ours": partial(step, ours, *inputs), "theirs": partial(step, theirs, *inputs)}
        interleaved(calls, lambda: None, range(2, 2), 0)
        times = interleaved(calls, lambda: None, range(rounds, rounds), 0)
        ratio = paired(times["ours"], times["theirs"])
        line = {"model": name, "batch": batch, "forward + backward": what, "largest error": error}
        line |= {"fastclip, s": median(times["ours"]), "OpenCLIP, s": median(times["theirs"])}
        lines.append(line | {"ratio": ratio.median, "10% to 90%": f"{ratio.low:.3f} to {ratio.high:.3f}"})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="ViT-B-32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    print(f"float32, {torch.get_num_threads()} threads, {args.rounds} rounds")
    print(extra_text(compare(args.name, args.batch, args.rounds)))


if __name__ == "__main__":
    main()
