"""Test session: eight CPU devices, a compilation cache, golden data, a tiny model and task."""

import json
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jaxtyping
import pytest

import tests.typecheck  # noqa: F401, the hook finds it by this name

# What computes with arrays. Left out is what numba compiles from its source.
CHECKED = [
    *("esft_jax.adapt", "esft_jax.checking", "esft_jax.decode", "esft_jax.model"),
    "esft_jax.routing",
    *(f"esft_jax.moe.{name}" for name in ("carry", "dispatch", "experts", "layer", "transport")),
    *(
        f"esft_jax.moe.grouped_matmul.{name}"
        for name in ("bank", "groups", "operation", "single_row", "xla", "tpu", "gpu")
    ),
    "esft_jax.moe.weights",
    *(
        f"esft_jax.ops.{name}"
        for name in ("activation", "causal_convolution", "cross_entropy", "delta_rule")
    ),
    *(f"esft_jax.ops.attention.{name}" for name in ("operation", "xla", "tpu", "gpu")),
    *(
        f"esft_jax.training.{name}"
        for name in ("step", "state", "optimizer", "factored", "muon", "rounding", "hashing")
    ),
]

# Shapes and types are what their annotations say, in every call. Not in `pytest_configure`: the
# conftest of a folder that pytest is given may import the package before it.
jaxtyping.install_import_hook(CHECKED, "tests.typecheck.typechecked")


def pytest_configure(config: pytest.Config) -> None:
    """Set up JAX through the environment: nothing has imported it yet, and subprocesses inherit."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Compiling is most of what the tests do; optimising machine code is half of compiling.
    os.environ["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    # The fusion emitters of JAX 0.10 take longer than all other compiling. Later ones know no
    # such flag, and a flag that is not known ends the process.
    if version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
    if hasattr(config, "cache"):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    # Tests use what they bring along, never the network.
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps() -> Iterator[None]:
    """Compiled programs are let go before they use up the memory maps that Linux grants a process,
    65,530 by default: one that gets none ends the process.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        import jax

        jax.clear_caches()


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are not checked: for what a function refuses by itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def esft_reference() -> Path:
    """A checkout of the ESFT reference (golden data): the folder in ESFT_REFERENCE."""
    folder = os.environ.get("ESFT_REFERENCE")
    if not folder:
        pytest.skip("golden data: set ESFT_REFERENCE to a checkout of github.com/deepseek-ai/ESFT")
    return Path(folder)


@pytest.fixture(scope="session")
def esft_sample() -> Path:
    """Published scores and selections of two other models (golden data): the folder in ESFT_SAMPLE,
    or `sample-esft` beside that in ESFT_REFERENCE.
    """
    folder = os.environ.get("ESFT_SAMPLE")
    if not folder and (reference := os.environ.get("ESFT_REFERENCE")):
        folder = str(Path(reference).resolve().parent / "sample-esft")
    if not folder or not Path(folder).is_dir():
        pytest.skip(
            "golden data: set ESFT_SAMPLE to `results` of github.com/aws-samples/sample-ESFT"
        )
    return Path(folder)


# A model that compiles and runs in seconds, with the embedded model's tokenizer.
TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "dtype": "float32",
    "torch_dtype": "float32",
}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder: random weights in the shape of `TINY`, float32."""
    # Not before `pytest_configure` has set up the environment of JAX.
    from flax import nnx

    from esft_jax.checkpoint.export import save_model
    from esft_jax.families import load_model_config
    from esft_jax.model import Transformer

    embedded = Path(__file__).parents[1] / "models" / "tiny-moe"
    template = tmp_path_factory.mktemp("template")
    for path in embedded.glob("*token*.json"):
        shutil.copy(path, template)
    raw = json.loads((embedded / "config.json").read_text()) | TINY
    (template / "config.json").write_text(json.dumps(raw))
    model = Transformer(load_model_config(template), rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(model, folder, template)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short chats."""
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {n} plus {n}?"},
                {"role": "assistant", "content": f"It is {2 * n}."},
            ]
        }
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def short_run(base: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration file of twenty steps, for commands in processes of their own."""
    content = {
        "model": str(base),
        "output": "unset",
        "dtype": "float32",
        "data": {"train": [str(chats)], "valid": [str(chats)], "sequence_length": 32},
        "score": {"samples": 8, "sequence_length": 32, "batch_size": 8},
        "select": {"top_p": 0.3},
        "train": {
            "steps": 20,
            "batch_size": 8,
            "eval_every": 10,
            "save_every": 5,
            "log_every": 1,
            "verify_frozen": True,
        },
        "optimizer": {"learning_rate": 1e-3},
    }
    path = tmp_path_factory.mktemp("config") / "run.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="session")
def lite(tmp_path_factory: pytest.TempPathFactory):
    """A small DeepSeek-V2-Lite, here and in transformers (`tests.model.parity`)."""
    from tests.model.parity import LITE, make_pair

    return make_pair(tmp_path_factory.mktemp("pair") / "lite", **LITE)


@pytest.fixture(scope="session")
def v2(tmp_path_factory: pytest.TempPathFactory):
    """A small DeepSeek-V2, here and in transformers."""
    from tests.model.parity import V2, make_pair

    return make_pair(tmp_path_factory.mktemp("pair") / "v2", **V2)


@pytest.fixture(scope="session", params=["lite", "v2"])
def pair(request: pytest.FixtureRequest):
    """Each of both."""
    return request.getfixturevalue(request.param)
