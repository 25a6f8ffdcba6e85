"""Which blocks the TPU kernels work on."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from esft_jax.families import load_model_config
from esft_jax.moe.grouped_matmul import tpu_tiles
from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups
from esft_jax.moe.grouped_matmul.tpu import multiply, weight_gradient
from esft_jax.moe.grouped_matmul.tpu_tiles import (
    PIECES,
    Stored,
    gradient_widths,
    multiply_widths,
    piece_rows,
    plan_fetches,
    plan_visits,
)
from tests.moe.test_grouped_matmul import draw, emulated_tpu, rows_of

ROOT = Path(__file__).parents[2]
CHIPS = {"v4": ("TPU v4", 2), "v5e": ("TPU v5 lite", 1), "v5p": ("TPU v5", 2)}
CHIPS |= {"v6e": ("TPU v6 lite", 1), "tpu7x": ("TPU7x", 1)}


def on(chip):
    kind, cores = CHIPS[chip]
    device = AbstractDevice(device_kind=kind, num_cores=cores, platform="tpu")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def visited(begins, sizes, rows, piece, **options):
    visits, count = plan_visits(jnp.array(begins), jnp.array(sizes), rows, piece, **options)
    return [tuple(row) for row in np.stack(visits, axis=1)[: int(count)].tolist()]


def test_visits_of_uneven_groups():
    # Tiles of 64 rows. Group 1 has none; the last tile is not full.
    sizes = [70, 0, 10, 20]
    begins = np.cumsum(sizes) - sizes
    assert visited(begins, sizes, 100, 16) == [
        # group, tile, low, high, begin, pieces
        (0, 0, 0, 64, 0, 4),
        (0, 1, 0, 6, 0, 1),
        (2, 1, 6, 16, 0, 1),
        (3, 1, 16, 36, 16, 2),
    ]


def test_visits_of_some_groups_with_their_empty_ones():
    assert visited([70, 70, 80], [0, 10, 0], 100, 16, visit_empty=True) == [
        (0, 1, 6, 6, 0, 0),
        (1, 1, 6, 16, 0, 1),
        (2, 1, 16, 16, 16, 0),
    ]


def test_no_group_has_rows():
    assert visited([0, 0], [0, 0], 100, 16) == []
    assert len(visited([0, 100], [0, 0], 100, 16, visit_empty=True)) == 2


def multiplied(sizes, piece, groups):
    """Rows that are multiplied for these groups, padding included."""
    begins = np.cumsum(sizes) - sizes
    visits = visited(begins[groups], sizes[groups], int(np.sum(sizes)), piece, visit_empty=True)
    return piece * sum(visit[-1] for visit in visits)


def padded(width, block):
    return -(-width // block) * block


BF16 = Stored(2, quantised=False)


def work_over_exact(sizes, tuned, size, width):
    """Operations of a layer's experts, padding of rows and widths included, over those of its rows:
    forward, gradients of rows, and those of the first `tuned` groups' matrices.
    """
    rows, groups = int(sizes.sum()), len(sizes)
    piece = piece_rows(rows, groups)
    tile, bf16 = PIECES * piece, jnp.bfloat16
    visits = -(-rows // tile) + groups
    done = asked = 0
    for d, f in ((size, 2 * width), (width, size)):
        for inner, outer in ((d, f), (f, d)):
            blocks = multiply_widths(
                visits, groups, tile, inner, outer, bf16, (BF16, BF16), transposed=False
            )
            assert inner % blocks.inner == 0
            done += multiplied(sizes, piece, slice(None)) * inner * padded(outer, blocks.outer)
            asked += rows * inner * outer
        blocks = gradient_widths(visits, tuned, tile, d, f, bf16)
        work = multiplied(sizes, piece, slice(0, tuned))
        done += work * padded(d, blocks.inner) * padded(f, blocks.outer)
        asked += sizes[:tuned].sum() * d * f
    assert asked <= done
    return done / asked


@pytest.mark.parametrize("chip", CHIPS)
def test_work_stays_close_to_what_is_asked_for(chip):
    # A layer of DeepSeek-V2-Lite and a sequence of 4096 tokens, six of 64 experts tuned.
    tokens, top_k, tuned, experts, size, width = 4096, 6, 6, 64, 2048, 1408
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.full(experts, 2.0))  # the busiest gets about 4 times the mean
    sizes = np.concatenate([np.zeros(tuned, int), rng.multinomial(tokens * top_k, share)])
    sizes[:tuned], sizes[tuned : 2 * tuned] = sizes[tuned : 2 * tuned], 0
    with on(chip):
        assert work_over_exact(sizes, tuned, size, width) <= 1.15


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(
    "name",
    [
        "qwen3-30b-a3b",
        "glm-4.7-flash",
        "moonlight-16b-a3b",
        "olmoe-1b-7b",
        "mixtral-8x7b",
        "gpt-oss-20b",
    ],
)
def test_work_of_shipped_models_on_eight_chips(name, chip):
    # A row of 4096 tokens each, an even router, a tuned expert on every chip.
    config = load_model_config(ROOT / "models" / name)
    experts, rows = config.router.num_experts, 8 * 4096 * config.router.top_k
    drawn = np.random.default_rng(0).multinomial(rows, np.full(experts, 1 / experts))
    with on(chip):
        found = work_over_exact(drawn[: experts // 8], 1, config.hidden_size, config.expert_width)
    assert found <= 1.1


def test_matrices_stay_uncut_along_the_sum_where_they_fit():
    shape = (300, 73, 128, 2048, 2816, jnp.bfloat16, (BF16, BF16))
    with on("v5e"):
        large = multiply_widths(*shape, transposed=False)
    with on("v4"):
        small = multiply_widths(*shape, transposed=False)
    assert large.inner == small.inner == 2048 and large.outer > small.outer


def test_what_cannot_be_cut_to_fit_is_refused():
    with on("v4"), pytest.raises(ValueError, match="16 MiB of VMEM of v4"):
        multiply_widths(300, 8, 128, 60_001, 4096, jnp.bfloat16, (BF16,), transposed=False)


@pytest.mark.parametrize("starts", [None, [20, 0, 3, 90]], ids=["in order", "scattered"])
def test_matrices_cut_in_both_directions(monkeypatch, starts):
    """The sum over blocks, an edge block that is not full, and what each visit fetches."""
    monkeypatch.setattr(tpu_tiles, "vmem_limit", lambda: 700_000)
    rows, d, f = 150, 384, 300
    sizes = [70, 0, 3, 60]
    groups = Groups.within(jnp.array(sizes), None if starts is None else jnp.array(starts), rows)
    x, grad = draw(rows, d, seed=0), draw(rows, f, seed=1)
    banks = (draw(2, d, f, seed=2), draw(2, d, f, seed=3))
    with emulated_tpu():
        stored = Stored(4, quantised=False)
        plan = (7, 4, 64, d, f, jnp.float32, (stored, stored))
        blocks = multiply_widths(*plan, transposed=False)
        assert blocks.inner < d and blocks.outer < f
        layers = tuple(Bank(bank, jnp.int32(0), len(bank)) for bank in banks)
        forward = jax.jit(lambda *a: multiply(*a, transposed=False))(x, layers, groups)
        gradient = jax.jit(lambda *a: weight_gradient(*a, 2, 2))(x, grad, groups)
    matrices, expected = np.concatenate(banks), np.zeros((rows, f))
    own = rows_of(sizes, starts)
    for g, of_group in enumerate(own):
        expected[of_group] = x[of_group] @ matrices[g]
    np.testing.assert_allclose(forward, expected, atol=1e-4)
    assert not np.any(forward[~np.any(expected, axis=1)])
    for g in (2, 3):
        np.testing.assert_allclose(gradient[g - 2], x[own[g]].T @ grad[own[g]], atol=1e-4)


def test_a_visit_without_a_need_fetches_nothing():
    # Tiles of 64 rows. Padding before, between and after groups 2 and 0 of two banks.
    groups = Groups.within(jnp.array([10, 0, 70]), jnp.array([300, 0, 100]), 400)
    sizes, ends, of_group = groups.stretches(400)
    visits, count = plan_visits(ends - sizes, sizes, 400, 16)
    visits = visits._replace(group=of_group[visits.group])
    fetches = plan_fetches(visits, [(0, 2), (2, 1)])
    found = np.stack([visits.group, visits.tile, fetches.tile, *fetches.matrices])[:, : int(count)]
    assert found.T.tolist() == [
        # group, tile; tile and matrices asked for
        [3, 0, 1, 0, 0],
        [3, 1, 1, 0, 0],
        [2, 1, 1, 0, 0],
        [2, 2, 2, 0, 0],
        [3, 2, 2, 0, 0],
        [3, 3, 2, 0, 0],
        [3, 4, 2, 0, 0],
        [0, 4, 4, 0, 0],
        [3, 4, 4, 0, 0],
        [3, 5, 4, 0, 0],
        [3, 6, 4, 0, 0],
    ]
