import math
from pathlib import Path

import pytest

from esft_jax.checkpoint.converted import leaf_shapes
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.families import load_model_config, tensor_table
from tests.checkpoint.checkpoints import save, torch_model

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 12, "tie_word_embeddings": True},
        {"first_k_dense_replace": 0, "n_shared_experts": 2},
    ],
    ids=["lite", "q_lora-tied", "no-dense"],
)
def test_names_and_shapes_are_those_of_a_saved_checkpoint(tmp_path, changes):
    files = TensorFiles(save(torch_model(**changes), tmp_path))
    placements = tensor_table(load_model_config(tmp_path)).places
    assert {n: p.shape for n, p in placements.items()} == {n: i.shape for n, i in files.items()}


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("deepseek-v2-lite", 15.706484224),
        ("deepseek-v2", 235.74143488),
        ("deepseek-v3", 671.0264192),  # without its layer for multi-token prediction
        ("moonlight-16b-a3b", 15.960110208),
        ("glm-4.7-flash", 29.94339392),
        ("glm-4.5-air", 106.852251264),
        ("qwen3-30b-a3b", 30.532122624),
        # Without layers for multi-token prediction (1.650471424, 0.844640768) and vision
        # (0.446571248): 81.32486272 and 35.951822704 with them.
        ("qwen3-next-80b-a3b", 79.674391296),
        ("qwen3.6-35b-a3b", 34.660610688),
        ("olmoe-1b-7b", 6.919161856),
        ("mixtral-8x7b", 46.702792704),
        ("gemma-4-26b-a4b", 25.23314179),  # its text part
        ("gpt-oss-20b", 20.914757184),
        ("gpt-oss-120b", 116.829156672),
    ],
)
def test_shipped_configurations_have_the_size_of_the_released_models(model, billions):
    placements = tensor_table(load_model_config(MODELS / model)).places
    assert sum(math.prod(p.shape) for p in placements.values()) == round(billions * 1e9)


def test_fused_names_and_shapes_are_those_of_transformers_in_memory(tiny):
    model, folder = tiny
    expected = {name: t.shape for name, t in model.state_dict().items() if ".mlp.experts." in name}
    assert tensor_table(load_model_config(folder)).fused_shapes == expected


def test_no_two_tensors_share_a_place(tiny):
    placements = tensor_table(load_model_config(tiny[1])).places
    places = {(p.path, str(p.box)) for p in placements.values()}
    assert len(places) == len(placements)
    elements = sum(math.prod(p.shape) for p in placements.values())
    assert elements == sum(map(math.prod, leaf_shapes(placements).values()))
