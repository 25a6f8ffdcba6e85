import json
from pathlib import Path

import numpy as np
import pytest

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.routing.scores import ExpertScores
from esft_jax.select import main

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture
def scores(tmp_path):
    token = np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    ExpertScores((1, 2), token, token / 4).save(tmp_path / "scores")
    return tmp_path / "scores"


def test_writes_the_config_and_prints_the_table(scores, tmp_path, capsys):
    output = tmp_path / "expert_cfg.json"
    assert main(["--scores", str(scores), "--top-p", "0.65", "--output", str(output)]) == 0
    assert ExpertConfig.load(output) == ExpertConfig({1: (0,), 2: (2, 1)})
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if "│" in line
    ]
    assert rows == [
        ["1", "0", "1", "70.0%", "0.175"],
        ["2", "2 1", "2", "90.0%", "0.225"],
        ["all", "50.0% of 6 experts, mean cover", "3", "80.0%", "0.200"],
    ]


def test_options_reach_the_config(scores, tmp_path, capsys):
    output = tmp_path / "expert_cfg.json"
    options = ["--method", "gate", "--also", "shared_experts", "non_expert_modules"]
    assert main(["--scores", str(scores), "--output", str(output), *options]) == 0
    # Gate scores .175 .05 .025 and .025 .075 .15 with the paper's p = 0.1
    assert json.loads(output.read_text()) == {
        "experts": {"1": [0], "2": [2]},
        "shared_experts": True,
        "non_expert_modules": True,
    }
    assert "gate score, p = 0.1" in capsys.readouterr().out


def test_the_token_score_has_its_own_default(scores, tmp_path, capsys):
    assert main(["--scores", str(scores), "--output", str(tmp_path / "c.json")]) == 0
    assert "token score, p = 0.2" in capsys.readouterr().out


def test_says_when_p_takes_everything(scores, tmp_path, capsys):
    output = tmp_path / "c.json"
    main(["--scores", str(scores), "--method", "gate", "--top-p", "0.9", "--output", str(output)])
    assert "Note: this takes every expert of layer 1, 2" in capsys.readouterr().out


def test_logs_of_another_number_of_experts_per_token(tmp_path, capsys):
    (tmp_path / "expert_weights_1.txt").write_text("0\t1\t1\t2\t\t0.5\t0.25\t0.5\t0.25\n")
    output = tmp_path / "c.json"
    arguments = ["--scores", str(tmp_path), "--top-p", "0.5", "--output", str(output)]
    assert main([*arguments, "--experts-per-token", "2"]) == 0
    assert ExpertConfig.load(output) == ExpertConfig({1: (1,)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--top-p", "0"], "error: --top-p: expected greater than 0, got '0'"),
        (["--top-p", "nan"], "error: --top-p: expected less than or equal to 1, got 'nan'"),
        (["--top-k", "0"], "error: --top-k: expected greater than or equal to 1, got '0'"),
        (
            ["--random-seed", str(2**32)],
            "error: --random-seed: expected less than 4294967296, got '4294967296'",
        ),
        (["--top-k", "4"], "error: select.top_k: 4; SCORES has 3 experts per layer"),
        (
            ["--top-k", "1", "--top-p", "0.5"],
            "error: top_k: top_p is set too; expected one of them",
        ),
        (
            ["--max-bytes", "1000"],
            "error: --model: a budget needs the size of an expert; expected a model's folder",
        ),
        (
            ["--group-size", "3"],
            "error: select.group_size: the scores do not say which experts are chosen together; "
            "expected scores by `score`, routing logs, or select.groups_from",
        ),
        (
            ["--group-size", "2"],
            "error: select.group_size: 2 does not divide 3 experts",
        ),
        (["--scores", "nowhere"], "error: nowhere: cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_code_2(scores, tmp_path, capsys, change, message):
    output = tmp_path / "c.json"
    assert main(["--scores", str(scores), "--output", str(output), *change]) == 2
    captured = capsys.readouterr()
    assert captured.err == message.replace("SCORES", str(scores)) + "\n"
    assert captured.out == ""
    assert not output.exists()


def test_several_tasks_and_random_controls(scores, tmp_path, capsys):
    ExpertConfig({1: (2,), 2: (1,)}).save(tmp_path / "other.json")
    output = tmp_path / "c.json"
    both = ["--scores", str(scores), str(tmp_path / "other.json"), "--output", str(output)]
    assert main([*both]) == 0
    assert ExpertConfig.load(output) == ExpertConfig({1: (0, 2), 2: (2, 1)})
    assert "4 experts by token score, p = 0.2, union of 2 tasks" in capsys.readouterr().out
    assert main([*both, "--combine", "intersection"]) == 2
    assert "the intersection of the tasks' experts is empty" in capsys.readouterr().err
    one = ["--scores", str(tmp_path / "other.json"), "--output", str(output)]
    assert main([*one, "--random-seed", "3"]) == 2
    assert "--model: random experts need their number" in capsys.readouterr().err
    assert main([*one, "--top-k", "1"]) == 2
    assert "other.json: is a selection already" in capsys.readouterr().err
    three = ["--scores", str(scores), "--top-k", "2", "--random-seed", "3"]
    assert main([*three, "--output", str(output)]) == 0
    chosen = ExpertConfig.load(output)
    assert [len(set(ids)) for ids in chosen.experts.values()] == [2, 2]


def test_a_budget_in_bytes_of_a_model(base, tmp_path, capsys):
    rng = np.random.default_rng(0)
    token = rng.dirichlet(np.ones(8), size=3)
    ExpertScores((1, 2, 3), token, token / 2).save(tmp_path)
    output = tmp_path / "c.json"
    expert = 2 * 3 * 32 * 16  # bfloat16
    given = ["--scores", str(tmp_path), "--output", str(output), "--model", str(base)]
    for spare, count in (0, 5), (expert - 1, 5), (-1, 4):
        assert main([*given, "--max-bytes", str(5 * expert + spare)]) == 0
        assert ExpertConfig.load(output).num_experts_selected == count
    assert main([*given, "--max-bytes", str(5 * expert), "--dtype", "float32"]) == 0
    assert ExpertConfig.load(output).num_experts_selected == 2
    assert main([*given, "--max-bytes", str(expert - 1)]) == 2
    error = capsys.readouterr().err
    assert f"select.max_bytes: {expert - 1:,} is too little; one expert takes {expert:,}" in error


@pytest.mark.parametrize(
    ("name", "model", "problem"),
    [
        (
            "Qwen3-Coder-30B-A3B-Instruct",
            "qwen3-30b-a3b",
            "in layers 1 to 48; the model has 128 in 0 to 47; expected layers counted from 0",
        ),
        ("GLM-4.5-Air", "glm-4.5-air", None),
    ],
)
def test_published_scores_of_other_models_as_they_are(
    esft_sample, tmp_path, capsys, name, model, problem
):
    # GLM's summary has a layer for multi-token prediction, which nobody has scored.
    output = tmp_path / "c.json"
    given = ["--scores", str(esft_sample / f"{name}_summary.json"), "--output", str(output)]
    assert main(given) == 0
    assert "gate share" in capsys.readouterr().out
    published = ExpertConfig.load(esft_sample / f"{name}_expert_config.json")
    assert ExpertConfig.load(output) == published
    assert main([*given, "--method", "gate"]) == 2
    assert "summary.json: method: gate: these are gate shares" in capsys.readouterr().err
    assert main([*given, "--model", str(MODELS / model)]) == (2 if problem else 0)
    assert (problem or "") in capsys.readouterr().err


def test_released_configuration_from_the_command_line(esft_reference, tmp_path, capsys):
    results = esft_reference / "results"
    output = tmp_path / "expert_cfg.json"
    logs = str(results / "expert_scores" / "intent")
    assert main(["--scores", logs, "--method", "token", "--output", str(output)]) == 0
    assert output.read_bytes() == (results / "expert_configs" / "intent.json").read_bytes()
    assert "7.5% of 1664 experts" in capsys.readouterr().out
