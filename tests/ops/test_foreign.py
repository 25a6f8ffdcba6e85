"""Foreign functions on CPU: the interface they are written to, and many of them at once."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit
from threadpoolctl import ThreadpoolController

from esft_jax.ops import foreign
from esft_jax.ops.foreign import extent, operand, result, view

TASKS = 40


@njit
def tasks(frame):
    return TASKS


@njit
def fill(frame, index):
    """Each task writes the sum of the operand times its own index."""
    x = operand(frame, 0)
    numbers = view(x.address, extent(x, 0), np.float32)
    view(result(frame, 0).address, TASKS, np.float32)[index] = index * numbers.sum()


def call(x):
    foreign.register("test_fill", tasks, fill)
    return jax.ffi.ffi_call("test_fill", jax.ShapeDtypeStruct((TASKS,), jnp.float32))(x)


def test_every_task_runs_once_however_many_programs_run():
    mesh = jax.sharding.Mesh(jax.devices(), ("d",))
    spec = jax.sharding.PartitionSpec("d")
    many = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jnp.arange(8 * 1000, dtype=jnp.float32) % 7
    expected = np.asarray(x).reshape(8, -1).sum(axis=1)[:, None] * np.arange(TASKS)
    for _ in range(50):
        np.testing.assert_allclose(many(x).reshape(8, TASKS), expected, rtol=1e-6)


def test_the_interface_is_the_one_that_is_written_to():
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    major, minor = (
        int(re.search(rf"define XLA_FFI_API_{n} (\d+)", header)[1]) for n in ("MAJOR", "MINOR")
    )
    # Later minor versions only add to the end of structures.
    assert (major, minor) >= (foreign._MAJOR, foreign._MINOR) and major == foreign._MAJOR
    functions = re.findall(r"  _XLA_FFI_API_STRUCT_FIELD\((\w+)\)", header)
    first = 48  # after size, extensions, version and internal functions
    assert functions.index("XLA_FFI_ThreadPool_Schedule") == (136 - first) / 8
    assert functions.index("XLA_FFI_ThreadPool_NumThreads") == (144 - first) / 8


def test_scipys_blas_keeps_to_the_thread_of_a_task():
    call(jnp.ones(1))
    libraries = ThreadpoolController().info()
    threads = [x["num_threads"] for x in libraries if "scipy.libs" in x["filepath"]]
    assert set(threads) <= {1}
