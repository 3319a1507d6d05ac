"""The one place where user tensors are validated. Every message says what was expected and what came.

Legend: N image rows, M text rows, D embedding width.
"""

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 features, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def early_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient that comes with the value, and that upstream's has yet to multiply: the features', or float32.

    In float16 a loss scale of 65536 would be infinite, and what it is there to save would be lost before it came.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def features(x: Tensor, y: Tensor, x_name: str, y_name: str, *, paired: bool) -> tuple[Tensor, Tensor]:
    """x [N, D] and y [M, D], floating, on one device and of one dtype (cast where autocast is on).

    Raises TypeError for what is not a floating tensor and for two dtypes, ValueError for shapes and devices.
    """
    for name, value in ((x_name, x), (y_name, y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor [N, D], got {type(value).__name__}")
        if value.dtype not in FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got {value.layout}")
    shapes = f"got {tuple(x.shape)} and {tuple(y.shape)}"
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"{x_name} and {y_name} must both be [N, D], {shapes}")
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"{x_name} and {y_name} must have the same width D, {shapes}")
    if x.shape[1] == 0:
        raise ValueError(f"{x_name} and {y_name} must have a width D of at least 1, {shapes}")
    if x.shape[0] == 0 or y.shape[0] == 0:
        raise ValueError(f"{x_name} and {y_name} must hold at least one row, {shapes}")
    if paired and x.shape[0] != y.shape[0]:
        raise ValueError(f"{x_name} and {y_name} are pairs and must have the same number of rows N, {shapes}")
    if x.device != y.device:
        raise ValueError(f"{x_name} and {y_name} must be on one device, got {x.device} and {y.device}")
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, y.dtype):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = x.to(dtype), y.to(dtype)
    if x.dtype != y.dtype:
        raise TypeError(f"{x_name} and {y_name} must have one dtype, got {x.dtype} and {y.dtype}")
    return x, y


def scalar(value: Tensor | float, name: str, like: Tensor) -> Tensor:
    """A float, a 0-d or a [1] tensor as a 0-d tensor beside `like`, in its accumulation dtype."""
    dtype = accumulation_dtype(like.dtype)
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a float, a 0-d or a [1] tensor, got {type(value).__name__}")
        return torch.full((), float(value), dtype=dtype, device=like.device)
    if value.shape not in ((), (1,)):
        raise ValueError(f"{name} must be one number: a float, a 0-d or a [1] tensor, got {tuple(value.shape)}")
    if value.is_complex():
        raise TypeError(f"{name} must be real, got {value.dtype}")
    value = value if value.ndim == 0 else value.reshape(())
    return value.to(dtype=dtype, device=like.device)


def sample_weight(weight: Tensor | None, rows: int, like: Tensor) -> Tensor | None:
    """One weight per pair: None or a tensor [N]."""
    if weight is None:
        return None
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor [N], got {type(weight).__name__}")
    if weight.shape != (rows,):
        raise ValueError(f"weight must be [N] = ({rows},), got {tuple(weight.shape)}")
    if weight.device != like.device:
        raise ValueError(f"weight must be on the features' device {like.device}, got {weight.device}")
    return weight.to(accumulation_dtype(like.dtype))


def indices(value: Tensor, name: str, length: int, limit: int, like: Tensor) -> Tensor:
    """[length] int64 in [0, limit). On a GPU the range is not read back: it is an assertion on the device."""
    value = integers(value, name, length, like)
    inside = (value >= 0) & (value < limit)
    if value.device.type == "cpu":
        if not bool(inside.all()):
            raise ValueError(f"{name} must lie in [0, {limit}), got {int(value.min())} to {int(value.max())}")
    else:
        torch._assert_async(inside.all(), f"{name} must lie in [0, {limit})")
    return value


def integers(value: Tensor, name: str, length: int, like: Tensor) -> Tensor:
    """An integer tensor [length] on the features' device, as int64."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an integer tensor [{length}], got {got}")
    if value.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on the features' device {like.device}, got {value.device}")
    return value.to(torch.int64)


def reduction(name: str) -> str:
    if name not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {name!r}')
    return name


def ids_mode(name: str) -> str:
    if name not in ("positive", "ignore"):
        raise ValueError(f'ids_mode must be "positive" or "ignore", got {name!r}')
    return name


def options(value, has_ids: bool) -> None:
    """The options of a softmax loss (softmax.Options), alone and together."""
    for name in ("label_smoothing", "hardness", "false_negative_margin"):
        number = getattr(value, name)
        if number is not None and (isinstance(number, (Tensor, bool)) or not isinstance(number, (int, float))):
            raise TypeError(f"{name} must be a float, got {type(number).__name__}")
    if not 0.0 <= value.label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be a float in [0, 1], got {value.label_smoothing!r}")
    ids_mode(value.ids_mode)
    leaves_out = value.false_negative_margin is not None or (has_ids and value.ids_mode == "ignore")
    if value.label_smoothing and leaves_out:
        raise ValueError("label_smoothing spreads over all keys: it cannot be combined with pairs that are left out")
