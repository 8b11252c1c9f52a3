"""How the benchmark's commands end when it is nobody's mistake in the code: in a sentence."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

_EXTRAS = {"torch": "hf", "transformers": "hf", "matplotlib": "notebook"}


def command(name: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """For a command's main(), which returns its exit code: Ctrl-C is 130, a package that is not installed is 1.

    What a command imports at the top of its own file is not covered: it imports such packages in main().
    """

    def decorated(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args, **options) -> int:
            try:
                return main(*args, **options)
            except KeyboardInterrupt:
                print("Interrupted.", file=sys.stderr)
                return 130
            except ImportError as error:
                missing = _missing(error)
                if missing not in _EXTRAS:
                    raise
                print(f"{name}: needs {missing}; pip install 'warpdecode[{_EXTRAS[missing]}]'", file=sys.stderr)
                return 1

        return run

    return decorated


def _missing(error: BaseException | None) -> str | None:
    """The package that is not there. warpdecode.hf raises an ImportError of its own from the one that says so."""
    while error is not None and not isinstance(error, ModuleNotFoundError):
        error = error.__cause__
    return error and error.name
