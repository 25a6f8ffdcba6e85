"""Weights in MXFP4: read as transformers reads them, by parts, and refused if they are broken."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from esft_jax.blocks import bounded
from esft_jax.checkpoint import mxfp4
from esft_jax.checkpoint.mxfp4 import Mxfp4Files
from esft_jax.errors import InputError

E, OUT, GROUPS = 3, 10, 2
SHAPE = E, 32 * GROUPS, OUT
NAME = "model.layers.0.mlp.experts.gate_up_proj"


def packed(seed=0):
    """Blocks and scales, of all codes and of large and small scales."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (E, OUT, GROUPS, 16), np.uint8)
    return {
        f"{NAME}_blocks": blocks,
        f"{NAME}_scales": rng.integers(100, 140, blocks.shape[:-1], np.uint8),
    }


def write(folder, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    plain = {"plain": np.arange(4, dtype=np.float32)}
    return write(tmp_path_factory.mktemp("mxfp4"), packed() | plain)


def test_numbers_are_those_of_transformers_bit_for_bit(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # Every code under every scale that does not overflow.
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).repeat(253, axis=1)
    scales = np.arange(253, dtype=np.uint8)[None, :, None].repeat(16, axis=2)
    found = Mxfp4Files(write(tmp_path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})).read(
        NAME
    )
    expected = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    assert found.shape == expected.shape == (1, 512, 253)
    assert found.dtype == ml_dtypes.bfloat16
    bits = expected.view(torch.uint16).numpy()
    np.testing.assert_array_equal(np.ascontiguousarray(found).view(np.uint16), bits)
    assert np.isfinite(found.astype(np.float32)).all() and len(np.unique(bits)) > 1000


def test_the_mapping_has_what_they_stand_for(folder):
    files = Mxfp4Files(folder)
    assert set(files) == {NAME, "plain"}
    files.check(NAME, SHAPE)
    assert files.dtype(NAME) == ml_dtypes.bfloat16 and files.dtype("plain") == np.float32
    np.testing.assert_array_equal(files.read("plain"), np.arange(4))


@pytest.mark.parametrize("experts", [(0, 3, 1), (2, 3, 1)])
@pytest.mark.parametrize("inputs", [(0, 64), (7, 9), (32, 64), (31, 33), (63, 64)])
@pytest.mark.parametrize("outputs", [(0, 10, 1), (1, 10, 2), (4, 8, 2), (9, 10, 1)])
def test_any_part_is_that_of_the_whole(folder, experts, inputs, outputs, monkeypatch):
    files = Mxfp4Files(folder)
    index = slice(*experts), slice(*inputs), slice(*outputs)
    whole, pairs, touched = files.read(NAME), mxfp4._pairs(), []

    class Spy:
        def take(self, codes, **options):
            touched.append(codes.shape)
            return pairs.take(codes, **options)

    monkeypatch.setattr(mxfp4, "_pairs", Spy)
    np.testing.assert_array_equal(files.read(NAME, index), whole[index])
    groups = -(-inputs[1] // 32) - inputs[0] // 32
    sizes = [len(range(*index[axis].indices(SHAPE[axis]))) for axis in (0, 2)]
    assert touched == [(*sizes, groups, 16)]  # what is not asked for is not dequantised


SCALES = f"{NAME}_scales"
BLOCKS = f"{NAME}_blocks"
BROKEN = {
    "no scales": (
        lambda t: t.pop(SCALES),
        "'.*_blocks' is in MXFP4; its scales, '.*_scales', miss",
    ),
    "no blocks": (
        lambda t: t.update({"other_scales": t[SCALES]}),
        "tensor 'other_scales': expected 'other_blocks' beside it",
    ),
    "nothing": (
        lambda t: (t.clear(), t.update(plain=np.ones(2, np.float32))),
        "config.json: quantization_config: says mxfp4, which no tensor is in",
    ),
    "twice": (
        lambda t: t.update({NAME: np.zeros(SHAPE, np.float32)}),
        "tensor '.*_blocks' holds what '.*gate_up_proj' holds, too",
    ),
    "too few scales": (
        lambda t: t.update({SCALES: t[SCALES][:, :, :1].copy()}),
        r"tensor '.*_scales' has type U8 and shape \[3, 10, 1\]; expected U8 and \[3, 10, 2\]",
    ),
    "other groups": (
        lambda t: t.update({BLOCKS: t[BLOCKS].reshape(E, OUT, 2 * GROUPS, 8)}),
        r"'.*_blocks' has type U8 and shape \[3, 10, 4, 8\]; expected U8 and \[experts, outputs,",
    ),
    "another type": (
        lambda t: t.update({SCALES: t[SCALES].astype(np.float32)}),
        "'.*_scales' has type F32 and shape",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_refused(tmp_path, change, message):
    tensors = packed()
    change(tensors)
    with pytest.raises(InputError, match=message):
        Mxfp4Files(write(tmp_path, tensors))


def test_a_scale_of_no_number_is_refused_where_it_is_met(tmp_path):
    tensors = packed()
    tensors[SCALES][1, 4, 0] = 255
    files = Mxfp4Files(write(tmp_path, tensors))
    files.read(NAME, bounded((slice(0, 1), slice(None), slice(None)), SHAPE))
    with pytest.raises(InputError, match="_scales' has a scale of 255, which stands for no number"):
        files.read(NAME)
