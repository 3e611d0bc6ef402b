"""The machine: which device, how many threads, the memory allocator, and the record of all of it."""

import ctypes
import gc
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from dynaconv.errors import UserError


def pick_device(wanted: str) -> torch.device:
    """Returns the device for "auto" (CUDA, else MPS, else CPU) or the one named.

    Raises:
        UserError: the named device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return torch.device(next(name for name, present in there.items() if present))
    if not there[wanted]:
        raise UserError(f"--device {wanted} is not there on this machine; leave it out to take what is.")
    return torch.device(wanted)


def pick_precision(wanted: str, device: torch.device, say: Callable[[str], None]) -> torch.dtype:
    """Returns the number format for "auto" (bfloat16 where the device is faster in it) or the one named.

    A device that lacks bfloat16 falls back to float32 and says so.
    """
    fast = has_fast_bfloat16(device)
    if wanted == "bfloat16" and not fast:
        say(f"--precision bfloat16 would be slower on {device} of this machine, which lacks it: float32 is taken.")
    return torch.bfloat16 if fast and wanted != "float32" else torch.float32


def has_fast_bfloat16(device: torch.device) -> bool:
    """Tells whether the device has instructions for bfloat16; torch imitates them where they are missing, slowly."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch that is taken
        return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def computing_in(precision: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which convolutions and matrix products run in `precision`.

    A whole training may stand inside it: the casts of parameters are not kept. Torch would otherwise keep the first for
    as long as the context lasts, and no update would ever reach the network.
    """
    return torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)


def use_threads(wanted: int) -> int:
    """Sets torch's CPU threads; 0 takes one per core that this process may use. Returns the number set."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(wanted or cores)
    return torch.get_num_threads()


def use_deterministic(wanted: bool) -> None:
    """Makes torch take only algorithms that give the same bits every time, or no longer.

    Torch raises a RuntimeError where an operation has none.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
    if wanted != torch.are_deterministic_algorithms_enabled():  # setting it loads torch's compiler: seconds
        torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted and torch.backends.cudnn.benchmark
    # Filling memory that is overwritten anyway would cost time and change no bit.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def keep_freed_memory() -> bool:
    """Makes glibc keep freed buffers instead of returning them to the system. Returns whether it could be set.

    By default every large tensor is given back when freed and faulted in again page by page in the next step: a third
    of the CPU time of a training step. Does nothing where the C library is not glibc.
    """
    # Names of the parameters in glibc's malloc.h. Every buffer comes from the heap, and the heap is never cut back: a
    # threshold, however large, is passed by the sum of what one step frees.
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    settings = {mmap_max: 0, trim_threshold: -1, top_pad: 64 * 2**20}
    taken = [mallopt(name, value) for name, value in settings.items()]  # all of them, whatever becomes of the first
    return all(taken)


@contextmanager
def young_garbage_alone() -> Generator[None]:
    """Has Python look for garbage only among what is made from here on; what was there before waits.

    A training step makes enough objects to have Python go through all there are, torch's own among them, every few
    steps: by samples some 5 ms of a step of 150. Garbage of before is freed first, lest it be held while this lasts.
    """
    if gc.get_freeze_count():  # by the program around this, whose choice it stays
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_memory_bytes() -> int | None:
    """Returns the largest resident memory of this process so far, in bytes; None on Windows, which does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_environment(device: torch.device, precision: torch.dtype = torch.float32) -> dict[str, Any]:
    """Returns what a run should be repeatable from: versions, device, threads, precision, commit, command line."""
    packages = ("dynaconv", "torch", "numpy", "pillow", "pyarrow", "scikit-learn", "matplotlib", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in packages},
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "commit": _commit(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with "-dirty" behind it if it was changed since."""
    folder = Path(__file__).parent
    try:
        tracked = subprocess.run(
            ["git", "-C", folder, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10
        )
        if tracked.returncode:
            return None  # installed inside some other project's checkout, whose commit says nothing about this package
        described = subprocess.run(
            ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
