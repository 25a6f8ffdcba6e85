"""Functions that XLA programs call on a CPU, written in Python and compiled by numba.

XLA passes a `XLA_FFI_CallFrame` (`xla/ffi/api/c_api.h`, which jaxlib ships; a stable interface). It
is made of 8-byte words, and of pointers to more of them, that are read here by their offsets. The
functions marked `compiled` are for compiled code: what is given to `register`, and what that calls.

numba keeps the machine code in files (`numba.cfunc` with `cache`), so that only a first process
waits for it. It must not contain an address, which other processes would not share: functions of C
are called by name. Nor may it be compiled with `fastmath`: the process that compiles it may call
other copies of its functions than one that loads it, and only strict arithmetic gives the same bits
in all of them.
"""

import ctypes
import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import jax
import numpy as np
from llvmlite import ir
from llvmlite.binding import add_symbol
from numba import carray, cfunc, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import get_cython_function_address, intrinsic
from threadpoolctl import ThreadpoolController

# Version of the interface that the offsets below belong to.
_MAJOR, _MINOR = 0, 3
BFLOAT16 = 16  # XLA_FFI_DataType

_INT64 = ir.IntType(64)

# For functions that only compiled code calls; wrappers for Python would take as long to compile.
compiled = njit(no_cpython_wrapper=True, no_cfunc_wrapper=True)


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def _add_atomically(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the word at an address, and return what it was before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", word, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def _address_of(typing: Any, symbol: Any) -> Any:
    """The address of a function `void (int64)` that `add_symbol` made known under this name."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_INT64])
        function = get_or_insert_function(builder.module, kind, symbol.literal_value)
        return builder.ptrtoint(function, _INT64)

    return types.int64(symbol), generate


@intrinsic
def _call(typing: Any, function: Any, argument: Any) -> Any:
    """Call the C function at an address, of one pointer, that returns one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_INT64, [_INT64])
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])

    return types.int64(types.int64, types.int64), generate


@compiled
def view(address: int, size: int, dtype: Any) -> Any:
    """The `size` numbers that lie at an address."""
    return carray(_pointer(address), size, dtype)


@compiled
def _word(address: int) -> int:
    return view(address, 1, np.int64)[0]


@compiled
def clear(address: int, size: int) -> None:
    """Set a number of bytes to 0."""
    # Loops over single numbers compile several times faster than array expressions.
    numbers = view(address, size, np.uint8)
    for i in range(size):
        numbers[i] = 0


class Buffer(NamedTuple):
    """An operand or a result: address of its numbers, their type, and address of its shape."""

    address: int
    dtype: int
    dims: int


@compiled
def _buffer(address: int) -> Buffer:
    dtype = int(view(address + 16, 1, np.int32)[0])
    return Buffer(_word(address + 24), dtype, _word(address + 40))


@compiled
def operand(frame: int, index: int) -> Buffer:
    """An operand of the call."""
    return _buffer(_word(_word(frame + 72) + 8 * index))


@compiled
def result(frame: int, index: int) -> Buffer:
    """A result of the call, to be written."""
    return _buffer(_word(_word(frame + 112) + 8 * index))


@compiled
def extent(buffer: Buffer, axis: int) -> int:
    """Length of an axis."""
    return _word(buffer.dims + 8 * axis)


@compiled
def integer(buffer: Buffer, index: int) -> int:
    """A number of an int32 operand."""
    return int(view(buffer.address, index + 1, np.int32)[index])


@compiled
def address_of(array: np.ndarray) -> int:
    """Where an array's numbers lie. See `keep`."""
    return int(np.int64(array.ctypes.data))


@compiled
def keep(*arrays: np.ndarray) -> None:
    """Mark the last use of arrays that were passed on by address; numba frees them after it."""


class Matrix(NamedTuple):
    """Float32 rows: address of the first one, and how many numbers lie between two beginnings."""

    address: int
    stride: int


add_symbol("esft_jax_sgemm", get_cython_function_address("scipy.linalg.cython_blas", "sgemm"))
_sgemm = types.ExternalFunction("esft_jax_sgemm", types.void(*[types.voidptr] * 13))


@compiled
def multiply_matrices(
    a: Matrix,
    b: Matrix,
    out: Matrix,
    m: int,
    n: int,
    k: int,
    a_turned: bool,
    b_turned: bool,
    factor: float = 1,
    before: float = 0,
) -> None:
    """`out [m, n] = factor * a [m, k] @ b [k, n] + before * out`, by scipy's BLAS, in this thread.

    Turned ones lie as `[k, m]` and `[n, k]`.
    """
    # BLAS counts columns first. It takes everything by address.
    letters, lengths, scales = np.empty(2, np.uint8), np.empty(6, np.int32), np.empty(2, np.float32)
    letters[0], letters[1] = (84 if b_turned else 78), (84 if a_turned else 78)
    lengths[0], lengths[1], lengths[2] = n, m, k
    lengths[3], lengths[4], lengths[5] = b.stride, a.stride, out.stride
    scales[0], scales[1] = factor, before
    letter, length, scale = address_of(letters), address_of(lengths), address_of(scales)
    _sgemm(
        _pointer(letter),
        _pointer(letter + 1),
        _pointer(length),
        _pointer(length + 4),
        _pointer(length + 8),
        _pointer(scale),
        _pointer(b.address),
        _pointer(length + 12),
        _pointer(a.address),
        _pointer(length + 16),
        _pointer(scale + 4),
        _pointer(out.address),
        _pointer(length + 20),
    )
    keep(letters, lengths, scales)


_malloc = types.ExternalFunction("malloc", types.int64(types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))
_sched_yield = types.ExternalFunction("sched_yield", types.int32())

# Words that the threads of a call share.
_NEXT, _DONE, _USERS, _TASKS, _FRAME = 0, 8, 16, 24, 32


# What `_helper` and `_handler` are compiled with: two functions of `register`, and a symbol.
tasks: Callable[[int], int]
run: Callable[[int, int], None]
HELPER: str


@compiled
def _leave(shared: int) -> None:
    # A thread may come when all is done; whoever leaves last frees what they share.
    if _add_atomically(shared + _USERS, -1) == 1:
        _free(shared)


def _helper(shared: int) -> None:
    """What another thread does for a call."""
    count = _word(shared + _TASKS)
    index = _add_atomically(shared + _NEXT, 1)
    while index < count:
        run(_word(shared + _FRAME), index)
        _add_atomically(shared + _DONE, 1)
        index = _add_atomically(shared + _NEXT, 1)
    _leave(shared)


def _handler(frame: int) -> int:
    """What XLA calls."""
    extension = _word(frame + 8)
    if extension != 0 and view(extension + 8, 1, np.int32)[0] == 1:
        # Not a call: XLA asks for the version of the interface.
        version = view(_word(extension + 24) + 24, 2, np.int32)
        version[0], version[1] = _MAJOR, _MINOR
        return 0
    api, context = _word(frame + 16), _word(frame + 24)
    threads, asked = np.ones(1, np.int64), np.empty(4, np.int64)
    scheduled = np.empty(5, np.int64)
    asked[0], asked[1], asked[2], asked[3] = 32, 0, context, address_of(threads)
    _call(_word(api + 144), address_of(asked))  # XLA_FFI_ThreadPool_NumThreads
    count = tasks(frame)
    helpers = max(min(threads[0], count) - 1, 0)
    shared = _malloc(40)
    words = view(shared, 5, np.int64)
    # This thread is two users: it helps too, and then waits for the others.
    words[0], words[1], words[2], words[3], words[4] = 0, 0, helpers + 2, count, frame
    help_address = _address_of(HELPER)
    scheduled[0], scheduled[1], scheduled[2] = 40, 0, context
    scheduled[3], scheduled[4] = help_address, shared
    for _ in range(helpers):
        _call(_word(api + 136), address_of(scheduled))  # XLA_FFI_ThreadPool_Schedule
    _call(help_address, shared)
    while _add_atomically(shared + _DONE, 0) < count:
        _sched_yield()  # another thread is at its last task
    _leave(shared)
    keep(threads, asked, scheduled)
    return 0  # no error


def register(name: str, tasks: Callable[[int], int], run: Callable[[int, int], None]) -> None:
    """Make a function available to `jax.ffi.ffi_call` under this name.

    Its tasks run on the threads of XLA, in any order and at the same time.

    Args:
        name: of the target; what is registered already stays.
        tasks: `tasks(frame)`, how many there are.
        run: `run(frame, index)` does one of them. Both are made by `compiled`.
    """
    if name in _registered:
        return
    module = sys.modules[run.__module__]
    names = {"tasks": tasks, "run": run, "HELPER": f"{name}_helper"}
    helper = _compile(_helper, types.void(types.int64), name, names, module)
    add_symbol(f"{name}_helper", helper.address)
    handler = _compile(_handler, types.int64(types.int64), name, names, module)
    _keep_blas_to_one_thread()
    new_capsule = ctypes.pythonapi.PyCapsule_New
    new_capsule.restype = ctypes.py_object
    new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    jax.ffi.register_ffi_target(name, new_capsule(handler.address, None, None), platform="cpu")
    _registered[name] = (helper, handler)


def _compile(template: Any, signature: Any, name: str, names: dict[str, Any], module: Any) -> Any:
    """A template compiled with these names; loaded, if an earlier process has compiled it."""
    # numba tells kept code apart by the function's name, and does not see what it calls.
    source = inspect.getsource(sys.modules[__name__]) + inspect.getsource(module)
    function = FunctionType(template.__code__, globals() | names)
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    function.__qualname__ = f"{name}{template.__name__}_{digest}"
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:  # no folder to keep it in
        return cfunc(signature)(function)


_registered: dict[str, Any] = {}  # compiled functions must live as long as XLA may call them


def _keep_blas_to_one_thread() -> None:
    """Tasks are what runs side by side. Threads of scipy's BLAS (not numpy's) would come on top,
    and take cores from XLA while they wait for work.
    """
    for library in _blas_of_scipy():
        library.set_num_threads(1)


def _blas_of_scipy() -> list[Any]:
    """What is loaded of it; nothing where scipy brings none of its own."""
    return [
        library
        for library in ThreadpoolController().lib_controllers
        if {"scipy", "scipy.libs"} & set(Path(library.filepath).parts)
    ]
