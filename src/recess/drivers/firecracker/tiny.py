"""The smallest guest for Firecracker: a kernel that counts and then asks the keyboard controller for a reset.

It answers "does KVM truly run guests here?" without any image: some hosts offer a KVM that interprets instructions one by
one, and there the counting takes minutes; on real hardware it takes 10 ms. Firecracker ends, with exit code 0, when a
guest writes 0xfe to port 0x64. The form is an ELF64 file with one segment; Firecracker enters it in 64-bit mode, with
paging on and the first gigabyte mapped onto itself (its src/vmm/src/arch/x86_64/regs.rs).
"""

from __future__ import annotations

import struct

_ROUNDS = 20_000_000
_ADDRESS = 0x100_0000
_OFFSET = 0x1000
_PT_LOAD = 1

_CODE = (
    b"\xb9"
    + struct.pack("<I", _ROUNDS)  # mov ecx, ROUNDS
    + bytes.fromhex("ffc9 75fc")  # dec ecx; jnz to itself
    + bytes.fromhex("b0fe e664")  # mov al, 0xfe; out 0x64, al
    + bytes.fromhex("f4 ebfd")  # hlt; jmp back
)


def tiny_kernel() -> bytes:
    """Return the ELF file."""
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bit, little endian, version 1
    header = struct.pack("<16sHHIQQQIHHHHHH", ident, 2, 62, 1, _ADDRESS, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", _PT_LOAD, 7, _OFFSET, _ADDRESS, _ADDRESS, len(_CODE), len(_CODE), 0x1000)
    return (header + segment).ljust(_OFFSET, b"\0") + _CODE
