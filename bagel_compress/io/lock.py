"""Lock files, so that only one process at a time writes to a folder. A lock of a dead process of this machine is
replaced.

The lock file is created together with its content, so that a killed process cannot leave an empty one.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from bagel.json_file import small_bytes
from bagel_compress.errors import BagelCompressError


def take_lock(path: Path, what: str, error: type[BagelCompressError]) -> None:
    """Takes the lock. Raises `error` if a running process holds it; `what` is a verb as in "is being built"."""
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
    for _ in range(2):
        if _created(path, mine):
            return
        remove_if_stale(path, what, error)
    raise error(f"{path.parent.parent} was just locked by another process; run the command again later.")


def _created(path: Path, content: str) -> bool:
    own = path.with_name(f"{path.name}.{os.getpid()}")
    own.write_text(content)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _created_in_place(path, content)
    finally:
        own.unlink()
    return True


def _created_in_place(path: Path, content: str) -> bool:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(content)
    return True


def remove_if_stale(path: Path, what: str, error: type[BagelCompressError]) -> None:
    """Removes the lock of a dead process of this machine. Raises `error` if it is held or cannot be read."""
    try:
        content = small_bytes(path)
        holder = json.loads(content)
        pid, host, started = int(holder["pid"]), str(holder["host"]), str(holder["started"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        raise error(
            f"{path.parent.parent} is locked, and {path} does not name a process; delete it if no process uses the"
            " folder."
        ) from None
    if host == socket.gethostname() and not is_alive(pid, started):
        _remove(path, content)
        return
    raise error(
        f"{path.parent.parent} is being {what} by process {pid} on {host}; wait for it, or delete {path} if it is gone."
    )


def _remove(path: Path, stale: bytes) -> None:
    """Removes a lock with this content. A lock that another process has taken meanwhile is put back."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.stale")
    try:
        os.replace(path, aside)
    except FileNotFoundError:  # another process was quicker
        return
    if small_bytes(aside) != stale:
        _created(path, aside.read_text())
    aside.unlink()


def is_alive(pid: int, started: str) -> bool:
    """Whether the process that took the lock still runs; another process that got its number later does not count."""
    if pid <= 0 or (started and _started(pid) != started):
        return False
    if os.name != "posix":
        return _alive_windows(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _alive_windows(pid: int) -> bool:
    """Whether a process runs, by its handle: `os.kill(pid, 0)` would end it on Windows."""
    import ctypes

    still_active, query_limited = 259, 0x1000  # STILL_ACTIVE, PROCESS_QUERY_LIMITED_INFORMATION (winbase.h)
    kernel = ctypes.windll.kernel32  # type: ignore[attr-defined]
    handle = kernel.OpenProcess(query_limited, False, pid)
    if not handle:
        return False
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return code.value == still_active


def _started(pid: int) -> str:
    """Start time of a process in clock ticks (field 22 of /proc/PID/stat); empty where there is no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
