"""csrc/cpu: sizes on both sides of every tile, poisoned and guarded buffers, and each instruction set.

Sizes: tiles of 6 rows, panels of 8, 16 or 64 columns, blocks of 192 rows, waves of 1920, and 32 groups of partial sums
(so that more than 2048 columns or 6144 rows share a group).
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from cases import SIZES, assert_close, features, run_python, sizes, truth, value_and_grads

from fastclip import available_backends, clip_loss, ops, siglip_loss
from fastclip.backends import cpu, eager
from fastclip.checks import accumulation_dtype

pytestmark = pytest.mark.skipif(
    "cpu" not in available_backends(), reason=f"the C++ kernels are not built here: {cpu.why_not(None)}"
)


@pytest.mark.parametrize("d", [3, 65], ids=["narrow", "wide-panel+1"])
@pytest.mark.parametrize("n", [1919, 1920, 1921, 2113], ids=["wave-1", "wave", "wave+1", "ragged-wave"])
def test_waves_of_the_backward_pass(n, d):
    image, text = features(n, d)
    got = value_and_grads(clip_loss, image, text, 5.0, backend="cpu")
    assert_close(got, truth(image, text, 5.0), torch.float32, ulps=2048)


def test_more_blocks_than_groups_of_partial_sums():
    n = 32 * 192 + 1
    image, text = features(n, 2)
    got = clip_loss(image, text, 3.0, backend="cpu", return_stats=True)
    want = clip_loss(image.double(), text.double(), 3.0, backend="eager", return_stats=True)
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1].image_lse.double(), want[1].image_lse, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1].text_lse.double(), want[1].text_lse, rtol=1e-6, atol=0)


class Guard:
    """Allocates like torch.empty and friends, with a margin on both sides of every buffer, NaN in and around it."""

    MARGIN = 64

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.buffers = []
        self.plain_empty = torch.empty
        patch.setattr(torch, "empty", self.empty)
        patch.setattr(torch, "zeros", lambda *shape, **options: self.empty(*shape, **options).fill_(0))
        patch.setattr(torch, "empty_like", lambda x, dtype=None: self.empty(*x.shape, dtype=dtype or x.dtype))
        patch.setattr(torch.Tensor, "new_empty", self.new_empty)

    def empty(self, *shape, dtype=torch.float32, **_options):
        shape = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
        count = math.prod(shape)
        # Integers have no NaN: a value that would show in any sum or index.
        poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min // 2
        whole = self.plain_empty(count + 2 * self.MARGIN, dtype=dtype).fill_(poison)
        self.buffers.append((whole, count))
        return whole[self.MARGIN : self.MARGIN + count].view(shape)

    @property
    def new_empty(self):
        return lambda like, *shape, dtype=None, **_options: self.empty(*shape, dtype=dtype or like.dtype)

    def check(self) -> None:
        assert self.buffers
        for whole, count in self.buffers:
            margins = torch.cat([whole[: self.MARGIN], whole[self.MARGIN + count :]])
            untouched = margins.isnan() if margins.is_floating_point() else margins == torch.iinfo(whole.dtype).min // 2
            assert untouched.all(), f"a kernel wrote outside a buffer of {count} {whole.dtype}"


def surrounded_by_nan(x):
    whole = torch.full((x.shape[0] + 6, x.shape[1] + 10), torch.nan, dtype=x.dtype)
    whole[3:-3, 5:-5] = x
    return whole[3:-3, 5:-5]


@pytest.mark.parametrize("exact", [False, True], ids=["one-shift", "exact-path"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 16, 17, 65], ids=["one", "panel", "panel+1", "wide-panel+1"])
@pytest.mark.parametrize("n", **sizes("one", "tile-1", "tile+1", "panel+1", "wide-panel+1", "block+1"))
def test_nothing_is_read_or_written_outside_the_buffers(n, d, dtype, exact, monkeypatch):
    image, text = features(n, d, "cpu", dtype)
    if exact:
        text = -image
    scale, positive = torch.tensor(300.0 if exact else 8.0, dtype=cpu.accumulation_dtype(dtype)), torch.arange(n)

    def everything(x, y):
        sums = cpu.similarity_sums(x, y, scale, positive, True, ops.NO_MASK)
        upstream = [torch.linspace(1, 2, n, dtype=scale.dtype) for _ in range(3)]
        needs = [True, True, True]
        grads = cpu.similarity_sums_backward(x, y, scale, positive, *sums[2:4], *upstream, True, needs, ops.NO_MASK)
        in_one_call = cpu.clip_loss(x, y, scale, None, True, True, needs)
        return *sums, *grads, *in_one_call, *cpu.similarity_ranks(x, y, scale, positive, positive, True)

    want = everything(image, text)
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "KEPT_BYTES", 0)  # scratch of its own for every call
        guard = Guard(patch)
        got = everything(surrounded_by_nan(image), surrounded_by_nan(text))
        guard.check()
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_the_guard_catches_a_write_outside(monkeypatch):
    with monkeypatch.context() as patch:
        guard = Guard(patch)
        buffer = torch.ones(2).new_empty(3)
        guard.check()
        buffer.as_strided((1,), (1,), buffer.storage_offset() + 3).fill_(0)
        with pytest.raises(AssertionError, match="wrote outside"):
            guard.check()


def test_uninitialised_memory_is_never_used(backend):
    """torch's own poison: with deterministic algorithms on, torch.empty is NaN (for integers, the largest value)."""
    if backend not in ("cpu", "eager"):
        pytest.skip("poisons CPU allocations only")
    image, text = features(SIZES["block+1"], 17, backend)

    def everything():
        loss, stats = clip_loss(image, text, 20.0, label_smoothing=0.1, return_stats=True, backend=backend)
        return loss, *vars(stats).values(), *value_and_grads(clip_loss, image, text, 20.0, backend=backend)

    want = everything()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def isa_results(isa: str) -> dict:
    code = """
import json, torch
from fastclip import clip_loss
from fastclip.backends import cpu
generator = torch.Generator().manual_seed(0)
assert cpu.why_not(None) is None, cpu.why_not(None)
result = {"name": cpu.describe()}
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for n, d, scale in ((7, 3, 5.0), (201, 67, 30.0), (201, 2, 3000.0)):
        x, y = (torch.randn(n, d, generator=generator).to(dtype).requires_grad_() for _ in range(2))
        loss, stats = clip_loss(x, y, scale, backend="cpu", return_stats=True)
        loss.backward()
        key = f"{dtype} {n} {d} {scale}"
        values = [loss.item(), stats.mean_rank.item(), *x.grad.double().flatten().tolist()]
        result[key] = [*values, *y.grad.double().flatten().tolist()]
print(json.dumps(result))
"""
    done = run_python(code, FASTCLIP_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_instruction_set_agrees():
    best, *others = (isa_results(isa) for isa in ("", "avx512", "avx2", "baseline") if not isa or runs(isa))
    assert "baseline" in others[-1]["name"]
    for other in others:
        for key, values in other.items():
            if key == "name":
                continue
            got, want = torch.tensor(values, dtype=torch.float64), torch.tensor(best[key], dtype=torch.float64)
            tolerance = {"float64": 1e-11, "float32": 2e-4, "bfloat16": 1e-2}[key.split()[0].removeprefix("torch.")]
            assert got[1] == want[1], f"{key}: mean rank"
            assert (got - want).norm() <= tolerance * want.norm(), key


@pytest.mark.parametrize("normalize", [True, False], ids=["normalize", "as-they-come"])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 3), (193, 17), (1921, 33)], ids=["one", "odd", "block+1", "wave+1"])
def test_sigmoid_in_bfloat16_is_no_further_off_than_twice_the_dense_loss(n, d, normalize):
    def dense(x, y, scale, bias, **_options):
        if normalize:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
        logits = (scale * (x @ y.T) + bias).to(scale.dtype)
        return -F.logsigmoid(logits * (2 * torch.eye(n, dtype=scale.dtype) - 1)).sum() / n

    def results(loss, dtype):
        leaves = [v.to(dtype).detach().requires_grad_() for v in (image, text)]
        numbers = [torch.tensor(v, dtype=accumulation_dtype(dtype), requires_grad=True) for v in (12.0, -5.0)]
        value = loss(*leaves, *numbers, normalize=normalize, **({} if loss is dense else {"backend": "cpu"}))
        value.backward()
        return [value.detach().double(), *(leaf.grad.double() for leaf in leaves + numbers)]

    image, text = features(n, d, "cpu", torch.bfloat16)
    want = results(dense, torch.float64)
    names = ("loss", "image", "text", "scale", "bias")
    for name, g, w, o in zip(
        names, results(siglip_loss, torch.bfloat16), want, results(dense, torch.bfloat16), strict=True
    ):
        ulp = torch.finfo(torch.bfloat16).eps / 2 if name in ("image", "text") else 1e-6
        assert (g - w).norm() <= 2 * (o - w).norm() + ulp * w.norm(), name


def runs(isa: str) -> bool:
    code = "from fastclip.backends import cpu; cpu.why_not(None); cpu.describe()"
    return run_python(code, FASTCLIP_CPU_ISA=isa).returncode == 0


def test_an_unknown_instruction_set_is_refused_by_name():
    code = "import torch; from fastclip import clip_loss; x = torch.ones(2, 2); clip_loss(x, x, 1.0, backend='cpu')"
    done = run_python(code, FASTCLIP_CPU_ISA="sse9")
    assert done.returncode == 1
    assert (
        "FASTCLIP_CPU_ISA must be avx512_bf16, avx512, avx2 or baseline and run on this processor, got sse9"
        in done.stderr
    )


def test_eager_agrees_in_several_chunks(monkeypatch):
    image, text = features(101, 8)
    whole = value_and_grads(clip_loss, image, text, 10.0, backend="eager")
    ranks = clip_loss(image, text, 10.0, backend="eager", return_stats=True)[1].mean_rank
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 1000)  # 9 rows at a time
    assert_close(value_and_grads(clip_loss, image, text, 10.0, backend="eager"), whole, torch.float32)
    assert clip_loss(image, text, 10.0, backend="eager", return_stats=True)[1].mean_rank == ranks
