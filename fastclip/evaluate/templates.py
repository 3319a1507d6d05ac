"""Prompt templates by name: sentences in which {} stands for the name of a class.

`imagenet` are the 80 of CLIP's authors, `imagenet-7` their selection of seven; templates.json cites them. `photo` is
"a photo of a {}.", `plain` the name alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files

from fastclip.errors import UserError


def named_templates() -> dict[str, tuple[str, ...]]:
    """All sets by name."""
    stored = json.loads(files("fastclip.evaluate").joinpath("templates.json").read_text(encoding="utf-8"))
    return {name: tuple(templates) for name, templates in stored.items() if name != "source"}


def resolve_templates(wanted: Sequence[str]) -> tuple[str, ...]:
    """The templates that `wanted` gives: names of sets, or sentences with one {}. UserError for anything else."""
    named, found = named_templates(), []
    for text in wanted:
        if text not in named and text.count("{}") != 1:
            raise UserError(f"{text!r} is neither a set of templates ({', '.join(named)}) nor a sentence with one {{}}")
        found += named.get(text, (text,))
    return tuple(dict.fromkeys(found))


def prompts_for(classes: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
    """For each class its name in every template. Other braces of a template stay as they are."""
    return [[template.replace("{}", name) for template in templates] for name in classes]
