"""What NVIDIA's datasheets say of GPUs: memory, and the most they could do. SXM where there is one; no sparsity."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """memory: bytes. peak: FLOP/s of matrix products by dtype, fp32 as TF32."""

    name: str
    memory: float
    peak: dict[str, float]


def _gpu(name: str, gigabytes: float, tflops_16: float, tflops_tf32: float) -> Gpu:
    sixteen = tflops_16 * 1e12
    return Gpu(name, gigabytes * 1e9, {"bf16": sixteen, "fp16": sixteen, "fp32": tflops_tf32 * 1e12})


GPUS = {
    "b200": _gpu("B200", 180, 2250, 1125),
    "h200": _gpu("H200", 141, 989, 494),
    "h100": _gpu("H100", 80, 989, 494),
    "a100": _gpu("A100 80 GB", 80, 312, 156),
    "a100-40gb": _gpu("A100 40 GB", 40, 312, 156),
    "l40s": _gpu("L40S", 48, 362, 183),
}
