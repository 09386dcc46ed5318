"""The limits a grading worker puts on itself before it sees a model's text: memory, no network, no processes, no files.

On Linux the kernel keeps memory and file size (rlimits), and on x86-64 and AArch64 sockets, exec and signals to others
(seccomp), whatever the graded code does. A Python audit hook says the same in words, refuses more, and is all there is
elsewhere: it stops what goes through Python's own functions, not C code. Reading files is allowed: imports need it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

REFUSED = (  # prefixes of audit events, https://docs.python.org/3/library/audit_events.html
    "socket.",
    "subprocess.",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "os.system",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "shutil.",
    "pty.",
    "resource.setrlimit",
    "signal.pthread_kill",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
# Per machine: its audit number, then socket, connect, execve, execveat, io_uring_setup, ptrace, kill.
CALLS = {
    "x86_64": (0xC000003E, (41, 42, 59, 322, 425, 101, 62)),
    "aarch64": (0xC00000B7, (198, 203, 221, 281, 425, 117, 129)),
}


def die_with(parent: int) -> None:
    """End this process with its parent, also if that is killed (Linux; elsewhere a closed pipe ends it)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before we asked
        os._exit(1)


def restrict(memory: int) -> None:
    """From here on: at most `memory` bytes more than now, and nothing that `REFUSED` names. It cannot be undone."""
    _limit(resource.RLIMIT_AS, _pages(0) + memory)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _filter_calls()
    sys.addaudithook(_audit)


def resident() -> int:
    """Bytes of memory this process holds; 0 where the system does not say."""
    return _pages(1)


def _limit(what: int, value: int) -> None:
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    if sys.platform == "linux":
        resource.setrlimit(what, (value, value))
        return
    try:
        resource.setrlimit(what, (value, value))
    except (ValueError, OSError):  # macOS has no limit on address space
        return


def _pages(field: int) -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[field]) * resource.getpagesize() if statm.exists() else 1 << 40


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(REFUSED) or (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
        raise PermissionError(f"a grading worker has no network, starts no process and writes no file: {event}")


def _filter_calls() -> bool:
    """Have the kernel refuse `CALLS` with EPERM; False where it cannot."""
    if sys.platform != "linux" or platform.machine() not in CALLS:
        return False
    architecture, calls = CALLS[platform.machine()]
    load, equal, at_least, leave = 0x20, 0x15, 0x35, 0x06
    refuse, allow = 0x00050000 | errno.EPERM, 0x7FFF0000
    last = len(calls) + 1
    program = [
        (load, 0, 0, 4),  # the architecture
        (equal, 0, last + 2, architecture),
        (load, 0, 0, 0),  # the call's number
        (at_least, last, 0, 0x40000000),  # x86-64's second numbering
        *((equal, last - 1 - i, 0, number) for i, number in enumerate(calls)),
        (leave, 0, 0, allow),
        (leave, 0, 0, refuse),
    ]
    packed = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HxxxxxxP" if struct.calcsize("P") == 8 else "HxxP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    return (
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header), 0, 0) == 0
    )
