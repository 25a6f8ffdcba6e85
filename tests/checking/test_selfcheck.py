"""`selfcheck`: what is right passes, and a kernel that is broken on purpose is found."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from esft_jax import selfcheck
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.checking.check import GRADIENTS, check_kernel, check_kernels
from esft_jax.checking.experts import expert_kernels
from esft_jax.checking.kernel import RESULT, Limits, Subject
from esft_jax.checking.run import default_configs
from esft_jax.checking.small_step import small_model
from esft_jax.checking.tokens import token_kernels
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.ops.platform import KERNELS, fastest_implementation, portable
from esft_jax.ops.quantisation import Quantisation
from esft_jax.ops.quantised import Quantised

MODELS = Path(__file__).parents[2] / "models"
LIMITS = Limits(tokens=96, timed_tokens=32, host_operations=1e8, bank=2**20)
OURS = f"esft_jax.moe.grouped_matmul.{fastest_implementation()}"


def subject(name, method="esft", quantised=None, dtype="float32", length=128):
    model = small_model(load_model_config(MODELS / name))
    experts = ExpertConfig(dict.fromkeys(model.moe_layers, (0, 3, 5)))
    trained = {"esft": experts, "full": None}.get(method)
    if method == "lora":
        trained = LoRA.on(model, 4, 8.0, ("selected_experts",), experts)
    how = Quantisation(quantised, None, 32) if quantised else None
    return Subject(model, trained, how, dtype, length)


def findings(subject, *names):
    """Of the kernels with such names, in the subject's type."""
    for kernels in (expert_kernels, token_kernels):
        for make in kernels(subject, subject.dtype, LIMITS):
            if make(True).name in names:
                yield from check_kernel(make, False, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "quantised", "dtype", "expected"),
    [
        (
            "gpt-oss-20b",
            "esft",
            "mxfp4",
            "bfloat16",
            {
                "experts gate_up, mxfp4",
                "experts gate_up_bias",
                "experts down, mxfp4",
                "experts down_bias",
                "attention, sinks",
                "attention, window 32, sinks",
                "loss",
            },
        ),
        (
            "qwen3.6-35b-a3b",
            "lora",
            "int8",
            "float32",
            {
                "experts gate_up, int8",
                "update of experts gate_up",
                "experts down, int8",
                "update of experts down",
                "attention",
                "delta rule",
                "convolution",
                "loss",
            },
        ),
        (
            "gemma-4-26b-a4b",
            "full",
            None,
            "bfloat16",
            {
                "experts gate_up",
                "experts down",
                "attention",
                "attention, window 32",
                "loss, soft cap",
            },
        ),
    ],
)
def test_every_kernel_of_a_model_is_right(name, method, quantised, dtype, expected):
    found = list(check_kernels(subject(name, method, quantised, dtype), LIMITS, None))
    assert {finding.what for finding in found} == expected
    assert {finding.dtype for finding in found} == {dtype, "float32"}
    assert [finding.problem for finding in found if finding.problem] == []
    assert all(f.error > 0 for f in found if f.what != "loss")  # something was compared
    timed = {finding.dtype for finding in found if finding.time}
    assert timed == {dtype}


def wrong_tile(array):
    """One percent off in one tile of the last two axes, if there are two."""
    tile = (..., slice(0, 16), slice(0, 16)) if array.ndim > 1 else slice(0, 16)
    # Not in the array's type, in which the factor would be another one.
    return array.at[tile].set((1.01 * array[tile].astype(jnp.float32)).astype(array.dtype))


def by_head(array):
    """Or back to the order of tokens; vectors as they are."""
    return array if array.ndim == 1 else array.swapaxes(1, 2)


@jax.custom_vjp
def wrong_gradient(array):
    """The array; its gradient is wrong."""
    return array


wrong_gradient.defvjp(lambda array: (array, None), lambda _, grad: (wrong_tile(grad),))


def wrong_products(transposed, quantised=False):
    def breaking(module):
        right = module.multiply

        def multiply(x, banks, groups, **how):
            out = right(x, banks, groups, **how)
            kinds = [isinstance(bank.matrices, Quantised) for bank in banks]
            broken = how["transposed"] == transposed and any(kinds) >= quantised
            return wrong_tile(out) if broken else out

        return {"multiply": multiply}

    return breaking


def wrong_weight_gradient(module):
    right = module.weight_gradient
    return {"weight_gradient": lambda *operands: wrong_tile(right(*operands))}


def wrong_attention(of):
    def breaking(module):
        right = module.causal_attention

        def attend(*operands):
            operands = [
                by_head(wrong_gradient(by_head(a))) if of == i else a
                for i, a in enumerate(operands)
            ]
            out = right(*operands)
            return by_head(wrong_tile(by_head(out))) if of == RESULT else out

        return {"causal_attention": attend}

    return breaking


def wrong_delta_rule(of):
    def breaking(module):
        right = module.gated_delta_rule

        def rule(**operands):
            if of != RESULT:
                operands[of] = by_head(wrong_gradient(by_head(operands[of])))
            out, state = right(**operands)
            return (by_head(wrong_tile(by_head(out))) if of == RESULT else out), state

        return {"gated_delta_rule": rule}

    return breaking


def wrong_convolution(of):
    def breaking(module):
        right = module.causal_convolution

        def convolve(**operands):
            if of != RESULT:
                operands[of] = wrong_gradient(operands[of])
            out, after = right(**operands)
            return (wrong_tile(out) if of == RESULT else out), after

        return {"causal_convolution": convolve}

    return breaking


def wrong_loss(of):
    def breaking(module):
        right = module._scan_chunks

        def scan(hidden, *operands, **how):
            (_, rows), dhidden, dhead = right(hidden, *operands, **how)
            if of == RESULT:
                rows = rows.at[0].multiply(1.01)
            elif of == "hidden" and dhidden is not None:
                dhidden = wrong_tile(dhidden)
            elif of == "head" and dhead is not None:
                dhead = wrong_tile(dhead)
            return (rows.sum(), rows), dhidden, dhead

        return {"_scan_chunks": scan}

    return breaking


def named(part):
    return RESULT if part == RESULT else GRADIENTS


XLA = "esft_jax.ops.attention.xla"
TOKENS = "esft_jax.checking.tokens"
LITE, LINEAR = "deepseek-v2-lite", "qwen3.6-35b-a3b"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of", "kernel", "module", "breaking", "part"),
    [
        ((LITE,), "experts gate_up", OURS, wrong_products(False), RESULT),
        ((LITE,), "experts down", OURS, wrong_products(True), "x"),
        ((LITE,), "experts down", OURS, wrong_weight_gradient, "tuned"),
        ((LITE, "full"), "experts gate_up", OURS, wrong_weight_gradient, "base"),
        ((LITE, "esft", "int4"), "experts down, int4", OURS, wrong_products(False, True), RESULT),
        ((LITE, "esft", "int8"), "experts down, int8", OURS, wrong_products(True, True), "x"),
        ((LITE, "esft", "fp8"), "experts down, fp8", OURS, wrong_products(False, True), RESULT),
        ((LITE, "lora"), "update of experts down", OURS, wrong_products(False), RESULT),
        ((LITE, "lora"), "update of experts gate_up", OURS, wrong_weight_gradient, "a"),
        (("gpt-oss-20b",), "experts down_bias", OURS, wrong_weight_gradient, "tuned"),
        ((LITE,), "attention", XLA, wrong_attention(RESULT), RESULT),
        (("gpt-oss-20b",), "attention, window 32, sinks", XLA, wrong_attention(0), "query"),
        (("gpt-oss-20b",), "attention, window 32, sinks", XLA, wrong_attention(6), "sinks"),
        ((LITE,), "attention", XLA, wrong_attention(1), "key"),
        ((LITE,), "attention", XLA, wrong_attention(2), "value"),
        ((LINEAR,), "delta rule", TOKENS, wrong_delta_rule(RESULT), RESULT),
        ((LINEAR,), "delta rule", TOKENS, wrong_delta_rule("key"), "key"),
        ((LINEAR,), "convolution", TOKENS, wrong_convolution(RESULT), RESULT),
        ((LINEAR,), "convolution", TOKENS, wrong_convolution("weight"), "weight"),
        ((LITE,), "loss", "esft_jax.ops.cross_entropy", wrong_loss(RESULT), RESULT),
        ((LITE,), "loss", "esft_jax.ops.cross_entropy", wrong_loss("hidden"), "hidden"),
        ((LITE,), "loss", "esft_jax.ops.cross_entropy", wrong_loss("head"), "head"),
    ],
)
def test_one_percent_in_one_tile_is_found(of, kernel, module, breaking, part, monkeypatch):
    module = importlib.import_module(module)
    for name, broken in breaking(module).items():
        monkeypatch.setattr(module, name, broken)
    # Of bfloat16, in which roundings hide most; on CPUs it has attention in plain XLA.
    found = {f.part: f for f in findings(subject(*of, **{"dtype": "bfloat16"}), kernel)}
    wrong = found[named(part)]
    assert wrong.worst == part and wrong.error > wrong.tolerance
    assert wrong.problem.startswith(f"{kernel} (bfloat16, ")
    of_what = RESULT if part == RESULT else f"gradient of {part}"
    assert f"{of_what}: error" in wrong.problem and "expected at most" in wrong.problem
    if wrong.implementation != "xla":
        assert "ESFT_KERNELS=xla" in wrong.problem
    if part != RESULT:
        assert found[RESULT].problem is None


def test_a_kernel_that_does_not_run_is_found(monkeypatch):
    def fail(*operands, **how):
        raise NotImplementedError("no such\ninstruction")

    module = importlib.import_module(OURS)
    monkeypatch.setattr(module, "multiply", fail)
    (found,) = findings(subject(LITE), "experts down")
    assert "it does not run: no such instruction" in found.problem
    assert found.error == float("inf")


@pytest.fixture
def command(base, tmp_path, short_run):
    """Run `selfcheck` on a tiny model."""
    content = json.loads(short_run.read_text()) | {"output": str(tmp_path / "run")}
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    output = tmp_path / "found.json"

    def run(*overrides):
        arguments = ["--config", str(path), "--json", str(output), *overrides]
        return selfcheck.main(arguments), json.loads(output.read_text())

    return run


def test_the_command(command, capsys):
    code, (report,) = command("dtype=bfloat16")
    printed = " ".join(capsys.readouterr().out.split())
    assert code == 0 and report["right"]
    assert "All 20 checks are right." in printed and "unknown" in printed
    assert {finding["what"] for finding in report["findings"]} == {
        "experts gate_up",
        "experts down",
        "attention",
        "loss",
        "training step",
    }
    assert report["findings"][0]["time"]["seconds"] > 0


@pytest.mark.slow
def test_a_step_with_a_wrong_kernel_ends_with_1(command, capsys, monkeypatch):
    assert fastest_implementation() != "xla", "the `cpu` extra"
    module = importlib.import_module(OURS)
    broken = wrong_weight_gradient(module)["weight_gradient"]
    monkeypatch.setattr(module, "weight_gradient", broken)
    code, (report,) = command("dtype=float32")
    wrong = [finding for finding in report["findings"] if finding["problem"]]
    assert code == 1 and not report["right"]
    assert {finding["what"] for finding in wrong} == {
        "experts gate_up",
        "experts down",
        "training step",
    }
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{len(wrong)} of 10 checks are wrong:" in printed
    assert "ESFT_KERNELS=xla in the environment is right" in printed


def test_without_a_configuration_two_models_are_checked():
    configs = list(default_configs())
    assert [Path(config.model).name for config in configs] == ["deepseek-v2-lite", "qwen3-30b-a3b"]
    assert [config.quantise.experts for config in configs] == ["none", "int4"]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*/config.json")), ids=lambda p: p.parent.name)
def test_a_small_model_has_every_kind_of_layer(path):
    model = load_model_config(path.parent)
    small = small_model(model)
    kinds = [
        {(layer in m.moe_layers, m.kind(layer)) for layer in range(m.num_layers)}
        for m in (model, small)
    ]
    assert kinds[0] == kinds[1] and small.num_layers <= 4
    assert dataclasses.replace(small.router, num_experts=0, top_k=0) == dataclasses.replace(
        model.router, num_experts=0, top_k=0
    )
    assert small.logit_cap == model.logit_cap and small.activation == model.activation


def test_kernels_can_be_done_without(monkeypatch):
    assert fastest_implementation() != "xla"
    with portable():
        assert fastest_implementation() == "xla"
    monkeypatch.setenv(KERNELS, "xla")
    assert fastest_implementation() == "xla"
    monkeypatch.setenv(KERNELS, "fast")
    with pytest.raises(InputError, match="ESFT_KERNELS: 'fast'; expected xla, or nothing"):
        fastest_implementation()
