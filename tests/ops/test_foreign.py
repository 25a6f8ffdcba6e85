"""Foreign functions on CPU: the interface they are written to, and many of them at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numba import njit

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
    libraries = foreign._blas_of_scipy()
    if not libraries:
        pytest.skip("scipy brings no BLAS of its own")
    assert {library.num_threads for library in libraries} == {1}


def output_of(script: Path, kept: Path) -> list[str]:
    """What a process prints that keeps its machine code in a folder."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(kept), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_another_process_loads_what_one_has_compiled(tmp_path: Path):
    script, kept = tmp_path / "script.py", tmp_path / "kept"
    script.write_text(_SCRIPT)
    assert output_of(script, kept) == ["12.0", "loaded", "0"]
    assert output_of(script, kept) == ["12.0", "loaded", "2"]
    # The same functions by name, with other content.
    script.write_text(_SCRIPT.replace("4 *", "5 *"))
    assert output_of(script, kept) == ["15.0", "loaded", "0"]


@pytest.mark.slow
def test_loaded_code_computes_the_same_bits(tmp_path: Path):
    """Or a run that is resumed would go another way than one that is not."""
    script, kept = tmp_path / "script.py", tmp_path / "kept"
    script.write_text(_LAYERS)
    first, compiled = output_of(script, kept)
    again, loaded = output_of(script, kept)
    assert (compiled, loaded) == ("0", "8")
    assert first == again


_SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from esft_jax.ops import foreign
from esft_jax.ops.foreign import operand, result, view

@foreign.compiled
def tasks(frame):
    return 1

@foreign.compiled
def multiply(frame, index):
    x, y = operand(frame, 0), result(frame, 0)
    a = view(x.address, 1, np.float32)
    view(y.address, 1, np.float32)[0] = 4 * a[0]

foreign.register("test_times", tasks, multiply)
out = jax.ffi.ffi_call("test_times", jax.ShapeDtypeStruct((1,), jnp.float32))(jnp.full(1, 3.0))
print(out[0], "loaded", sum(f.cache_hits for f in foreign._registered["test_times"]))
"""

_LAYERS = """
import hashlib
import jax, jax.numpy as jnp, numpy as np
from esft_jax.ops import foreign
from esft_jax.ops.attention import cpu as attention
from esft_jax.moe.grouped_matmul import cpu as grouped
from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups

normal = np.random.default_rng(0).normal
x = jnp.array(normal(size=(3, 2, 200, 2, 16)), jnp.float32)
segments = jnp.array(np.repeat([[1, 2], [1, 1]], 100, axis=1), jnp.int32)
mixed, back = jax.vjp(lambda *x: attention.causal_attention(*x, segments, 0.3), *x)
rows, groups = jnp.array(normal(size=(500, 24)), jnp.float32), Groups(jnp.array([200, 0, 300]))
bank = Bank(jnp.array(normal(size=(3, 24, 40)), jnp.float32), 0, 3)
products = grouped.multiply(rows, (bank,), groups, transposed=False)
weights = grouped.weight_gradient(rows, products, groups, 0, 3)
digest = hashlib.sha256()
for array in (mixed, *back(mixed), products, weights):
    digest.update(np.asarray(array).tobytes())
hits = sum(f.cache_hits for pair in foreign._registered.values() for f in pair)
print(digest.hexdigest(), hits)
"""
