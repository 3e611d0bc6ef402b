"""Convolutions and transforms in C for processors with AVX-512 and bfloat16: built once by the machine's own compiler.

There is nothing to install. Where the processor lacks the instructions, or the machine a compiler, `library` returns
None and torch's functions are taken instead: the same results but for what bfloat16 rounds (by Winograd's algorithm,
1.2% of a result's norm instead of 0.2%); the convolutions, with what lies around them, are two to three times as slow,
the transforms eight times, mirrored and shifted copies three. With matrix tiles (AMX) the convolutions are others than
without (docs/decisions/0014-matrix-tiles.md).
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from dynaconv.folders import cache_folder

SOURCES = (
    *("direct.c", "direct_gradients.c", "direct_mix.c", "direct_mix_gradients.c", "direct_single.c", "precise.c"),
    *("tile2.c", "tile3.c", "tile4.c", "products.c"),
    *("maps.c", "normalize.c", "shift.c", "stem.c", "transforms.c"),
)
HEADERS = (
    *("matrix.h", "pack.h", "windows.h", "places.h", "finish.h", "maps.h", "activation.h"),
    *("winograd.h", "mix.h", "gradients.h", "products.h"),
)
TILES = (2, 3, 4)
"""Sides of the tiles of outputs that the convolution is compiled for."""
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
BUILD_SECONDS = 120
"""A build takes seconds; one that hangs must not hold up a training for ever."""

_NOT_BUILT = "these could not be built"


class Shape(ctypes.Structure):
    """The sizes of one convolution: the struct of `maps.h`."""

    _fields_ = [(name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "outputs", "kernels")]


class Stem(ctypes.Structure):
    """The sizes of one whitening stem and the images that it reads: the struct of `stem.c`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "channels", "height", "width", "side", "step")),
        ("strides", ctypes.c_int64 * 4),
    ]


class Transforms(ctypes.Structure):
    """The sizes of images and which transforms they go through: the struct of `transforms.c`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("cubic", "fill", "brightness", "contrast", "saturation", "hue")),
    ]


def library() -> ctypes.CDLL | None:
    """Builds the library if this machine has not yet, loads it, and returns it; None where it cannot run."""
    return _outcome()[0]


@lru_cache(maxsize=1)
def has_matrix_tiles() -> bool:
    """Tells whether the library multiplies on the processor's matrix tiles: if it was built for them and may."""
    found = library()
    return found is not None and found.dynaconv_matrix_tiles() == 1


@lru_cache(maxsize=1)
def convolves_directly() -> bool:
    """Tells whether the library computes at least a single image directly: not if it may not use the tiles it knows."""
    found = library()
    return found is not None and found.dynaconv_matrix_tiles() != 0


@lru_cache(maxsize=1)
def leaves_tiles_unused() -> bool:
    """Tells whether the processor has matrix tiles that the compiler did not know: torch's convolutions use them."""
    found = library()
    return found is not None and bool(_capabilities().get("amx_bf16")) and found.dynaconv_matrix_tiles() == -1


def is_built() -> bool:
    """Tells whether the library was built on this machine before; builds nothing."""
    return bool(_outcome.cache_info().currsize) or _was_built()


@lru_cache(maxsize=1)
def _was_built() -> bool:
    try:
        return (_folder() / _file_name()).exists()
    except (OSError, RuntimeError, ValueError):
        return False


def why_not() -> str | None:
    """Tells why there is no library here, as the end of a sentence; None where there is one."""
    return _outcome()[1]


def advice(convolutions: bool) -> str | None:
    """Tells the user what could be mended, where the library would run here but could not be built as it should.

    Args:
        convolutions: Whether it is wanted for convolutions, and not for transforms alone.
    """
    if convolutions and leaves_tiles_unused():
        return (
            "Training goes through torch's own convolutions, at half the speed of dynaconv's, which were built without "
            "the processor's matrix tiles (AMX): the C compiler does not know them, or was told to leave them out. "
            "Name another one in CC, such as gcc 12."
        )
    reason = why_not()
    if reason is None or not reason.startswith(_NOT_BUILT):
        return None
    return (
        f"Training goes through torch's own functions, about half as fast as dynaconv's: {reason}. To have these "
        "built, install a C compiler with OpenMP, such as gcc, or name one in CC."
    )


def _capabilities() -> dict[str, Any]:
    return getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch that is taken


@lru_cache(maxsize=1)
def _outcome() -> tuple[ctypes.CDLL | None, str | None]:
    if not _capabilities().get("avx512_bf16", False):
        return None, "the processor has no AVX-512 with bfloat16"
    if os.environ.get("DYNACONV_COMPILED") == "0":
        return None, "DYNACONV_COMPILED=0 is set"
    try:
        path = _built()
        try:
            return _load(path), None
        except (OSError, AttributeError):  # a file that was cut off, by a full disk for one
            path.unlink(missing_ok=True)  # another process may have found it, too
            return _load(_built()), None
    # Without a home folder pathlib raises RuntimeError, and an open quote in CC is a ValueError.
    except (OSError, AttributeError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return None, f"{_NOT_BUILT} ({_last_line(error)})"


def _built() -> Path:
    """Returns the shared library for this processor and these sources, from the cache or built into it.

    Raises:
        OSError: no compiler, or a cache that cannot be written, or that others can.
        subprocess.SubprocessError: the compiler refused, or took longer than BUILD_SECONDS.
    """
    compiler, target = _compiler(), _private_folder() / _file_name()
    if not target.exists():
        here = Path(__file__).parent
        # Into a name of its own first: another process may be building, or loading, the same one.
        with (
            tempfile.TemporaryDirectory(dir=target.parent) as directory,
            ThreadPoolExecutor(torch.get_num_threads()) as pool,
        ):
            made, until = Path(directory) / target.name, time.monotonic() + BUILD_SECONDS
            objects = [str(Path(directory) / f"{name}.o") for name in SOURCES]
            steps = [["-c", str(here / name), "-o", each] for name, each in zip(SOURCES, objects, strict=True)]
            list(pool.map(partial(_compile, compiler, until), steps))
            _compile(compiler, until, ["-shared", *objects, "-o", str(made)])
            made.replace(target)
    return target


def _compile(compiler: list[str], until: float, arguments: list[str]) -> None:
    left = until - time.monotonic()
    subprocess.run([*compiler, *FLAGS, *arguments], capture_output=True, timeout=left, check=True)


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    shape = ctypes.POINTER(Shape)
    for tile in TILES:
        transform = getattr(loaded, f"dynaconv_transform_kernels{tile}")
        transform.argtypes, transform.restype = [pointer, pointer, shape, ctypes.c_int, pointer, threads], None
        getattr(loaded, f"dynaconv_mix{tile}").argtypes = [*[pointer] * 6, number, *[pointer] * 4, shape, threads]
        gradients = getattr(loaded, f"dynaconv_mix_gradients{tile}")
        gradients.argtypes = [*[pointer] * 6, shape, *[pointer] * 3, threads]
    loaded.dynaconv_direct_single.argtypes = [*[pointer] * 5, number, *[pointer] * 2, shape, threads]
    if hasattr(loaded, "dynaconv_direct"):  # built for a processor with matrix tiles
        loaded.dynaconv_pack_kernel.argtypes = [pointer, number, shape, ctypes.c_int, pointer, threads]
        loaded.dynaconv_pack_kernel.restype = None
        loaded.dynaconv_direct.argtypes = [
            *[pointer] * 3, number, *[pointer] * 2, number, *[pointer] * 4, shape, threads,
        ]  # fmt: skip
        loaded.dynaconv_precise.argtypes = [
            *[pointer] * 3, number, *[pointer] * 2, number, threads, *[pointer] * 2, threads, pointer, shape, threads,
        ]  # fmt: skip
        loaded.dynaconv_pack_kernels.argtypes = [pointer, pointer, shape, ctypes.c_int, pointer, threads]
        loaded.dynaconv_pack_kernels.restype = None
        loaded.dynaconv_direct_mix.argtypes = [*[pointer] * 5, number, *[pointer] * 2, shape, threads]
        loaded.dynaconv_direct_mix_gradients.argtypes = [*[pointer] * 6, shape, *[pointer] * 2, threads]
        loaded.dynaconv_direct_gradients.argtypes = [*[pointer] * 4, number, shape, pointer, threads]
    loaded.dynaconv_unpool.argtypes = [*[pointer] * 3, shape, threads]
    loaded.dynaconv_unpool.restype = None
    loaded.dynaconv_mix_once.argtypes = [pointer, pointer, number, number, threads, pointer, threads]
    loaded.dynaconv_mix_once.restype = None
    loaded.dynaconv_moments.argtypes = [pointer, number, number, pointer, pointer, threads]
    loaded.dynaconv_normalize.argtypes = [
        pointer, *[number] * 3, *[pointer] * 3, threads, *[pointer] * 2, threads,
    ]  # fmt: skip
    loaded.dynaconv_normalize.restype = None
    loaded.dynaconv_normalize_gradients.argtypes = [
        *[pointer] * 3, *[number] * 3, *[pointer] * 4, threads, *[pointer] * 2, threads,
    ]  # fmt: skip
    loaded.dynaconv_whiten.argtypes = [
        pointer, ctypes.POINTER(Stem), pointer, number, threads, *[pointer] * 2, threads,
    ]  # fmt: skip
    loaded.dynaconv_whiten.restype = None
    loaded.dynaconv_transform.argtypes = [pointer, ctypes.POINTER(Transforms), *[pointer] * 4, threads]
    loaded.dynaconv_transform.restype = None
    loaded.dynaconv_shift.argtypes = [pointer, *[number] * 4, *[pointer] * 3, threads]
    loaded.dynaconv_shift.restype = None
    return loaded


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]


def _file_name() -> str:
    """Returns the library's name, another one for other sources, another processor or another compiler."""
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in (*SOURCES, *HEADERS)]
    parts += [_processor(), " ".join([*_compiler(), *FLAGS]).encode()]
    return f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0


def _folder() -> Path:
    return cache_folder() / f"native-{_user()}"


def _private_folder() -> Path:
    """Returns the folder of this user's libraries in the cache, which several users may share; makes it if need be.

    Raises:
        OSError: it cannot be made, or another user could put a library there, which would then run as this one.
    """
    folder = _folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != _user() or facts.st_mode & 0o022 or not stat.S_ISDIR(facts.st_mode):
        raise PermissionError(f"{folder} is open to other users")
    return folder


def _processor() -> bytes:
    """What `-march=native` depends on: a cache may be shared by machines of several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return b"\n".join(sorted({line for line in lines if line.startswith((b"flags", b"model name"))}))


def _last_line(error: Exception) -> str:
    told = getattr(error, "stderr", None) or str(error).encode()
    return (told.decode(errors="replace").strip().splitlines() or [type(error).__name__])[-1]


def addresses(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Returns the addresses of tensors as an array of pointers; it does not keep the tensors."""
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Returns an array of 64-bit integers."""
    return (ctypes.c_int64 * len(values))(*values)
