"""The C library, loaded: `lib` and `ffi` of cffi, and status codes turned into exceptions.

The declarations in `_abi` are generated from the public header when the package is built (python/generate_abi.py).
"""

from __future__ import annotations

import os
from pathlib import Path

try:
    from warpdecode._abi import ffi
except ImportError as error:
    raise ImportError(
        "warpdecode: the package is not built (warpdecode/_abi.py is missing); install it with `pip install .` in the "
        "source folder instead of importing the source folder itself"
    ) from error


def _load():
    path = Path(os.environ.get("WARPDECODE_LIBRARY") or Path(__file__).parent / "lib" / "libwarpdecode.so")
    try:
        library = ffi.dlopen(str(path))
    except OSError as error:
        raise ImportError(f"warpdecode: cannot load {path}: {error}; reinstall the package") from error
    expected = f"{library.WD_VERSION_MAJOR}.{library.WD_VERSION_MINOR}.{library.WD_VERSION_PATCH}"
    found = ffi.string(library.wd_version()).decode()
    if found != expected:
        raise ImportError(
            f"warpdecode: {path} is version {found}, but this package was built against the header of {expected}; "
            "reinstall the package, or point WARPDECODE_LIBRARY at a library of that version"
        )
    return library


lib = _load()

# One object per status, so that the hot path compares with an int it already has.
OK = lib.WD_OK
_VALUE_ERRORS = (lib.WD_INVALID_ARGUMENT, lib.WD_UNSUPPORTED)


def last_error() -> str:
    """This thread's last sentence from the library."""
    return ffi.string(lib.wd_last_error()).decode(errors="replace")


def check(status: int) -> None:
    """Raises for a failed status, with the library's sentence: ValueError for arguments, RuntimeError for CUDA."""
    if status == OK:
        return
    if status == lib.WD_OUT_OF_MEMORY:
        raise MemoryError(last_error())
    raise (ValueError if status in _VALUE_ERRORS else RuntimeError)(last_error())


def new_struct(name: str):
    """A zeroed struct of the C header whose first field is its own size."""
    struct = ffi.new(f"{name} *")
    struct.struct_size = ffi.sizeof(name)
    return struct
