"""The smallest guest: a kernel of 40 instructions that enters 64-bit mode, counts, and tells through a debug port.

It answers "does this accelerator truly run guests here?" without any image. The counting is the point: some hosts
offer a KVM that cannot run an ordinary kernel and interprets instructions one by one; there it takes minutes, on real
hardware 10 ms, under TCG a fraction of a second. The format is an ELF file with Xen's PVH entry note (Xen's
public/elfnote.h), which microvm firmware starts like a Linux kernel: 32-bit protected mode, no paging.
"""

from __future__ import annotations

import struct

DEBUG_PORT = 0x501
_ANSWER = 0x2A
EXIT_CODE = _ANSWER << 1 | 1
"""What QEMU's isa-debug-exit device turns the answer into."""

_ROUNDS = 20_000_000
_LOAD_ADDRESS = 0x100000
_CODE_OFFSET, _NOTE_OFFSET = 0x1000, 0x800
_PHYS32_ENTRY = 18
_PT_LOAD, _PT_NOTE = 1, 4

# Page tables are built at 0x102000 (pml4), 0x103000 and 0x104000: 2 MiB, mapped onto itself. The descriptor table is
# part of the code, at the offset that `lgdt` names.
_CODE_32 = bytes.fromhex(
    "fa"  # cli
    "0f011588001000"  # lgdt [0x100088]
    "bf00201000"  # mov edi, 0x102000
    "c70703301000"  # mov [edi], 0x103003
    "c7870010000003401000"  # mov [edi+0x1000], 0x104003
    "c7870020000083000000"  # mov [edi+0x2000], 0x83
    "0f22df"  # mov cr3, edi
    "0f20e0 83c820 0f22e0"  # cr4 |= physical address extension
    "b9800000c0 0f32 0d00010000 0f30"  # efer |= long mode
    "0f20c0 0d01000080 0f22c0"  # cr0 |= paging, protection
    "ea530010000800"  # jmp 8:0x100053
)
_CODE_64 = (
    b"\xb9"
    + struct.pack("<I", _ROUNDS)  # mov ecx, ROUNDS
    + bytes.fromhex("ffc9 75fc")  # dec ecx; jnz to itself
    + bytes.fromhex("31c0 0fa2")  # xor eax, eax; cpuid
    + b"\x66\xba"
    + struct.pack("<H", DEBUG_PORT)  # mov dx, DEBUG_PORT
    + bytes([0xB0, _ANSWER, 0xEE])  # mov al, ANSWER; out dx, al
    + bytes.fromhex("f4 ebfd")  # hlt; jmp back
)
_DESCRIPTORS = struct.pack("<3QHI", 0, 0x00AF9A000000FFFF, 0x00CF92000000FFFF, 23, _LOAD_ADDRESS + 0x70)


def tiny_kernel() -> bytes:
    """Return the ELF file."""
    code = (_CODE_32 + _CODE_64).ljust(0x70, b"\x90") + _DESCRIPTORS
    note = struct.pack("<III4sI", 4, 4, _PHYS32_ENTRY, b"Xen\0", _LOAD_ADDRESS)
    ident = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)  # 32 bit, little endian, version 1
    header = struct.pack("<16sHHIIIIIHHHHHH", ident, 2, 3, 1, _LOAD_ADDRESS, 52, 0, 0, 52, 32, 2, 40, 0, 0)
    load = struct.pack("<8I", _PT_LOAD, _CODE_OFFSET, _LOAD_ADDRESS, _LOAD_ADDRESS, len(code), len(code), 7, 0x1000)
    notes = struct.pack("<8I", _PT_NOTE, _NOTE_OFFSET, 0, 0, len(note), len(note), 4, 4)
    image = bytearray(0x2000)
    for offset, part in ((0, header + load + notes), (_NOTE_OFFSET, note), (_CODE_OFFSET, code)):
        image[offset : offset + len(part)] = part
    return bytes(image)
