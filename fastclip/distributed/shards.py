"""How the ranks' rows make up one batch: a header that every rank exchanges before the loss, and what it says.

Legend: n_r queries (image rows) and m_r keys (text rows) on rank r; N, M their sums over the W ranks of a group.
"""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

MODES = ("gather", "ring")
T = TypeVar("T")


@dataclass(frozen=True)
class Sharded:
    """A batch spread over the ranks of a process group, wherever a loss takes `group=`.

    group: a ProcessGroup, or None for the default one.
    mode: "gather": every rank holds all M text rows for the loss, O(M D) memory, two large messages. "ring": text rows
        travel from rank to rank while the rank computes, O(M D / W) memory.
    """

    group: object | None = None
    mode: str = "gather"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f'mode must be "gather" or "ring", got {self.mode!r}')
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed ProcessGroup or None, got {type(self.group).__name__}")


@dataclass(frozen=True)
class Shards:
    """One loss call's view of the group: which rows of the whole batch are whose."""

    group: dist.ProcessGroup
    mode: str
    rank: int
    rows: tuple[int, ...]  # n_r of each rank
    cols: tuple[int, ...]  # m_r of each rank

    @property
    def world(self) -> int:
        return len(self.rows)

    def columns(self, rank: int) -> slice:
        """Which columns of S hold the keys of `rank`."""
        ends = list(accumulate(self.cols))
        return slice(ends[rank] - self.cols[rank], ends[rank])

    def own_columns(self, x: Tensor) -> Tensor:
        """[n_r] int64: the column of each of this rank's queries x [n_r, D] among all keys."""
        return torch.arange(len(x), device=x.device) + self.columns(self.rank).start

    def of_one_side(self, sizes: tuple[int, ...]) -> "Shards":
        """Queries against queries (sizes: self.rows), or keys against keys (self.cols)."""
        return replace(self, rows=sizes, cols=sizes)


def agree(given: object, check: Callable[[], T], describe: Callable[[T], tuple[int, int, str]]) -> tuple[T, Shards]:
    """Runs check() on every rank, and raises on every rank where it raised on one, or where they differ.

    given: the user's `group=`. check: validates this rank's arguments and returns them. describe: of what check
    returned, n_r, m_r and a text that has to be the same on all ranks. One message of four integers per rank.
    """
    sharded = given if isinstance(given, Sharded) else Sharded(given)
    group = sharded.group or _default_group()
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("this process is not a member of the group it passed to the loss")
    checked, failure = None, None
    try:
        checked = check()
        n, m, text = describe(checked)
    except Exception as error:  # every rank has to learn of it, whatever it is: the others would wait forever
        failure, n, m, text = error, 0, 0, f"{type(error).__name__}: {error}"
    text = text if failure else f"{text} mode={sharded.mode}"
    headers = _exchange([failure is not None, n, m, _digest(text)], group)
    if any(header[0] for header in headers) or len({header[3] for header in headers}) > 1:
        _raise_everywhere(failure, text, [bool(header[0]) for header in headers], group)
    rows, cols = (tuple(header[field] for header in headers) for field in (1, 2))
    return checked, Shards(group, sharded.mode, rank, rows, cols)


def _default_group() -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ValueError("group= needs a process group: call torch.distributed.init_process_group first")
    return dist.group.WORLD


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _exchange(header: list[int], group: dist.ProcessGroup) -> list[list[int]]:
    """Each rank's header, on the CPU where the group can talk there: reading it from a GPU would drain its queue."""
    on_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator()
    mine = torch.tensor(header, dtype=torch.int64, device=device)
    headers = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(headers, mine, group=group)
    return torch.stack(headers).tolist()


def _raise_everywhere(failure: Exception | None, text: str, failed: list[bool], group: dist.ProcessGroup) -> None:
    """The failing rank raises its own error, every other rank one that names the failing ranks and their messages."""
    texts: list[str] = [""] * len(failed)
    dist.all_gather_object(texts, text, group=group)
    if failure is not None:
        raise failure
    if any(failed):
        told = "; ".join(f"rank {rank}: {texts[rank]}" for rank, bad in enumerate(failed) if bad)
        raise ValueError(f"the loss cannot be computed because another rank's arguments are wrong: {told}")
    told = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
    raise ValueError(f"all ranks must call the loss alike, but they differ: {told}")


def not_compiled(function: Callable[..., T]) -> Callable[..., T]:
    """Decorator: torch.compile breaks its graph here and does not look inside, where it would find messages.

    torch.compiler.disable does that too, and imports the whole compiler at once, which takes seconds.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def tensor_text(**tensors: Tensor | float | None) -> str:
    """name=dtype, with + where a gradient is wanted: what has to be the same on all ranks."""
    grad = torch.is_grad_enabled()
    words = [
        f"{name}={str(t.dtype).removeprefix('torch.')}{'+' if grad and t.requires_grad else ''}"
        for name, t in tensors.items()
        if isinstance(t, Tensor)
    ]
    return " ".join(words)
