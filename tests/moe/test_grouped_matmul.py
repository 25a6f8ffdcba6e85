"""Grouped products, however they are computed, against a dense float64 reference."""

from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from esft_jax.moe.grouped_matmul import Bank, grouped_matmul
from esft_jax.moe.grouped_matmul.xla import COVERED


@contextmanager
def emulated_tpu():
    """Run TPU kernels on CPU, with the tiles of a v5e."""
    chip = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    with ExitStack() as stack:
        stack.enter_context(use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)))
        # Any true value but `InterpretParams` chooses the interpreter that is fast to compile.
        stack.enter_context(force_tpu_interpret_mode(True))
        yield


# How to run each implementation here.
IMPLEMENTATIONS = {"cpu": nullcontext, "xla": nullcontext, "tpu": emulated_tpu, "gpu": nullcontext}


D, F = 16, 24
CASES = {
    "uneven": [70, 3, 0, 65, 1],
    "empty-ends": [0, 64, 0, 40, 0],
    "one-giant": [0, 0, 200, 0, 0],
    "all-empty": [0, 0, 0, 0, 0],
}
N = 200  # no multiple of the block; most cases leave padding rows
# Sizes and starts.
SCATTERED = {
    "gaps": ([70, 3, 0, 65, 1], [5, 75, 90, 100, 199]),
    "any order": ([70, 3, 0, 55, 1], [120, 60, 7, 0, 57]),
    "any order, no gaps": ([80, 30, 40, 0, 50], [70, 0, 30, 77, 150]),
    "one tile": ([2, 3, 1, 4, 5], [40, 10, 30, 20, 1]),
    "all-empty": ([0, 0, 0, 0, 0], [0, 9, 3, 200, 0]),
}


def draw(*shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rows_of(sizes, starts=None):
    """Of each group."""
    ends = np.cumsum(sizes)
    starts = ends - sizes if starts is None else starts
    return [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def reference(x, matrices, cotangent, groups):
    """Product, and gradients of `sum(product * cotangent)`, in float64."""
    x, matrices, cotangent = (a.astype(np.float64) for a in (x, matrices, cotangent))
    out = np.zeros((len(x), matrices.shape[2]))
    dx, dw = np.zeros_like(x), np.zeros_like(matrices)
    for group, rows in enumerate(groups):
        out[rows] = x[rows] @ matrices[group]
        dx[rows] = cotangent[rows] @ matrices[group].T
        dw[group] = x[rows].T @ cotangent[rows]
    return out, dx, dw


@partial(jax.jit, static_argnums=0)
def run(implementation, x, banks, sizes, cotangent, starts=None):
    def multiply(x, banks):
        return grouped_matmul(x, banks, sizes, starts, implementation=implementation)

    out, pull = jax.vjp(multiply, x, banks)
    return out, *pull(cotangent)


def check(run, x, banks, sizes, cotangent, tolerance, starts=None):
    numbers = [None if n is None else np.array(n, np.int32) for n in (sizes, starts)]
    out, dx, dbanks = run(x, banks, numbers[0], cotangent, numbers[1])
    found = (out, dx, np.concatenate([np.asarray(d, np.float64) for d in dbanks]))
    matrices = np.concatenate([np.asarray(b, np.float64) for b in banks])
    groups = rows_of(sizes, starts)
    for ours, expected in zip(found, reference(x, matrices, cotangent, groups), strict=True):
        scale = np.abs(expected).max() or 1.0
        np.testing.assert_allclose(
            np.asarray(ours, np.float64) / scale, expected / scale, atol=tolerance, rtol=0
        )
    padding = np.delete(np.arange(len(x)), np.r_[tuple(groups)])
    assert not np.any(out[padding]) and not np.any(dx[padding])


class TestEveryImplementation:
    @pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
    def environment(self, request):
        self.run = partial(run, request.param)
        with IMPLEMENTATIONS[request.param]():
            yield

    @pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
    def test_two_banks(self, sizes):
        banks = (draw(2, D, F, seed=1), draw(3, D, F, seed=2))
        check(self.run, draw(N, D, seed=0), banks, sizes, draw(N, F, seed=3), 1e-6)

    @pytest.mark.parametrize(("sizes", "starts"), SCATTERED.values(), ids=SCATTERED)
    def test_groups_that_start_anywhere(self, sizes, starts):
        banks = (draw(2, D, F, seed=1), draw(3, D, F, seed=2))
        check(self.run, draw(N, D, seed=0), banks, sizes, draw(N, F, seed=3), 1e-6, starts)

    def test_a_part_of_an_array(self):
        tuned, more = draw(2, D, F, seed=1), draw(9, D, F, seed=2)
        sizes, x, cotangent = (
            np.array(CASES["uneven"], np.int32),
            draw(N, D, seed=0),
            draw(N, F, seed=3),
        )
        expected = self.run(x, (tuned, more[4:7]), sizes, cotangent)
        bank = Bank(more, np.float32(4), 3)  # as a float: `jax.vjp` takes no integers
        out, dx, (dtuned, dbank) = self.run(x, (tuned, bank), sizes, cotangent)
        found = (out, dx, (dtuned, dbank.matrices[4:7]))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert not np.any(np.delete(dbank.matrices, [4, 5, 6], axis=0))
        # What is differentiated in its place gets the gradient, and is not read.
        bank = bank.replace(own=np.full_like(more[4:7], np.nan))
        out, dx, (dtuned, dbank) = self.run(x, (tuned, bank), sizes, cotangent)
        jax.tree.map(np.testing.assert_array_equal, (out, dx, (dtuned, dbank.own)), expected)
        assert not np.any(dbank.matrices)

    def test_one_bank_of_fewer_rows_than_a_block(self):
        assert COVERED[0] > 10
        banks = (draw(3, D, F, seed=1), draw(0, D, F, seed=2))
        check(self.run, draw(10, D, seed=0), banks, [4, 0, 5], draw(10, F, seed=3), 1e-6)

    @pytest.mark.parametrize("starts", [None, SCATTERED["gaps"][1]], ids=["in order", "gaps"])
    def test_matrices_of_a_single_row(self, starts):
        banks = (draw(2, 1, F, seed=1), draw(3, 1, F, seed=2))
        sizes, x, cotangent = SCATTERED["gaps"][0], draw(N, 1, seed=0), draw(N, F, seed=3)
        check(self.run, x, banks, sizes, cotangent, 1e-6, starts)

    def test_no_rows(self):
        banks = (draw(2, D, F, seed=1),)
        out, dx, (dw,) = self.run(
            draw(0, D, seed=0), banks, np.zeros(2, np.int32), draw(0, F, seed=3)
        )
        assert out.shape == (0, F) and dx.shape == (0, D) and not np.any(dw)

    def test_bfloat16_rows_and_float32_masters(self):
        x, cotangent = (draw(N, w, seed=w).astype(jnp.bfloat16) for w in (D, F))
        banks = (draw(2, D, F, seed=1).astype(jnp.bfloat16).astype(np.float32),)
        banks += (draw(3, D, F, seed=2).astype(jnp.bfloat16),)
        out, dx, dbanks = jax.eval_shape(self.run, x, banks, np.zeros(5, np.int32), cotangent)
        assert (out.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
        assert [d.dtype for d in dbanks] == [jnp.float32, jnp.bfloat16]
        check(self.run, x, banks, CASES["uneven"], cotangent, 2**-8)

    def test_weight_gradient_of_bfloat16_rows_is_summed_in_float32(self):
        rows = (
            10 * COVERED[-1]
        )  # each piece adds 1/8 to a total that reaches the step size of bfloat16
        x = np.full((rows, D), 1, jnp.bfloat16)
        cotangent = np.full((rows, F), 2**-9, jnp.bfloat16)
        cotangent[0] = 64
        banks = (np.zeros((1, D, F), np.float32),)
        _, _, (found,) = self.run(x, banks, np.array([rows], np.int32), cotangent)
        np.testing.assert_allclose(found, 64 + (rows - 1) / 512, rtol=1e-6)

    @pytest.mark.parametrize("starts", [None, [100, 0, 45, 0, 31]], ids=["behind", "between"])
    def test_padding_rows_poison_nothing(self, starts):
        banks = (draw(2, D, F, seed=1), draw(3, D, F, seed=2))
        sizes = np.array([30, 0, 20, 0, 7], np.int32)
        starts = None if starts is None else np.array(starts, np.int32)
        x, cotangent = draw(N, D, seed=0), draw(N, F, seed=3)
        clean = self.run(x, banks, sizes, cotangent, starts)
        padding = np.delete(np.arange(N), np.r_[tuple(rows_of(sizes, starts))])
        x[padding[::2]], x[padding[1::2]] = np.nan, np.inf
        cotangent[padding] = np.nan
        found = self.run(x, banks, sizes, cotangent, starts)
        jax.tree.map(np.testing.assert_array_equal, found, clean)


def test_matrices_of_several_tasks_on_a_cpu():
    banks = (draw(1, 520, 1030, seed=1), draw(1, 520, 1030, seed=2))
    x, cotangent = draw(320, 520, seed=0), draw(320, 1030, seed=3)
    check(partial(run, "cpu"), x, banks, [40, 270], cotangent, 1e-6)


@pytest.mark.parametrize("environment, kernels", [(emulated_tpu, 3), (nullcontext, 0)])
def test_the_platform_compiled_for_chooses(environment, kernels):
    x, bank, sizes = draw(N, D, seed=0), draw(2, D, F, seed=1), jnp.array([50, 60], jnp.int32)

    def gradients(x, bank):
        return jax.grad(lambda *a: (grouped_matmul(a[0], a[1:], sizes) ** 2).sum(), (0, 1))(x, bank)

    with environment():
        assert str(jax.make_jaxpr(gradients)(x, bank)).count("pallas_call") == kernels


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_implementation_is_named():
    with pytest.raises(ValueError, match="'cuda' is not one of cpu, gpu, tpu, xla"):
        grouped_matmul(draw(2, D, seed=0), (draw(1, D, F, seed=1),), [2], implementation="cuda")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["int8", "int32", "uint8", "bool", "float8_e4m3fn", "complex64"])
@pytest.mark.usefixtures("unchecked")
def test_what_needs_a_scale_is_no_weight(implementation, dtype):
    x, banks, sizes = draw(6, D, seed=0), [draw(1, D, F, seed=1), draw(2, D, F, seed=2)], [1, 2, 3]
    multiply = partial(grouped_matmul, group_sizes=sizes, implementation=implementation)
    wrong = jnp.asarray(banks[1]).astype(dtype)
    for bank in (wrong, Bank(wrong, 0, 2)):
        with pytest.raises(ValueError, match=rf"banks\[1\] is {dtype}; expected float32 or"):
            multiply(x, (banks[0], bank))
    with pytest.raises(ValueError, match=f"x is {dtype}; expected float32 or"):
        multiply(jnp.asarray(x).astype(dtype), banks)


def bank_of(**changed):
    return Bank(**({"matrices": np.ones((3, D, F), np.float32), "first": 0, "count": 3} | changed))


WRONG = {
    "no banks": ({"banks": ()}, "no banks"),
    "a vector": ({"x": np.ones(D, np.float32)}, "x has shape .16,.; expected .rows, width."),
    "another width": ({"x": np.ones((9, D + 1), np.float32)}, r"banks\[0\] has shape .3, 16, 24."),
    "one matrix": ({"banks": [np.ones((D, F), np.float32)]}, r"banks\[0\] has shape .16, 24.;"),
    "another result": (
        {"banks": [bank_of(), np.ones((1, D, F + 1), np.float32)]},
        r"banks\[1\] has shape .1, 16, 25.; .* the width of banks\[0\]",
    ),
    "more than there are": ({"banks": [bank_of(count=4)]}, "has 4 of 3 matrices"),
    "past the end": ({"banks": [bank_of(first=1)]}, "begins at 1 and has 3 matrices, of 3"),
    "before the beginning": ({"banks": [bank_of(first=-1)]}, "begins at -1"),
    "another own": (
        {"banks": [bank_of(own=np.ones((2, D, F), np.float32))]},
        r"banks\[0\].own is float32 .2, 16, 24.; expected float32 .3, 16, 24.",
    ),
    "too few sizes": ({"group_sizes": [1, 2]}, r"int64 .2,.; expected integers .3,."),
    "a table of sizes": ({"group_sizes": [[1, 2, 3]]}, "expected integers .3,."),
    "broken sizes": ({"group_sizes": [1, 2.5, 3]}, "float64 .3,.; expected integers"),
    "negative sizes": ({"group_sizes": [1, -2, 3]}, "none below 0"),
    "more than the rows": ({"group_sizes": [1, 2, 7]}, "a sum of at most the 9 rows"),
    "too few starts": ({"group_starts": [1, 2]}, r"group_starts is int64 .2,.; expected integers"),
    "broken starts": ({"group_starts": [0, 0.5, 3]}, "group_starts is float64 .3,."),
    "a negative start": ({"group_starts": [-1, 2, 5]}, r"\[-1, 2, 5\] with .* none below 0"),
    "an end past the rows": ({"group_starts": [0, 1, 7]}, "groups within the 9 rows"),
    "a start past the rows": (
        {"group_sizes": jnp.array([1, 2, 3]), "group_starts": [0, 1, 10]},
        r"group_starts \[0, 1, 10\]; .* within the 9 rows",
    ),
    "shared rows": (
        {"group_starts": [4, 5, 2]},
        "groups 2 and 0 share rows: they have rows 2 to 4 and 4 to 4",
    ),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused(implementation, changed, message):
    operands = {"x": np.ones((9, D), np.float32), "banks": [bank_of()], "group_sizes": [1, 2, 3]}
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**operands | changed, implementation=implementation)


def test_empty_groups_share_no_rows():
    x, banks = draw(9, D, seed=0), [draw(3, D, F, seed=1)]
    found = grouped_matmul(x, banks, [2, 0, 3], [3, 4, 5], implementation="xla")
    np.testing.assert_allclose(found[3:5], x[3:5] @ banks[0][0], atol=1e-5)


HUGE = 2**31 - 1
# What was asked for, and what it counts as, of 10 rows: sizes, or sizes and starts.
ASKED = {
    "too many": (([4, 4, 4],), ([4, 4, 2],)),
    "negative": (([4, -3, 2],), ([4, 0, 2],)),
    "beyond int32": (([3, HUGE, HUGE],), ([3, 7, 0],)),
    "starts outside": (([3, HUGE, 1], [-2, 5, HUGE]), ([3, 5, 0], [0, 5, 0])),
    "shared rows": (([4, 5, 2], [3, 0, 4]), ([2, 5, 0], [5, 0, 0])),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("asked", "counted"), ASKED.values(), ids=ASKED)
def test_groups_at_run_time_keep_to_their_rows(implementation, asked, counted):
    with IMPLEMENTATIONS[implementation]():
        bank, x, cotangent = (draw(*shape, seed=1) for shape in ((3, D, F), (10, D), (10, F)))

        def computed(sizes, starts=None):
            starts = None if starts is None else np.array(starts, np.int32)
            return run(implementation, x, (bank,), np.array(sizes, np.int32), cotangent, starts)

        jax.tree.map(np.testing.assert_array_equal, computed(*asked), computed(*counted))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_matrices_found_at_run_time_are_of_the_array(implementation):
    with IMPLEMENTATIONS[implementation]():
        array, x, cotangent = (draw(*shape, seed=1) for shape in ((5, D, F), (10, D), (10, F)))
        multiply = partial(run, implementation, x, sizes=np.array([6, 4], np.int32))
        for asked, counted in ((1000, 3), (-1000, 0)):
            # As floats: `jax.vjp` takes no integers.
            found, expected = (
                multiply(banks=(Bank(array, np.float32(first), 2),), cotangent=cotangent)[0]
                for first in (asked, counted)
            )
            np.testing.assert_array_equal(found, expected)


def results(jaxpr):
    """Shapes of everything that a program computes, loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (var.aval.shape for var in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from results(inner)


TUNED, FROZEN = (5, D, F), (333, D, F)


def gradient(argnums):
    def loss(x, tuned, frozen, sizes):
        return grouped_matmul(x, (tuned, frozen), sizes).sum()

    return jax.grad(loss, argnums)


def arguments(rows):
    shapes = (rows, D), TUNED, FROZEN
    sizes = jax.ShapeDtypeStruct((TUNED[0] + FROZEN[0],), jnp.int32)
    return [*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes), sizes]


def test_no_gradient_of_a_frozen_bank_is_computed():
    rows = 2 * max(COVERED)  # more than any product of a part of the rows has

    def shapes(argnums):
        return set(results(jax.make_jaxpr(gradient(argnums))(*arguments(rows)).jaxpr))

    assert {(rows, D), TUNED} <= shapes((0, 1)) and FROZEN not in shapes((0, 1))
    assert TUNED not in shapes(0) and FROZEN not in shapes(0)
    assert FROZEN in shapes((1, 2))  # the check can fail
    # With no operand before it differentiated, nothing is multiplied by transposes either.
    assert (rows, D) not in shapes(1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_groups_that_follow_one_another_are_not_sorted(implementation):
    x, bank, numbers = draw(10, D, seed=0), draw(3, D, F, seed=1), jnp.array([3, 2, 4])
    multiply = partial(grouped_matmul, implementation=implementation)
    with IMPLEMENTATIONS[implementation]():
        programs = [
            str(jax.make_jaxpr(lambda *given: multiply(x, (bank,), *given))(*given))
            for given in ((numbers,), (numbers, numbers))
        ]
    assert [" sort[" in program for program in programs] == [False, True]


def test_a_frozen_bank_takes_no_memory():
    memory = jax.jit(gradient((0, 1))).lower(*arguments(70)).compile().memory_analysis()
    frozen_bytes = 4 * np.prod(FROZEN)
    assert memory.argument_size_in_bytes > frozen_bytes
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < frozen_bytes / 4


def test_a_second_bank_alone_can_be_learned():
    x, banks = draw(N, D, seed=0), (draw(2, D, F, seed=1), draw(3, D, F, seed=2))
    sizes, cotangent = np.array(CASES["uneven"], np.int32), draw(N, F, seed=3)

    @jax.jit
    def second(bank):
        return jnp.sum(grouped_matmul(x, (banks[0], bank), sizes) * cotangent)

    expected = reference(x, np.concatenate(banks), cotangent, rows_of(sizes))[2][2:]
    np.testing.assert_allclose(jax.grad(second)(banks[1]), expected, atol=1e-4)
