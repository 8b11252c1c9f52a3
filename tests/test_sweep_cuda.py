"""The sanitizers' sweep runs every kernel that the library has, but those of which it says that it does not."""

import ctypes
import os
import re
import struct
from pathlib import Path

import pytest
import torch

import sanitizer_sweep
import warpdecode
from warpdecode.bench.kernels_seen import recorded

pytestmark = pytest.mark.gpu

PACKAGED = Path(warpdecode.__file__).parent / "lib" / "libwarpdecode.so"
SECTION = "<IIQQQQIIQQ"  # name, type, flags, address, offset, size, ... of an ELF file of 64 bits


def section(elf, wanted):
    """The bytes of one section."""
    (table,), (size, count, names) = struct.unpack_from("<Q", elf, 0x28), struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from(SECTION, elf, table + i * size) for i in range(count)]
    begin = headers[names][4]
    found = [h for h in headers if elf.startswith(wanted + b"\0", begin + h[0])]
    assert len(found) == 1, wanted
    return elf[found[0][4] : found[0][4] + found[0][5]]


def demangled(names):
    """C++ names as the profiler gives them, which has them from the same function."""
    try:
        demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    except (OSError, AttributeError) as error:
        pytest.skip(f"names of kernels: libstdc++ does not demangle them: {error}")
    demangle.restype = ctypes.c_char_p  # its memory is never freed: some KB
    found = {demangle(name, None, None, None) for name in names}
    assert None not in found
    return {name.decode() for name in found}


def contained():
    """The kernels of the library: the names under which its host code registers them are all that .rodata has of C++,
    also where the library is stripped."""
    elf = Path(os.environ.get("WARPDECODE_LIBRARY") or PACKAGED).read_bytes()
    return demangled(re.findall(rb"_ZN2wd\w+(?=\0)", section(elf, b".rodata")))


def test_the_sweep_reaches_every_kernel(cuda):
    sms = torch.cuda.get_device_properties(cuda).multi_processor_count
    unusable = [kernel.name for kernel in warpdecode.kernels() if kernel.device == "cuda" and not kernel.usable]
    if sms != 132 or unusable:  # where cuda_tiled is usable, a block can have 227 KB of shared memory
        pytest.skip(f"the sweep's cases are of 132 multiprocessors and all kernels: {sms}; unusable: {unusable}")
    kernels = contained()
    for unreached in sanitizer_sweep.UNREACHED:
        assert any(unreached in name for name in kernels), unreached
    expected = {name for name in kernels if not any(part in name for part in sanitizer_sweep.UNREACHED)}

    def swept():
        return kernels & {event.name for event in recorded(sanitizer_sweep.main)}

    seen = swept()
    if expected - seen:  # the profiler may lose events: hardly all of a kernel's, and not in two recordings
        seen |= swept()
    assert sorted(expected - seen) == [], "not reached"
    assert sorted(seen - expected) == [], "of UNREACHED, yet reached"
