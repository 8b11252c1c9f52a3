"""Writes warpdecode/_abi.py, cffi's description of the public C header, at build time.

The header is the only place where the ABI is written down: the C compiler's preprocessor turns it, DLPack's header
included, into plain declarations, which cffi compiles into a module that needs neither a compiler nor a parser later.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import cffi


def declarations(compiler: str, header: str, include: str) -> str:
    """The preprocessed declarations of `header`, without those of the C library's headers.

    cffi knows the types of stdint.h and stddef.h, and cannot parse how a C library defines them: empty files take
    their place.
    """
    with tempfile.TemporaryDirectory() as empty:
        for name in ("stdint.h", "stddef.h", "stdbool.h"):
            (Path(empty) / name).touch()
        command = [compiler, "-E", "-P", "-nostdinc", "-U__GNUC__", "-I", empty, "-I", include, header]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Command line of the build."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("compiler", "header", "include", "output"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    ffi = cffi.FFI()
    ffi.cdef(declarations(args.compiler, args.header, args.include))
    ffi.set_source("warpdecode._abi", None)  # ABI mode: no compiled extension, one wheel for every Python
    ffi.emit_python_code(args.output)


if __name__ == "__main__":
    main()
