"""Reading local variables of callers, without leaving anything behind in their frames."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

# Of a snapshot that is only looked at here: by its frame, by a variable, and as the argument of `getrefcount`.
OWN_REFERENCES = 3


def local_variables(frame: FrameType, names: Iterable[str]) -> dict[str, Any]:
    """Those of the named local variables of a frame that are set.

    Before Python 3.13 `f_locals` of a function's frame is a snapshot, a dictionary that the frame keeps: what it holds
    would live until the function returns, even if the function deletes its own variable. So the snapshot is emptied.
    It stays as it is where it is not ours alone: if somebody has it from `locals()`, or while a debugger or profiler is
    on, after whose calls Python writes snapshots back into the variables.
    """
    snapshot = frame.f_locals
    found = {name: snapshot[name] for name in names if name in snapshot}
    code = frame.f_code
    if (
        sys.version_info < (3, 13)
        and code.co_flags & inspect.CO_OPTIMIZED  # else these are no copies: the variables of a module or of a class
        and sys.getrefcount(snapshot) == OWN_REFERENCES
        and sys.gettrace() is None
        and sys.getprofile() is None
    ):
        # What `exec` has put there beside the function's own variables is nowhere else.
        for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            snapshot.pop(name, None)
    return found
