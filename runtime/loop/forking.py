"""Safe use of `os.fork`: a child process neither uses nor destroys what its parent opened.

Threads do not exist in a forked child, so a library's session with threads of its own would wait for them for
ever when it is destroyed. In a child these objects are therefore kept alive until the process ends, and the
child ends without the exit handlers of C libraries, some of which (ONNX Runtime's) wait in the same way.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Callable
from typing import Any

_hooks: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_leave_at_once = False


def call_in_child(owner: Any, method: str) -> None:
    """Call `getattr(owner, method)()` in every child that this process forks, as long as `owner` lives."""
    _hooks[owner] = method


def keep_for_ever(value: Any) -> None:
    """Never destroy an object, nor anything that it refers to."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def skip_exit_handlers() -> None:
    """Make this process end without the exit handlers that C libraries registered before; Linux only.

    Python's own handlers (`atexit`, flushing of its streams) run as usual, and the exit code is the same.
    """
    global _leave_at_once
    if _leave_at_once:
        return
    with contextlib.suppress(AttributeError, OSError):  # the C library has no `on_exit`
        library = ctypes.CDLL(None)
        library.on_exit(library._exit, None)  # handlers are called in reverse order, with the exit code
        _leave_at_once = True


def _in_child() -> None:
    calls: list[Callable[[], None]] = [getattr(owner, method) for owner, method in list(_hooks.items())]
    for call in calls:
        call()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
