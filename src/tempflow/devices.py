"""Devices and dtypes by name, once it is known that they are here. A leaf of the house."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO = "auto"


def resolved_device(name: str) -> str:
    """`name` itself, once it is known to be here; "auto" is CUDA where there is one, else the CPU.

    Raises ValueError, naming the nearest device that is here, for one that is not.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        return "cuda" if cuda else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name[:40]!r} is no device; nearest valid: 'auto'") from error
    if device.type == "cuda" and not cuda:
        build = "" if torch.version.cuda else ", and this torch is built for CPUs alone"
        raise ValueError(f"device: {name!r}, but torch sees no CUDA device{build}; nearest valid: 'cpu'")
    if device.type == "cuda" and (device.index or 0) >= cuda:
        raise ValueError(f"device: {name!r}, but there are {cuda} CUDA devices; nearest valid: 'cuda:{cuda - 1}'")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device: {name!r}, but torch sees no MPS device; nearest valid: 'cpu'")
    return name


def resolved_dtype(dtype: str, device: str) -> str:
    """`dtype` itself; for "auto" bfloat16 where `device` has it in hardware, else float32.

    A CPU without such instructions emulates it, several times slower than float32.
    """
    if dtype != AUTO:
        return dtype
    kind = torch.device(device).type
    if kind == "cuda":
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu" and "get_capabilities" in dir(torch.cpu):  # torch 2.13 has it, 2.6 has not
        has = torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))
    else:
        fast = False
    return "bfloat16" if fast else "float32"
