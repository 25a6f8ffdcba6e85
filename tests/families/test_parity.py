"""Every family against transformers: logits, gradients, decoding, and files written back."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.checkpoint.export import export_model
from esft_jax.checkpoint.load import load_model
from esft_jax.families import FAMILIES, load_model_config, tensor_table
from esft_jax.model.transformer import Transformer
from tests.model.parity import run
from tests.yardstick import torch

# No two widths are equal, and none is twice another one.
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROUTED = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
}
MLA = ROUTED | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
QWEN = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA4 = {
    "head_dim": 12,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "top_k_experts": 3,
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "global_head_dim": 20,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": 1000.0,
            "partial_rotary_factor": 0.3,
        },
    },
}
# Heads of queries and keys, fewer than those of values, in layers of linear attention.
DELTA = QWEN | {
    "head_dim": 16,
    "shared_expert_intermediate_size": 28,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
}
FULL_FIRST = "full", "linear", "linear", "full", "linear"
VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "patch_size": 2,
    "position_embedding_size": 16,
}
ROUTERS = "mlp.gate.weight", "router.weight", "router.proj.weight", "wg.weight"
CASES = {
    "deepseek_v2": ("deepseek_v2", MLA | {"first_k_dense_replace": 1, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", MLA | {"first_k_dense_replace": 1}),
    "deepseek_v3, one group": (
        "deepseek_v3",
        MLA
        | ONE_GROUP
        | {
            "first_k_dense_replace": 0,
            "q_lora_rank": None,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.7,
            "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3, halves and biases": (
        "deepseek_v3",
        MLA | {"first_k_dense_replace": 1, "rope_interleave": False, "attention_bias": True},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", MLA | {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "sarvam_mla": ("sarvam_mla", MLA | ONE_GROUP | {"first_k_dense_replace": 1}),
    "olmoe": (
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "clip_qkv": 1.5, "attention_bias": True},
    ),
    "qwen3_moe": ("qwen3_moe", QWEN | {"head_dim": 12, "norm_topk_prob": True}),
    "qwen3_moe, dense between": (
        "qwen3_moe",
        QWEN
        | {
            "head_dim": 12,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 7,
            "rope_parameters": YARN,
        },
    ),
    "qwen2_moe": ("qwen2_moe", QWEN | {"shared_expert_intermediate_size": 28}),
    "qwen2_moe, windows in some layers": (
        "qwen2_moe",
        QWEN
        | {
            "num_hidden_layers": 4,
            "shared_expert_intermediate_size": 28,
            "use_sliding_window": True,
            "sliding_window": 5,
        },
    ),
    "mixtral": ("mixtral", LOCAL | {"head_dim": 14, "sliding_window": 7}),
    "glm4_moe": (
        "glm4_moe",
        ROUTED
        | {"first_k_dense_replace": 1, "head_dim": 12, "use_qk_norm": True, "attention_bias": True},
    ),
    "dots1": (
        "dots1",
        ROUTED
        | {
            "first_k_dense_replace": 1,
            "head_dim": 12,
            "routed_scaling_factor": 2.5,
            "sliding_window": 5,
            "max_window_layers": 2,
        },
    ),
    "minimax_m2": ("minimax_m2", LOCAL | {"head_dim": 12, "rotary_dim": 6}),
    "granitemoe": (
        "granitemoe",
        LOCAL
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 5.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24, "head_dim": 12},
    ),
    "gemma4": (
        "gemma4",
        {
            "text_config": GEMMA4
            | {
                "attention_k_eq_v": True,
                "num_global_key_value_heads": 1,
                "final_logit_softcapping": 4.0,
            },
            "vision_config": VISION,
            "audio_config": None,
        },
    ),
    "gemma4_text": (
        "gemma4_text",
        GEMMA4 | {"attention_bias": True, "tie_word_embeddings": False, "num_hidden_layers": 3},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 3, "head_dim": 12}),
    "qwen3_next": ("qwen3_next", DELTA | {"num_hidden_layers": 4}),
    "qwen3_next, dense between": (
        "qwen3_next",
        DELTA
        | {
            "num_hidden_layers": 5,
            "layer_types": [f"{kind}_attention" for kind in FULL_FIRST],
            "mlp_only_layers": [1],
            "attention_bias": True,
            "norm_topk_prob": False,
            "linear_num_key_heads": 3,
            "linear_conv_kernel_dim": 3,
            "rope_parameters": YARN | {"partial_rotary_factor": 0.5},
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        {
            "text_config": DELTA | {"num_hidden_layers": 4},
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 12,
                "num_heads": 2,
                "out_hidden_size": 40,
                "num_position_embeddings": 16,
            },
        },
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        DELTA | {"full_attention_interval": 2, "tie_word_embeddings": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        LOCAL
        | {
            "head_dim": 12,
            "sliding_window": 5,
            "swiglu_limit": 1.3,
            "rope_parameters": YARN | {"truncate": False},
        },
    ),
    # Square matrices of experts tell nothing of their layout.
    "gpt_oss, square, windows above": (
        "gpt_oss",
        LOCAL
        | {
            "intermediate_size": SHAPE["hidden_size"],
            "head_dim": 14,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 9,
            "swiglu_alpha": 1.1,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
}


def make_pair(case, folder):
    """A transformers model with random weights everywhere, saved in a folder, and this folder."""
    family, changes = CASES[case]
    keys = SHAPE | changes
    if "text_config" in changes:  # a model of several parts
        keys = changes | {"text_config": SHAPE | changes["text_config"]}
    config = transformers.AutoConfig.for_model(family, **keys)
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM
    if family == "qwen3_5_moe":  # of which that would be the text part alone
        auto = transformers.AutoModelForImageTextToText
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "e_score_correction_bias" in name:
                tensor.normal_(-0.5, 0.3)
            elif "A_log" in name:  # of states that last for a few tokens
                tensor.normal_(-1.5, 0.5)
            elif "inv_freq" not in name and (tensor.ndim == 1 or "bias" in name):  # norms, too
                # Those that multiply by 1 + w are made as zeros.
                tensor.normal_(0 if "norm" in name and not tensor.any() else 1, 0.3)
            elif name.endswith(ROUTERS):
                tensor.normal_(0, 0.5)
    model.eval().save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """Of each family."""
    return make_pair(request.param, tmp_path_factory.mktemp("pair") / "model")


def test_every_family_is_here():
    families = {family for family, _ in CASES.values()}
    assert families | {"kimi_k2"} == set(FAMILIES)  # which is deepseek_v3 by another name


@pytest.fixture(scope="module")
def theirs(pair):
    """Tokens, logits, a cotangent of them, and the gradients that it gives experts, by layer."""
    model, _ = pair
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SHAPE["vocab_size"], (2, 24))
    logits = model(torch.tensor(tokens)).logits
    cotangent = rng.normal(size=logits.shape).astype(np.float32)
    experts = {
        (layer, name.rsplit(".", 1)[-1].replace("_proj", "")): weight
        for layer, block in enumerate(model.get_decoder().layers)
        for name, weight in block.named_parameters()
        if ".experts." in f".{name}" and ("bias" in name or weight.ndim == 3)
    }
    grads = torch.autograd.grad((logits * torch.tensor(cotangent)).sum(), [*experts.values()])
    found = {key: grad.numpy() for key, grad in zip(experts, grads, strict=True)}
    return tokens, logits.detach().numpy(), cotangent, found


def test_logits_and_gradients_of_experts_are_those_of_transformers(pair, theirs):
    tokens, expected, cotangent, gradients = theirs
    layers = sorted({layer for layer, _ in gradients})
    met = {layer: np.flatnonzero(gradients[layer, "down"].any((1, 2))) for layer in layers}
    lowest, highest = int(met[layers[0]][0]), tuple(map(int, met[layers[-1]][-3:]))
    # Uneven, and layers in between, where there are some, select none.
    experts = ExpertConfig({layers[0]: (lowest,), layers[-1]: highest})
    model = load_model(pair[1])
    attach_tuned_experts(model, experts)
    graph, tuned, frozen = partition(model, experts)

    @jax.jit
    def call(tuned, frozen, tokens, cotangent):
        def forward(tuned):
            logits = nnx.merge(graph, tuned, frozen)(tokens).logits
            return (logits * cotangent).sum(), logits

        return jax.grad(forward, has_aux=True)(tuned)

    grads, logits = call(tuned, frozen, tokens, cotangent)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    rows = model.tuned_experts.layout.rows()
    moe_layers, layout = model.config.moe_layers, tensor_table(model.config).experts
    assert len(rows) == experts.num_experts_selected
    for (_, leaf), grad in nnx.to_flat_state(grads):
        for stacked, expert, row in rows:
            known = gradients[moe_layers[stacked], leaf][expert]
            known = known if layout.transposed else known.T
            if layout.interleaved and leaf.startswith("gate_up"):
                known = np.concatenate([known[..., ::2], known[..., 1::2]], axis=-1)
            difference = np.abs(grad.get_value()[row] - known).max() / np.abs(known).max()
            assert difference < 1e-4, (stacked, expert, leaf)


def test_decoding_is_that_of_transformers(pair, theirs):
    tokens, expected, *_ = theirs
    ours = load_model(pair[1])
    graph, params = nnx.split(ours)

    @jax.jit
    def decode(params, cache, tokens, positions):
        keep = jnp.ones(tokens.shape, bool)
        return nnx.merge(graph, params).decode(tokens, positions, keep, cache)

    cache, parts = ours.init_cache(2, 32), []
    for begin in (0, 12):
        positions = np.broadcast_to(np.arange(begin, begin + 12), (2, 12))
        part, cache = decode(params, cache, tokens[:, begin : begin + 12], positions)
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=1e-4)


@pytest.mark.parametrize("pair", ["gpt_oss", "qwen3_next"], indirect=True)
def test_documents_in_one_row_are_as_alone(pair):
    """They are a token shorter than the window of one, as long, and a token longer."""
    tokens = np.random.default_rng(3).integers(0, SHAPE["vocab_size"], (4, 18))
    lengths = [4, 5, 6]
    segments = np.where(np.arange(18) < np.array([*lengths, 0])[:, None], 1, 0)
    segments[3, : sum(lengths)] = np.repeat([1, 2, 3], lengths)
    begins = np.cumsum([0, *lengths])
    for row, length in enumerate(lengths):
        tokens[3, begins[row] : begins[row] + length] = tokens[row, :length]
    graph, params = nnx.split(load_model(pair[1]))
    logits = jax.jit(lambda p, *batch: nnx.merge(graph, p)(*batch).logits)(params, tokens, segments)
    for row, length in enumerate(lengths):
        packed = logits[3, begins[row] : begins[row] + length]
        np.testing.assert_allclose(packed, logits[row, :length], atol=1e-5)


STATEFUL = "gemma4", "gpt_oss", "qwen3_next", "qwen3_5"  # or with windows


@pytest.mark.parametrize(
    "pair", [case for case in CASES if case.startswith(STATEFUL)], indirect=True
)
def test_a_packed_row_is_its_documents(pair):
    ends, length = (0, 9, 20), 24
    tokens, segments = (np.zeros((3, length), np.int32) for _ in range(2))
    rng = np.random.default_rng(1)
    for number, (begin, end) in enumerate(itertools.pairwise(ends), 1):
        tokens[0, begin:end] = rng.integers(3, SHAPE["vocab_size"], end - begin)
        segments[0, begin:end] = number
        tokens[number, : end - begin] = tokens[0, begin:end]
        segments[number, : end - begin] = 1
    logits = run(load_model(pair[1]), tokens, segments).logits
    for number, (begin, end) in enumerate(itertools.pairwise(ends), 1):
        alone = logits[number, : end - begin]
        np.testing.assert_allclose(logits[0, begin:end], alone, atol=1e-5)


def test_an_export_has_the_same_files(pair, tmp_path):
    _, folder = pair
    export_model(folder, None, tmp_path / "export")
    expected = load_file(folder / "model.safetensors")
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor, name)


def test_whose_experts_peft_finds(pair):
    """Others it would leave out without a word, as long as it finds attention."""
    conversion = pytest.importorskip("peft.utils.transformers_weight_conversion")
    config = load_model_config(pair[1])
    like = conversion._MODEL_TO_CONVERSION_PATTERN.get(config.family)
    known = like in conversion._MOE_TARGET_MODULE_MAPPING
    assert tensor_table(config).experts.known_to_peft == known


def test_names_and_roles_fit_the_parameters(pair):
    config = load_model_config(pair[1])
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    params = {
        tuple(map(str, path)): param
        for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    filled = dict.fromkeys(params, 0)
    for name, place in tensor_table(config).places.items():
        param = params[place.path]
        assert place.role is param.role, name
        ends = [part.stop for part in place.box]
        assert all(np.array(ends) <= param.get_value().shape), name
        filled[place.path] += int(np.prod(place.shape))
    assert filled == {path: param.get_value().size for path, param in params.items()}
