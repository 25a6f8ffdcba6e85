"""Products with quantised banks against dequantise-then-multiply, however they are computed."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from esft_jax.moe.grouped_matmul import Bank, grouped_matmul, operation, tpu_tiles
from esft_jax.ops.quantised import Quantised, quantise
from tests.moe.test_grouped_matmul import CASES, IMPLEMENTATIONS, SCATTERED, N, draw

SCHEMES = {"int8": 16, "int4": 16, "mxfp4": 32, "fp8": 16}
# A half is no power of two; neither the last group nor the last tile of the result is full.
D, F = 88, 40


def stack(scheme, *shape, seed=0):
    """Quantised matrices, and what they stand for."""
    packed = quantise(draw(*shape, seed=seed), scheme, SCHEMES[scheme])
    return packed, np.asarray(packed.astype(jnp.float32))


@partial(jax.jit, static_argnums=0)
def run(implementation, x, tuned, base, sizes, cotangent, starts=None):
    def multiply(x, tuned):
        return grouped_matmul(x, (tuned, base), sizes, starts, implementation=implementation)

    out, pull = jax.vjp(multiply, x, tuned)
    return out, *pull(cotangent)


def compare(ours, expected, tolerance=1e-6):
    for one, other in zip(ours, expected, strict=True):
        one, other = (np.asarray(a, np.float32) for a in (one, other))
        scale = np.abs(other).max() or 1.0
        np.testing.assert_allclose(one / scale, other / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
class TestEveryImplementation:
    @pytest.fixture(autouse=True, params=IMPLEMENTATIONS)
    def environment(self, request):
        self.run = partial(run, request.param)
        with IMPLEMENTATIONS[request.param]():
            yield

    @pytest.mark.parametrize("sizes", [CASES["uneven"], CASES["one-giant"]])
    def test_beside_a_tuned_bank(self, scheme, sizes):
        base, values = stack(scheme, 3, D, F, seed=2)
        x, tuned = draw(N, D, seed=0), draw(2, D, F, seed=1)
        rest = np.array(sizes, np.int32), draw(N, F, seed=3)
        compare(self.run(x, tuned, base, *rest), self.run(x, tuned, values, *rest))

    def test_groups_that_start_anywhere(self, scheme):
        sizes, starts = (np.array(numbers, np.int32) for numbers in SCATTERED["any order"])
        base, values = stack(scheme, 3, D, F, seed=2)
        x, tuned, cotangent = draw(N, D, seed=0), draw(2, D, F, seed=1), draw(N, F, seed=3)
        ours = self.run(x, tuned, base, sizes, cotangent, starts)
        compare(ours, self.run(x, tuned, values, sizes, cotangent, starts))

    def test_a_layer_of_a_stack(self, scheme):
        base, values = stack(scheme, 4, 3, D, F, seed=2)
        x, tuned, cotangent = draw(N, D, seed=0), draw(2, D, F, seed=1), draw(N, F, seed=3)
        sizes = np.array(CASES["uneven"], np.int32)
        of_layer = [Bank.layer_of(a, jnp.int32(2)) for a in (base, jnp.asarray(values))]
        ours, expected = (self.run(x, tuned, bank, sizes, cotangent) for bank in of_layer)
        compare(ours, expected)

    def test_bfloat16_rows(self, scheme):
        base, values = stack(scheme, 3, D, F, seed=2)
        x, tuned, cotangent = (
            jnp.asarray(draw(*shape, seed=seed), jnp.bfloat16)
            for shape, seed in (((N, D), 0), ((2, D, F), 1), ((N, F), 3))
        )
        sizes = np.array(CASES["uneven"], np.int32)
        ours = self.run(x, tuned, base, sizes, cotangent)
        expected = self.run(x, tuned, jnp.asarray(values, jnp.bfloat16), sizes, cotangent)
        compare(ours, expected, 2**-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_number_of_fp8_in_kernels(implementation):
    codes = np.arange(256, dtype=np.uint8)
    codes = codes[(codes & 127) != 127]
    codes = np.stack([codes, codes[::-1]], axis=1)
    packed = Quantised(jnp.asarray(codes)[None], jnp.full((1, 1, 2), 0.3), "fp8", 256)
    ones, sizes = jnp.eye(len(codes), dtype=jnp.float32), np.array([len(codes)], np.int32)
    with IMPLEMENTATIONS[implementation]():
        found = grouped_matmul(ones, (packed,), sizes, implementation=implementation)
    np.testing.assert_array_equal(found, packed.astype(jnp.float32)[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_sum_whose_last_block_is_not_full(scheme, monkeypatch):
    """In the TPU kernel, over outputs; what is behind the end of a block is not defined."""
    monkeypatch.setattr(tpu_tiles, "vmem_limit", lambda: 600_000)
    base, values = stack(scheme, 3, 64, 300, seed=2)
    x, tuned = draw(N, 64, seed=0), draw(2, 64, 300, seed=1)
    rest = np.array(CASES["uneven"], np.int32), draw(N, 300, seed=3)
    with IMPLEMENTATIONS["tpu"]():
        stored = [tpu_tiles.Stored.of(bank) for bank in (jnp.asarray(tuned), base)]
        shape = (9, 5, 64, 300, 64, jnp.float32, stored)
        assert 300 % tpu_tiles.multiply_widths(*shape, transposed=True).inner
        ours = run("tpu", x, tuned, base, *rest)
    compare(ours, run("xla", x, tuned, values, *rest))


@pytest.mark.parametrize(("inputs", "kernel"), [(96, True), (80, False)])
def test_gpus_take_xla_where_parts_are_too_small(inputs, kernel, monkeypatch):
    """Half of 80 inputs, in groups of 16: kernels would have to take 8 at a time."""
    monkeypatch.setattr(operation, "fastest_implementation", lambda: "gpu")
    base, _ = stack("int4", 3, inputs, F)
    program = jax.make_jaxpr(lambda x, sizes: grouped_matmul(x, (base,), sizes))
    found = program(draw(N, inputs, seed=0), np.array([2, 3, 4], np.int32))
    assert ("pallas_call" in str(found)) == kernel


class TestQuantise:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_nearest_of_the_numbers_that_there_are(self, scheme):
        values = draw(2, 3, D, F, seed=5)
        packed = quantise(values, scheme, SCHEMES[scheme])
        back = np.asarray(packed.astype(jnp.float32))
        assert packed.shape == values.shape and packed.group_size == SCHEMES[scheme]
        scales = np.asarray(packed.scales, np.float32)
        scales = np.repeat(scales, packed.group_size, axis=2)[:, :, :D]
        # The largest step between two numbers; the last one may be beyond the largest by half.
        step = {"int8": 1, "int4": 1, "mxfp4": 2, "fp8": 32}[scheme]
        assert np.all(np.abs(back - values) <= 0.54 * step * scales)

    def test_what_was_in_mxfp4_stays_so(self):
        rng = np.random.default_rng(0)
        magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
        # Of all largest numbers that a group may have.
        chosen = magnitudes[rng.integers(0, 8, (64, 32, 50)) % rng.integers(1, 9, (64, 1, 50))]
        scales = 2.0 ** rng.integers(-60, 60, (64, 1, 50))
        values = (chosen * rng.choice([-1, 1], chosen.shape) * scales).astype(np.float32)
        packed = quantise(values, "mxfp4", 32)
        np.testing.assert_array_equal(packed.astype(jnp.float32), values)

    def test_every_number_of_fp8(self):
        codes = np.arange(256, dtype=np.uint8)
        codes = codes[(codes & 127) != 127]  # those stand for no number
        scale = np.float32(0.3) * np.ones((1, 1), np.float32)
        packed = Quantised(codes[:, None], scale, "fp8", 256)
        expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.3)
        found = np.asarray(packed.astype(jnp.float32))[:, 0]
        np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))

    def test_zeros_stay_zeros(self):
        for scheme, size in SCHEMES.items():
            assert not np.any(quantise(np.zeros((D, F), np.float32), scheme, size).astype(float))

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_bytes(self, scheme):
        packed = quantise(draw(2, D, F, seed=1), scheme, SCHEMES[scheme])
        bits = 8 if scheme in ("int8", "fp8") else 4
        assert packed.codes.nbytes == 2 * D * F * bits // 8
        assert packed.scales.nbytes <= packed.codes.nbytes / 2

    def test_two_inputs_of_a_byte(self):
        with pytest.raises(ValueError, match="int4 packs two inputs in a byte; a matrix has 33"):
            quantise(draw(33, F, seed=1), "int4", 32)


class TestFrozen:
    def test_no_gradient_of_quantised_matrices(self):
        base, _ = stack("int8", 2, D, F)
        x, sizes = jnp.ones((8, D)), np.array([4, 4], np.int32)

        def loss(scales):
            return grouped_matmul(x, (base.replace(scales=scales),), sizes).sum()

        with pytest.raises(ValueError, match="quantised matrices have no gradient"):
            jax.grad(loss)(base.scales)

    def test_codes_and_scales_belong_together(self):
        base, _ = stack("int8", 2, D, F)
        x, sizes = jnp.ones((8, D)), np.array([4, 4], np.int32)
        with pytest.raises(ValueError, match=r"banks\[0\] has scales of float32 \(2, 5, 40\)"):
            grouped_matmul(x, (base.replace(scales=base.scales[:, :-1]),), sizes)
        with pytest.raises(ValueError, match="has codes of int32; expected 8 bits each"):
            grouped_matmul(x, (base.replace(codes=base.codes.astype(jnp.int32)),), sizes)

    def test_nothing_is_differentiated_in_their_place(self):
        base, values = stack("int8", 2, D, F)
        bank = Bank(base, 0, 2, own=jnp.asarray(values))
        with pytest.raises(ValueError, match=r"banks\[0\].own: quantised matrices are not trained"):
            grouped_matmul(jnp.ones((8, D)), (bank,), np.array([4, 4], np.int32))
