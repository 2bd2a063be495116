"""The peak that model FLOPs utilisation is measured against: tabled for known accelerators, measured elsewhere."""

import time

import torch

# Dense bf16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets.
_TABLED_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12}


def peak_flops(device: torch.device, dtype: torch.dtype, *, size: int = 1024, seconds: float = 0.2) -> float:
    """FLOP/s of one rank's device: tabled for a known GPU in bf16, else the best of some square GEMMs here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for model, peak in _TABLED_BF16.items():
            if model in name.split() or any(part.startswith(model) for part in name.replace("-", " ").split()):
                return peak
    return measured_flops(device, dtype, size=size, seconds=seconds)


def measured_flops(device: torch.device, dtype: torch.dtype, *, size: int, seconds: float) -> float:
    """FLOP/s of the best square GEMM of this size within a time."""
    a = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        started = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best
