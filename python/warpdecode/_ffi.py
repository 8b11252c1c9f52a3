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
    given = os.environ.get("WARPDECODE_LIBRARY")
    path = Path(given or Path(__file__).parent / "lib" / "libwarpdecode.so")
    try:
        library = ffi.dlopen(str(path))
    except OSError as error:
        remedy = "set WARPDECODE_LIBRARY to a library, or unset it" if given else "reinstall the package"
        raise ImportError(f"warpdecode: cannot load {path}: {error}; {remedy}") from error
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


# Words of the C interface in its sentences, and what Python's callers have in their place.
WORDS = {
    "output: ": "out: ",
    "expected NULL": "expected None",
    "with no_gate": "with has_gate=False",
    "a name that wd_get_kernel_info lists": "a name that warpdecode.kernels() lists",
    "use wd_moe_forward": "call the Experts",
}


def check(status: int, words: dict[str, str] = WORDS) -> None:
    """Raises for a failed status, with the library's sentence: ValueError for arguments, RuntimeError for CUDA.

    words: what the sentence says for what the caller calls otherwise.
    """
    if status == OK:
        return
    sentence = last_error()
    for word, known_as in words.items():
        sentence = sentence.replace(word, known_as)
    if status == lib.WD_OUT_OF_MEMORY:
        raise MemoryError(sentence)
    raise (ValueError if status in _VALUE_ERRORS else RuntimeError)(sentence)


def new_struct(name: str):
    """A zeroed struct of the C header whose first field is its own size."""
    struct = ffi.new(f"{name} *")
    struct.struct_size = ffi.sizeof(name)
    return struct
