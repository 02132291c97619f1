"""The least time that a device can take: published peaks, one line a device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_TERA = 10**12


@dataclass(frozen=True)
class Roofline:
    """The peak rates of a device.

    `flops`: operations per second of dense matrix products, by dtype name; ``"tf32"`` if the device has it.
    `bandwidth`: bytes per second between memory and chip.
    """

    name: str
    flops: Mapping[str, float]
    bandwidth: float

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def microseconds(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """Return the lower bound for `flops` in `dtype` and `moved` bytes, both at their peak rates and overlapping."""
        return 1e6 * max(flops / self.peak(dtype) if flops else 0.0, moved / self.bandwidth)

    def peak(self, dtype: torch.dtype) -> float:
        """Return operations per second. float32 counts as TensorFloat32 if torch's switch allows it."""
        name = str(dtype).removeprefix("torch.")
        if name.startswith("float8"):
            name = "float8"
        if name == "float32" and "tf32" in self.flops and torch.get_float32_matmul_precision() != "highest":
            name = "tf32"
        return self.flops.get(name, self.flops["float32"])

    def __str__(self) -> str:
        best = max(self.flops, key=lambda name: self.flops[name])
        fastest = f"{self.flops[best] / _TERA:g} in {best}, " if self.flops[best] > self.flops["float32"] else ""
        return (
            f"{self.name}: {self.flops['float32'] / _TERA:g} TFLOP/s in float32, "
            f"{fastest}{self.bandwidth / _TERA:g} TB/s"
        )


def _device(
    name: str,
    bandwidth: float,
    *,
    f64: float,
    f32: float,
    tf32: float | None = None,
    half: float | None = None,
    byte: float | None = None,
) -> Roofline:
    """Make a roofline from tera-operations and terabytes per second. `half`: of float16 and bfloat16; `byte`: of float8
    and int8."""
    peaks = {"float64": f64, "float32": f32}
    peaks |= {} if tf32 is None else {"tf32": tf32}
    peaks |= {} if half is None else {"float16": half, "bfloat16": half}
    peaks |= {} if byte is None else {"float8": byte, "int8": byte}
    return Roofline(name, {k: round(v * _TERA) for k, v in peaks.items()}, round(bandwidth * _TERA))


ROOFLINES = {
    line.name: line
    for line in (
        # All without sparsity, accumulating in float32. NVIDIA, datasheets of the H100 (SXM5) and of the H200.
        _device("h100", 3.35, f64=66.9, f32=66.9, tf32=494.7, half=989.4, byte=1978.9),
        _device("h200", 4.8, f64=66.9, f32=66.9, tf32=494.7, half=989.4, byte=1978.9),
        # NVIDIA, "A100 Tensor Core GPU datasheet" (SXM4, 80 GB). It has no float8; int8 stands for both.
        _device("a100", 2.039, f64=19.5, f32=19.5, tf32=156, half=312, byte=624),
        # NVIDIA, "Blackwell architecture technical brief", table of HGX B200, halved where it counts sparsity.
        _device("b200", 8.0, f64=40, f32=80, tf32=1100, half=2250, byte=4500),
        # NVIDIA, "L40S datasheet", halved where it counts sparsity.
        _device("l40s", 0.864, f64=1.43, f32=91.6, tf32=183, half=362, byte=733),
        # NVIDIA, "Ada GPU architecture" whitepaper, appendix A, GeForce RTX 4090.
        _device("rtx4090", 1.008, f64=1.29, f32=82.6, tf32=82.6, half=165.2, byte=330.3),
        # AMD, "Instinct MI300X accelerator data sheet", matrix rates.
        _device("mi300x", 5.3, f64=163.4, f32=163.4, tf32=653.7, half=1307.4, byte=2614.9),
        # One core with two 256-bit FMA units at 3 GHz (32 float32 operations a cycle: Intel, "Optimization reference
        # manual", Skylake and later) and what such a core draws from DDR4; bfloat16 is computed in float32.
        _device("cpu", 0.015, f64=0.048, f32=0.096, half=0.096),
    )
}


def roofline(name: str | None, device: torch.device) -> Roofline:
    """Return the roofline of that name.

    None takes the GPU at hand if the table has it, else h100 for a program on CUDA and cpu for any other program. Raise
    ValueError for a name that the table does not have.
    """
    if name is None:
        if device.type != "cuda":
            return ROOFLINES["cpu"]
        named = torch.cuda.get_device_name(device).lower().replace(" ", "") if torch.cuda.is_available() else ""
        return next((line for line in ROOFLINES.values() if line.name in named), ROOFLINES["h100"])
    if not isinstance(name, str) or name.lower() not in ROOFLINES:
        raise ValueError(f"device={name!r} has no published peaks here; use one of {', '.join(ROOFLINES)}.")
    return ROOFLINES[name.lower()]
