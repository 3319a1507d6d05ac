"""The names of a model's tensors in the checkpoints of others.

A layout says, for each tensor of ours, which tensors of theirs it is: one of the same shape, one transposed (OpenCLIP's
projections), or several on top of each other (query, key and value in Hugging Face's). All else follows from that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Tensors = Mapping[str, torch.Tensor]


class CheckpointMismatchError(ValueError):
    """A checkpoint that does not fit the model. Names as in the checkpoint; shapes: name -> (got, expected)."""

    def __init__(self, what: str, missing: list[str], unexpected: list[str], shapes: dict[str, tuple]) -> None:
        self.missing, self.unexpected, self.shapes = missing, unexpected, shapes
        wrong = [f"{name} {list(got)} instead of {list(expected)}" for name, (got, expected) in shapes.items()]
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        super().__init__(f"{what}: " + "; ".join(f"{word}: {_some(names)}" for word, names in parts if names))


def _some(names: list[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True)
class Layout:
    """`rules`: (pattern of our name, their names) in the order they are tried.

    `transposed`: their names that hold the transpose of ours. `ignored`: pattern of names that are no weights.
    """

    name: str
    rules: tuple[tuple[str, tuple[str, ...]], ...]
    transposed: frozenset[str] = frozenset()
    ignored: str = r"$^"

    def names(self, ours: str) -> tuple[str, ...]:
        """Their names for our tensor `ours`. KeyError if the layout has no place for it."""
        for pattern, theirs in self.rules:
            if match := re.fullmatch(pattern, ours):
                return tuple(match.expand(name) for name in theirs)
        raise KeyError(f"{ours} has no name in {self.name}'s layout")

    def to(self, state: Tensors) -> dict[str, torch.Tensor]:
        """Our state dict in their layout; views where that is possible."""
        result = {}
        for ours, tensor in state.items():
            names = self.names(ours)
            parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)
            for name, part in zip(names, parts, strict=True):
                result[name] = part.T if name in self.transposed else part
        return result

    def back(self, state: Tensors, ours: Tensors, what: str) -> dict[str, torch.Tensor]:
        """Their state dict under the names of `ours`. CheckpointMismatchError unless all names and shapes agree.

        Of `ours` only names and shapes are read: a model on the meta device will do. `what` is named in the error.
        """
        state = {name: tensor for name, tensor in state.items() if not re.fullmatch(self.ignored, name)}
        expected = self.to(ours)
        missing = [name for name in expected if name not in state]
        unexpected = [name for name in state if name not in expected]
        shapes = {
            name: (tuple(state[name].shape), tuple(tensor.shape))
            for name, tensor in expected.items()
            if name in state and state[name].shape != tensor.shape
        }
        if missing or unexpected or shapes:
            raise CheckpointMismatchError(f"{what} does not fit ({self.name} names)", missing, unexpected, shapes)
        result = {}
        for name in ours:
            parts = [state[n].T if n in self.transposed else state[n] for n in self.names(name)]
            result[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        return result


def _blocks(ours: str, theirs: str, parts: Mapping[str, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (rf"{ours}\.blocks\.(\d+)\.{re.escape(mine)}\.(\w+)", tuple(rf"{theirs}.\1.{name}\2" for name in names))
        for mine, names in parts.items()
    ]


def _renamed(table: Mapping[str, str]) -> list[tuple[str, tuple[str, ...]]]:
    """Whole names, and beginnings of names where they end in a dot."""
    return [
        (re.escape(mine) + (r"(.*)" if mine.endswith(".") else "()"), (rf"{theirs}\1",))
        for mine, theirs in table.items()
    ]


_OPENCLIP_BLOCK = {
    "norm_attention": ("ln_1.",),
    "query_key_value": ("attn.in_proj_",),
    "project": ("attn.out_proj.",),
    "norm_mlp": ("ln_2.",),
    "mlp.0": ("mlp.c_fc.",),
    "mlp.2": ("mlp.c_proj.",),
}
_TRANSFORMERS_BLOCK = {
    "norm_attention": ("layer_norm1.",),
    "query_key_value": ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    "project": ("self_attn.out_proj.",),
    "norm_mlp": ("layer_norm2.",),
    "mlp.0": ("mlp.fc1.",),
    "mlp.2": ("mlp.fc2.",),
}

FASTCLIP = Layout("fastclip", ((r"(.*)", (r"\1",)),))

# OpenAI's is the same, with three numbers of the architecture among the tensors.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")
OPENCLIP = Layout(
    "OpenCLIP",
    (
        *_blocks("image", "visual.transformer.resblocks", _OPENCLIP_BLOCK),
        *_blocks("text", "transformer.resblocks", _OPENCLIP_BLOCK),
        *_renamed(
            {
                "log_scale": "logit_scale",
                "logit_bias": "logit_bias",
                "text.tokens.weight": "token_embedding.weight",
                "text.positions": "positional_embedding",
                "text.norm.": "ln_final.",
                "text.project.weight": "text_projection",
                "image.patches.": "visual.conv1.",
                "image.positions": "visual.positional_embedding",
                "image.norm_before.": "visual.ln_pre.",
                "image.norm.": "visual.ln_post.",
                "image.project.weight": "visual.proj",
                "image.pool.positions": "visual.attnpool.positional_embedding",
                "image.pool.query.": "visual.attnpool.q_proj.",
                "image.pool.key.": "visual.attnpool.k_proj.",
                "image.pool.value.": "visual.attnpool.v_proj.",
                "image.pool.project.": "visual.attnpool.c_proj.",
                "image.": "visual.",
            }
        ),
    ),
    transposed=frozenset({"visual.proj", "text_projection"}),
    ignored="|".join((*OPENAI_EXTRAS, r"(.*\.)?attn_mask")),
)

TRANSFORMERS = Layout(
    "transformers",
    (
        *_blocks("image", "vision_model.encoder.layers", _TRANSFORMERS_BLOCK),
        *_blocks("text", "text_model.encoder.layers", _TRANSFORMERS_BLOCK),
        *_renamed(
            {
                "log_scale": "logit_scale",
                "text.tokens.weight": "text_model.embeddings.token_embedding.weight",
                "text.positions": "text_model.embeddings.position_embedding.weight",
                "text.norm.": "text_model.final_layer_norm.",
                "text.project.": "text_projection.",
                "image.patches.": "vision_model.embeddings.patch_embedding.",
                "image.class_embedding": "vision_model.embeddings.class_embedding",
                "image.positions": "vision_model.embeddings.position_embedding.weight",
                "image.norm_before.": "vision_model.pre_layrnorm.",
                "image.norm.": "vision_model.post_layernorm.",
                "image.project.": "visual_projection.",
            }
        ),
    ),
    # Saved by versions of transformers before 4.31.
    ignored=r".*\.position_ids",
)
