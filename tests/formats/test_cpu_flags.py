"""Instruction sets from texts of real machines."""

from __future__ import annotations

from millrace.formats.cpu import cpu_flags, has_vnni, parse_flags

ZEN3 = "processor\t: 0\nflags\t\t: fpu sse2 avx f16c avx2 fma sha_ni\n\nprocessor\t: 1\nflags\t\t: fpu avx512f\n"
ZEN4 = "flags\t: fpu avx avx2 fma f16c avx512f avx512bw avx512vl avx512_vnni avx512_bf16\n"
ARM = "processor : 0\nFeatures : fp asimd evtstrm asimddp i8mm bf16\n"


def test_only_the_first_processor_and_only_what_matters() -> None:
    assert parse_flags(ZEN3) == ["avx", "avx2", "f16c", "fma"]


def test_vnni_is_what_full_range_int8_needs() -> None:
    assert not has_vnni(parse_flags(ZEN3))
    assert has_vnni(parse_flags(ZEN4))
    assert has_vnni(["avx_vnni"])


def test_arm_and_nothing() -> None:
    assert parse_flags(ARM) == ["asimd", "asimddp", "bf16", "i8mm"]
    assert parse_flags("") == []


def test_this_machine_is_described_the_same_twice() -> None:
    first = cpu_flags()
    first.append("changed by the caller")
    assert "changed by the caller" not in cpu_flags()
    assert has_vnni() == has_vnni(cpu_flags())
