"""Devices, as far as the choice of a kernel depends on them: described here, so that a plan can be made for a GPU that
is not present, or read from the GPU in the machine by `of_cuda`. Imports neither torch nor Triton.

Sources: [guide] the CUDA C++ Programming Guide's "Technical Specifications per Compute Capability" and NVIDIA's tuning
guides; [paper] the vendor's white paper or product page; [driver] torch.cuda.get_device_properties on that product;
[rocm] AMD's GPU specifications (rocm.docs.amd.com, reference/gpu-specs).
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
REGISTERS = 64 * KIB  # per SM, every capability from 7.5 to 12.1 [guide]


@dataclass(frozen=True)
class Device:
    """One GPU (or the emulator of kernels): the limits that a plan has to respect. A "program" is a thread block on
    NVIDIA, a workgroup on AMD; an "SM" is a streaming multiprocessor on NVIDIA, a compute unit on AMD."""

    name: str
    vendor: str  # "nvidia", "amd" or "interpreter"
    capability: int | None  # compute capability, 90 for 9.0; None where the vendor is not NVIDIA
    arch: str  # the compiler's name: "sm_90", "gfx942"
    sms: int
    shared_per_program: int  # bytes of shared memory one program may have, opt-in included
    shared_per_sm: int  # bytes of shared memory all programs on one SM have together
    memory_bytes: int = 0  # 0: unknown

    @property
    def target(self) -> tuple[str, int | str, int]:
        """Triton's name for the device: (backend, architecture, threads per warp)."""
        if self.vendor == "nvidia" and self.capability is not None:
            return "cuda", self.capability, 32
        if self.vendor == "amd":  # waves of 64 on GCN and CDNA, of 32 on RDNA as Triton compiles for it
            return "hip", self.arch, 64 if self.arch.startswith("gfx9") else 32
        raise ValueError(f"device {self.name!r} is no GPU: there is nothing to compile for it")


def registers(num_warps: int, per_sm: int) -> int:
    """That a thread may have where so many programs are to be on one SM of NVIDIA's."""
    return min(255, REGISTERS // (32 * num_warps * per_sm))


# Shared memory in KiB, (per program, per SM), by compute capability [guide]. From 8.0 on the system keeps 1 KiB of each
# program's shared memory for itself, hence 163 of 164.
_SHARED_KIB = {
    75: (64, 64),
    **dict.fromkeys((80, 87), (163, 164)),
    **dict.fromkeys((86, 89, 120, 121), (99, 100)),
    **dict.fromkeys((90, 100, 103), (227, 228)),
}


def _nvidia(name: str, capability: int, sms: int, gib: int) -> Device:
    shared, per_sm = _SHARED_KIB[capability]
    return Device(name, "nvidia", capability, f"sm_{capability}", sms, shared * KIB, per_sm * KIB, gib * GIB)


# Memory [paper], of the largest form, the vendor's GB taken for GiB: no less than there is.
DEVICES = {
    "a100": _nvidia("A100", 80, sms=108, gib=80),  # SMs [paper: A100]
    "h100": _nvidia("H100", 90, sms=132, gib=80),  # the SXM5 form; SMs [paper: H100], [driver]
    "h200": _nvidia("H200", 90, sms=132, gib=141),  # SMs [driver]
    "b200": _nvidia("B200", 100, sms=148, gib=192),  # SMs [driver]
    "rtx4090": _nvidia("RTX 4090", 89, sms=128, gib=24),  # SMs [paper: Ada]
    "l4": _nvidia("L4", 89, sms=58, gib=24),  # SMs: 7424 cores, 128 each [paper: AD104]
    "rtx5090": _nvidia("RTX 5090", 120, sms=170, gib=32),  # SMs [paper: RTX Blackwell]
    "t4": _nvidia("T4", 75, sms=40, gib=16),  # SMs [paper: Turing, T4]
    # 8 dies of 38 compute units; LDS [rocm]; memory [paper: CDNA 3]
    "mi300x": Device("MI300X", "amd", None, "gfx942", 304, 64 * KIB, 64 * KIB, 192 * GIB),
    # Programs run in host memory, where no limit of a GPU binds; those that wait for each other take turns in the
    # emulator (tritongru/tools/emulator): few, for each is a thread.
    "interpreter": Device("interpreter", "interpreter", None, "interpreter", 8, GIB, GIB),
}
GPUS = tuple(key for key, device in DEVICES.items() if device.vendor != "interpreter")


def describe(name: str) -> Device:
    """The described device of that name, in any case: `describe("H100").sms == 132`."""
    try:
        return DEVICES[name.lower()]
    except KeyError:
        raise ValueError(f"unknown device {name!r}: expected one of {', '.join(GPUS)}") from None


@functools.cache
def of_cuda(index: int) -> Device:
    """The GPU that torch calls `cuda:index`, NVIDIA's or (in a ROCm build of torch) AMD's, as it is reported: so a MIG
    slice is taken for what it is."""
    import torch

    p: Any = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        arch, shared = p.gcnArchName.split(":")[0], p.shared_memory_per_block  # "gfx942:sramecc+:xnack-"
        per_sm = p.shared_memory_per_multiprocessor or shared
        return Device(p.name, "amd", None, arch, p.multi_processor_count, shared, per_sm, p.total_memory)
    capability, limits = p.major * 10 + p.minor, (p.shared_memory_per_block_optin, p.shared_memory_per_multiprocessor)
    return Device(p.name, "nvidia", capability, f"sm_{capability}", p.multi_processor_count, *limits, p.total_memory)


def product_key(product: str) -> str | None:
    """The key in DEVICES that a product name stands for: "NVIDIA A100-SXM4-80GB" is an A100, "NVIDIA L40S" is no L4."""
    words = re.split(r"[^a-z0-9]+", product.lower().replace("rtx ", "rtx"))
    return next((key for key in DEVICES if key in words), None)


def described_as(device: Device) -> str | None:
    """The key in DEVICES of the product that a device is all of: a part of one (MIG) is another device."""
    key = product_key(device.name)
    return key if key and DEVICES[key].sms == device.sms else None


def nearest_file(folder: Path, device: Device) -> Path | None:
    """Of files named after keys in DEVICES that of the same vendor's GPU that is nearest in compute capability, then in
    SMs; its own if there is one."""

    def distance(path: Path) -> tuple[int, int, bool]:
        of = DEVICES[path.stem]
        capabilities = abs((of.capability or 0) - (device.capability or 0))
        return capabilities, abs(of.sms - device.sms), path.stem != described_as(device)

    files = [path for path in sorted(folder.glob("*.csv")) if DEVICES[path.stem].vendor == device.vendor]
    return min(files, key=distance, default=None)
