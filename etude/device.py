"""What this machine can do: its device, the precision its hardware multiplies natively, and determinism."""

import contextlib
import os
import sys

import torch

from etude.errors import UsageError

COMPILE_FLOPS = 1e14  # five minutes and more of training on a CPU
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str = "auto") -> torch.device:
    """The device called ``name``; "auto" is CUDA, else MPS, else the CPU. Raises :class:`UsageError` if it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"device ({name}) must be auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"device ({name}) must be auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device ({name}): this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())  # torch.cuda.set_device wants an index
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device (mps): this machine has no Metal device; use --device cpu")
    return device


def pick_precision(name: str, device: torch.device, training: bool = False) -> str:
    """ "auto": bf16 where the hardware multiplies it, fp16 on older CUDA devices, fp32 elsewhere (MPS included).

    Software bf16 is slower than fp32, so being able to run it is not enough. "fp8" is for training only: bf16, with 8 bits in
    the large products, and never picked by itself.
    """
    if name == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
        return "bf16" if device.type == "cpu" and _cpu_multiplies_bf16() else "fp32"
    if name == "fp8" and training:
        if not _multiplies_fp8(device):
            raise UsageError("precision (fp8) needs a GPU that multiplies 8 bits (Ada, Hopper or newer); use auto or bf16")
        return name
    if name not in PRECISIONS:
        raise UsageError(f"precision ({name}) must be auto, {', '.join(PRECISIONS)}")
    if name == "fp16" and device.type != "cuda":
        raise UsageError("precision (fp16) needs a CUDA device: its loss scaling is made for one; use bf16 or fp32")
    return name


def _cpu_multiplies_bf16() -> bool:
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if features:
        return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("amx_tile"))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch 2.10 has no public question
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _multiplies_fp8(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    ones, scales = torch.ones(16, 16, device=device), torch.ones(16, 1, device=device)
    try:  # whether this GPU, system and torch can, and by rows, is quicker tried than told
        matrix = ones.to(torch.float8_e4m3fn)
        torch._scaled_mm(matrix, matrix.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except Exception:
        return False
    return True


def pick_compile(choice: str, device: torch.device, flops: float) -> bool:
    """Whether to compile a run of ``flops`` in all. "auto": on CUDA always; on a Linux CPU where a compiler works and the run
    is long enough: compiling takes half a minute there, and then saves about a third of the time.
    """
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" or (device.type == "cpu" and flops > COMPILE_FLOPS and _cpu_compiler_works())


def _cpu_compiler_works() -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8))
    except Exception:  # no compiler, or one that does not suit: whatever it is, training goes without
        return False
    return True


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Matrix products in ``precision``; weights, norms and softmax stay in fp32, and so do sums of losses and gradients."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16 if precision == "fp8" else PRECISIONS[precision])


def set_deterministic(enabled: bool) -> None:
    """Prefer operations whose result does not depend on timing, and warn of others (on CUDA; a CPU has none such)."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def describe(device: torch.device) -> str:
    """The device in words, for the run header."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads"


# Dense bf16 peak in FLOP/s by the name CUDA reports (vendors' data sheets), for model FLOPs utilisation (MFU).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12, "A10G": 70e12}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it isn't known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
