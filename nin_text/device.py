"""Where to compute, in which precision, and how memory is kept."""

from __future__ import annotations

import ctypes
import platform

import torch

from nin_text.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device to compute on.

    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" computes nothing
    except Exception as error:
        raise UserError(f"there is no device {name!r} here; use --device cpu or auto") from error
    return device


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to multiply in bfloat16: if asked for, or if the processor does so natively."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())


def keep_freed_memory() -> None:
    """Let the C library keep freed buffers instead of handing them back at once.

    Every layer frees and allocates buffers of many megabytes. glibc returns such buffers to the
    system, which clears them page by page when they are asked for again; on a CPU that takes as
    long as the arithmetic. Elsewhere than on glibc this does nothing.
    """
    libc = _glibc()
    if libc is not None:
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_mmap_threshold, 2**30)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory() -> None:
    """Let the C library hand back what has been freed, after work that will not come again.

    Elsewhere than on glibc this does nothing.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
