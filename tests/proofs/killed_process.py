"""Forked processes that are killed: at one of their system calls, by ptrace(2), or at any time."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import traceback
from collections.abc import Callable

# <sys/ptrace.h>; registers by their offsets in x86-64's struct user.
_TRACE_ME, _PEEK_USER, _POKE_USER, _SYSCALL, _SET_OPTIONS = 0, 3, 6, 24, 0x4200
_CALL, _THIRD_ARGUMENT = 15 * 8, 12 * 8
_MARKED_STOPS, _END_WITH_PARENT = 0x1, 0x100000
_WRITES = {1, 18}  # write, pwrite64

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long]


def _ptrace(request: int, process: int = 0, address: int = 0, value: int = 0) -> int:
    ctypes.set_errno(0)
    result = _libc.ptrace(request, process, address, value)
    if result == -1 and (error := ctypes.get_errno()):
        raise OSError(error, f"ptrace: {os.strerror(error)}")
    return result


def forked(action: Callable[[], None]) -> int:
    """The id of a process that does the action and ends with 0, or with 1 where it raised."""
    process = os.fork()
    if process == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return process


def killed_at(call: int, action: Callable[[], None]) -> bool:
    """Does the action in a process that is killed at its system call number `call`, from 1 on.

    The call is not made, but half of one that writes is. False where the action ended before.

    Raises:
        RuntimeError: the action raised. NotImplementedError: the machine is not x86-64.
    """
    if platform.machine() != "x86_64":
        raise NotImplementedError(f"killed_at: wants x86-64, got {platform.machine()}")

    def traced() -> None:
        _ptrace(_TRACE_ME)
        os.kill(os.getpid(), signal.SIGSTOP)
        action()

    process = forked(traced)
    os.waitpid(process, 0)
    _ptrace(_SET_OPTIONS, process, 0, _MARKED_STOPS | _END_WITH_PARENT)
    if not _reach(process, 2 * call - 1):  # a stop before each call and one after it
        return False
    if _ptrace(_PEEK_USER, process, _CALL) in _WRITES:
        size = _ptrace(_PEEK_USER, process, _THIRD_ARGUMENT)
        _ptrace(_POKE_USER, process, _THIRD_ARGUMENT, size // 2)
        _reach(process, 1)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return True


def _reach(process: int, stops: int) -> bool:
    """Lets it run for so many stops; False where it ended."""
    passed_on = 0
    while stops:
        _ptrace(_SYSCALL, process, 0, passed_on)
        status = os.waitpid(process, 0)[1]
        if not os.WIFSTOPPED(status):
            if status:
                raise RuntimeError(f"killed_at: the action ended with status {status}")
            return False
        at_call = os.WSTOPSIG(status) == signal.SIGTRAP | 0x80
        passed_on = 0 if at_call else os.WSTOPSIG(status)
        stops -= at_call
    return True
