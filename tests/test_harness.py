"""lm-evaluation-harness: local tasks through the command, and every request against `HFLM`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pytest
from lm_eval._cli.harness import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.config.evaluate_config import EvaluatorConfig

from esft_jax import harness
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import save_adapter, trained_names
from esft_jax.checkpoint.export import export_model
from esft_jax.checkpoint.load import load_base
from esft_jax.config import QuantiseConfig
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.evaluation import lm_eval_model
from esft_jax.evaluation.lm_eval_model import EsftJaxLM
from esft_jax.model.quantised import is_quantised

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

FOLDER = Path(__file__).parents[1] / "models" / "tiny-moe"
CHOICES = [
    {"question": "def add(a, b):\n    return a", "choices": [" + b", " God", " the"], "answer": 0},
    {"question": "And God said, Let there be", "choices": [" return", " light"], "answer": 1},
    {"question": "In the beginning God created the ", "choices": ["heaven", "self."], "answer": 0},
]
COMPLETIONS = [
    {"question": "12 + 7 =", "answer": "19"},
    {"question": "And the LORD said unto", "answer": "Moses"},
]


def requests(kind: str, arguments: list[Any]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def long_text(words: int) -> str:
    rng = np.random.default_rng(0)
    return " ".join(rng.choice(["light", "return", "water", "self", "earth", "day"], words))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of the embedded model, changed enough to be seen."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    base = load_base(FOLDER, jnp.float32)
    experts = ExpertConfig({2: (3, 17), 5: tuple(range(16))})
    names = trained_names(base.source.config, experts, "")
    tensors = [(name, 1.2 * base.source.tensor(name).astype(np.float32)) for name in names]
    save_adapter(folder, tensors, experts, {"base_fingerprint": base.fingerprint})
    return folder


@pytest.fixture(scope="module")
def models(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EsftJaxLM, "HFLM"]:
    """Ours, of a base and an adapter, and the harness's own, of the exported model."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="needs torch")
    exported = tmp_path_factory.mktemp("exported") / "model"
    export_model(FOLDER, adapter, exported, dtype=jnp.float32)
    common: dict[str, Any] = {"batch_size": 16, "max_length": 96}
    theirs = huggingface.HFLM(pretrained=str(exported), device="cpu", dtype="float32", **common)
    ours = EsftJaxLM(str(FOLDER), str(adapter), dtype="float32", **common)
    return ours, theirs


def test_log_likelihoods_equal_those_of_transformers(models: tuple[EsftJaxLM, "HFLM"]) -> None:
    ours, theirs = models
    pairs = [(row["question"], choice) for row in CHOICES for choice in row["choices"]]
    pairs += [
        ("", "In the beginning"),  # after BOS, the prefix
        ("a space moves to the continuation ", "of the pair"),
        (long_text(200), " light"),  # cut from the left
        ("<｜begin▁of▁sentence｜>User: 2 + 2 =\n\nAssistant:", " 4"),
        ("x", long_text(80)),  # more than one chunk of positions
        ("And the LORD said", " unto"),  # what greedy decoding says
    ]
    found = ours.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}
    # The adapter counts.
    base = EsftJaxLM(str(FOLDER), dtype="float32", max_length=96)
    untuned = base.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert np.abs(np.subtract([v for v, _ in untuned], [v for v, _ in found])).max() > 0.05


def test_rolling_log_likelihoods_equal_those_of_transformers(
    models: tuple[EsftJaxLM, "HFLM"],
) -> None:
    texts = [("And God said, Let there be light.",), (long_text(250),), ("x",)]
    ours, theirs = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
        for model in models
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3, rtol=1e-5)


@pytest.mark.slow
def test_completions_equal_those_of_transformers(models: tuple[EsftJaxLM, "HFLM"]) -> None:
    greedy = {"until": ["\n"], "max_gen_toks": 40, "do_sample": False}
    arguments = [
        ("And the LORD said unto", greedy),
        (long_text(200), {"until": [], "max_gen_toks": 8}),  # cut from the left
        ("def add(a, b):", {"until": ["return", ":"], "max_new_tokens": 12, "temperature": 0.0}),
        ("User: 1, 2, 3\n\nAssistant:", greedy),
    ]
    # One by one: a batch of theirs is padded from the left, and padding is no part of a text.
    ours, theirs = (
        [
            model.generate_until(requests("generate_until", [each]), disable_tqdm=True)[0]
            for each in arguments
        ]
        for model in models
    )
    assert ours == theirs
    together = models[0].generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert together == ours


@pytest.mark.slow
def test_long_completions_end_soon_after_a_stop_sequence(
    models: tuple[EsftJaxLM, "HFLM"], monkeypatch: pytest.MonkeyPatch
) -> None:
    from esft_jax.decode import generation as generate

    blocks: list[int] = []
    extend = generate._extend

    def spy(*args: Any) -> Any:
        blocks.append(int(args[4]))
        return extend(*args)

    monkeypatch.setattr(generate, "_extend", spy)
    monkeypatch.setattr(generate, "_STOP_BLOCK", 4)
    options = {"max_gen_toks": 48}
    ours = models[0]
    arguments = [("And the LORD said unto", {**options, "until": []})]
    (whole,) = ours.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert blocks[-1] == 48
    word = whole.split()[3]
    blocks.clear()
    arguments = [("And the LORD said unto", {**options, "until": [word]})]
    (short,) = ours.generate_until(requests("generate_until", arguments), disable_tqdm=True)
    assert short == whole[: whole.index(word)]
    assert blocks[-1] < 48


@pytest.mark.slow
def test_sampling_is_seeded_and_sampled(models: tuple[EsftJaxLM, "HFLM"]) -> None:
    sampled = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0}
    arguments = [("And God", sampled), ("And God", sampled)]
    first, again = (
        models[0].generate_until(requests("generate_until", arguments), disable_tqdm=True)
        for _ in range(2)
    )
    assert first == again
    assert first[0] != first[1]


def test_bos_and_chats(models: tuple[EsftJaxLM, "HFLM"]) -> None:
    ours, theirs = models
    chat = [
        {"role": "user", "content": "2 + 2 ="},
        {"role": "assistant", "content": "It is"},
    ]
    assert ours.apply_chat_template(chat[:1]) == theirs.apply_chat_template(chat[:1])
    begun = ours.apply_chat_template(chat, add_generation_prompt=False)
    assert begun == theirs.apply_chat_template(chat, add_generation_prompt=False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tok_encode(begun) == theirs.tok_encode(begun)
    assert ours.tok_encode("a b") == theirs.tok_encode("a b")
    with_bos = EsftJaxLM(str(FOLDER), dtype="float32", add_bos_token=True)
    assert with_bos.tok_encode("a b") == [with_bos.prefix_token_id, *ours.tok_encode("a b")]
    assert with_bos.tok_encode(begun) == ours.tok_encode(begun)
    assert with_bos.tok_encode("a b", add_special_tokens=False) == ours.tok_encode("a b")


def test_a_text_is_as_likely_with_its_bos(
    models: tuple[EsftJaxLM, "HFLM"], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = models[0]
    asked: list[Any] = []

    def spy(model: Any, pairs: Any, **options: Any) -> Any:
        asked.append(pairs)
        return [(0.0, False) for _ in pairs]

    monkeypatch.setattr(lm_eval_model, "continuation_likelihoods", spy)
    bos = Tokenizer.load(FOLDER).render([])
    arguments = [("a b",), (bos + "a b",)]
    ours.loglikelihood_rolling(requests("loglikelihood_rolling", arguments), disable_tqdm=True)
    ((plain, marked),) = asked
    assert plain == marked == ([ours.prefix_token_id], ours.tok_encode("a b"))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two tasks on local files: one of choices, one of completions."""

    def add(name: str, rows: list[dict], lines: list[str]) -> None:
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = [
            f"task: {name}",
            "dataset_path: json",
            f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}",
            "test_split: test",
            "doc_to_text: '{{question}}'",
        ]
        (tmp_path / f"{name}.yaml").write_text("\n".join([*common, *lines]) + "\n")

    add(
        "local_choices",
        CHOICES,
        [
            "output_type: multiple_choice",
            "doc_to_choice: '{{choices}}'",
            "doc_to_target: '{{answer}}'",
            "target_delimiter: ''",
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
        ],
    )
    add(
        "local_completions",
        COMPLETIONS,
        [
            "output_type: generate_until",
            "doc_to_target: '{{answer}}'",
            "generation_kwargs: {until: [\"\\n\", '.'], max_gen_toks: 8, do_sample: false}",
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
        ],
    )
    return tmp_path


@pytest.mark.slow
def test_the_command_runs_local_tasks(tasks: Path, adapter: Path) -> None:
    """In a process of its own: the library sets up logging for the whole process."""
    model = f"pretrained={FOLDER},adapter={adapter},dtype=float32,expert=2,data=1"
    command = [sys.executable, "-m", "esft_jax.harness", "--model_args", model, "--log_samples"]
    command += ["--tasks", "local_choices,local_completions", "--include_path", str(tasks)]
    command += ["--output_path", str(tasks / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|local_choices" in done.stdout
    (results,) = tasks.glob("results_*.json")
    scores = json.loads(results.read_text())["results"]
    assert scores["local_choices"]["acc,none"] == 1.0
    assert 0 <= scores["local_completions"]["exact_match,none"] <= 1
    (samples,) = tasks.glob("samples_local_completions_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    # On two devices as on one.
    alone = EsftJaxLM(str(FOLDER), str(adapter), dtype="float32", data=1)
    options = {"until": ["\n", "."], "max_gen_toks": 8}
    contexts = [(row["question"], options) for row in COMPLETIONS]
    assert answers == alone.generate_until(requests("generate_until", contexts), disable_tqdm=True)

    command[4] = f"pretrained={FOLDER},adapter=nowhere"
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1] == (
        "error: nowhere: no such folder; expected an adapter"
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"dtype": "float64"}, "dtype: 'float64'; expected bfloat16 or float32"),
        ({"adaptor": "x"}, "adaptor: no argument of this model"),
        ({"max_length": 4096}, "max_length: 4096; expected 2 to 2048"),
        ({"batch_size": "auto"}, "batch_size: 'auto'; expected a number of requests"),
        ({"expert": 3}, "mesh.expert: 3 does not divide the 8 devices"),
    ],
)
def test_wrong_model_arguments_are_named(argument: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EsftJaxLM(str(FOLDER), **argument)


def test_without_the_library_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    assert harness.main([]) == 2
    assert "expected an installation with the extra `harness`" in capsys.readouterr().err


def test_a_file_of_settings_counts_for_more_than_our_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[EvaluatorConfig] = []

    def read_settings() -> None:
        found.append(EvaluatorConfig.from_cli(HarnessCLI().parse_args()))

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", read_settings)
    path = tmp_path / "settings.yaml"
    path.write_text("{batch_size: 64, model_args: {pretrained: x}, tasks: [arc_easy]}")
    for arguments in (["--tasks", "arc_easy"], ["-C", str(path)]):
        assert harness.main(arguments) == 0
    path.write_text("{model: dummy, tasks: [arc_easy]}")
    assert harness.main([f"--config={path}", "--batch_size", "8"]) == 0
    settings = [(each.model, str(each.batch_size)) for each in found]
    assert settings == [("esft_jax", "16"), ("esft_jax", "64"), ("dummy", "8")]


def test_a_file_of_settings_that_is_missing_is_named(capsys: Any) -> None:
    assert harness.main(["--config", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere.yaml: cannot be read")


def test_wrong_requests_are_named(
    models: tuple[EsftJaxLM, "HFLM"], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = models[0]
    monkeypatch.delattr(lm_eval_model, "generate_tokens")
    too_long = requests("loglikelihood", [("a", long_text(100))])
    with pytest.raises(InputError, match="pair 0: a continuation of .* expected at most 96"):
        ours.loglikelihood(too_long, disable_tqdm=True)
    right = {"until": [], "max_gen_toks": 4}
    for options, message in [
        ({"until": [], "max_gen_toks": 96}, "max_gen_toks: 96; expected at most 95"),
        ({"until": [], "num_beams": 4}, "num_beams: not supported"),
        ({**right, "temperature": 1.0, "top_p": 2.0}, "top_p: 2.0 is out of range"),
    ]:
        # Before anything is decoded.
        both = requests("generate_until", [("a", right), ("a", options)])
        with pytest.raises(InputError, match=message):
            ours.generate_until(both, disable_tqdm=True)


def test_weights_are_held_quantised_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    found: list[EvaluatorConfig] = []

    def read_settings() -> None:
        found.append(EvaluatorConfig.from_cli(HarnessCLI().parse_args()))

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", read_settings)
    arguments = ["--model_args", f"pretrained={FOLDER}", "--tasks", "arc_easy"]
    for quantise in (["--quantise=experts=int8"], ["--quantise", "experts=int8"]):
        assert harness.main([*quantise, *arguments]) == 0
    expected = {
        "pretrained": str(FOLDER),
        "quantise_experts": "int8",
        "quantise_group_size": QuantiseConfig.group_size,
    }
    assert [each.model_args for each in found] == [expected] * 2
    loaded = EsftJaxLM(**found[0].model_args, data=1)
    assert is_quantised(loaded._model)

    assert harness.main([*arguments, "--quantise", "experts=int3"]) == 2
    assert "--quantise: experts: expected 'none', 'int8'" in capsys.readouterr().err
    path = tmp_path / "settings.yaml"
    path.write_text("{model_args: {pretrained: x}, tasks: [arc_easy]}")
    assert harness.main(["--config", str(path), "--quantise", "experts=int8"]) == 2
    assert "the configuration has model_args" in capsys.readouterr().err
