"""The CPU thread pool that the package's calls share."""

from __future__ import annotations

import operator
import os
import threading

from warpdecode._ffi import check, ffi, lib

_MOST = 2**31 - 1  # the C library counts in int32
_lock = threading.Lock()
_pool = None  # a wd_threads *, started by the first CPU call
_count: int | None = None


def _default_count() -> int:
    for variable in ("WARPDECODE_NUM_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "").split(",")[0].strip()
        if text:
            if not text.isdecimal() or not 1 <= int(text) <= _MOST:
                raise ValueError(f"{variable}: was {text!r}, expected a number of threads from 1 to {_MOST}")
            return int(text)
    return len(os.sched_getaffinity(0))


def get_num_threads() -> int:
    """Threads that a call on the CPU shares its work among."""
    global _count  # noqa: PLW0603
    if _count is None:
        _count = _default_count()
    return _count


def set_num_threads(count: int) -> None:
    """Sets the number of CPU threads (1 to 2**31 - 1), for calls from now on. The bits of no output depend on it.

    The default is WARPDECODE_NUM_THREADS, else OMP_NUM_THREADS, else the processors that this process may use.
    """
    global _count, _pool
    try:
        number = 0 if isinstance(count, bool) else operator.index(count)
    except TypeError:
        number = 0
    if not 1 <= number <= _MOST:
        raise ValueError(f"count: was {count!r}, expected a whole number from 1 to {_MOST}")
    with _lock:
        _count, _pool = number, None  # the old pool ends when the last call that uses it lets go


def pool():
    """The shared `wd_threads *`, started when first needed."""
    global _pool  # noqa: PLW0603
    current = _pool
    if current is not None:
        return current
    with _lock:
        if _pool is None:
            place = ffi.new("wd_threads **")
            check(lib.wd_threads_create(get_num_threads(), place))
            _pool = ffi.gc(place[0], lib.wd_threads_destroy)
        return _pool


_abandoned = []


def _after_fork() -> None:
    # The pool's threads do not exist in a child; its memory is left alone (never destroyed), and a new pool starts.
    global _pool, _lock  # noqa: PLW0603
    _lock = threading.Lock()
    if _pool is not None:
        _abandoned.append(ffi.gc(_pool, None))
        _pool = None


os.register_at_fork(after_in_child=_after_fork)
