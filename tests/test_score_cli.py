"""`python -m esft_jax.score`: what it writes, and what it refuses before any weight is read."""

from pathlib import Path

import pytest

from esft_jax import score, select
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.routing.scores import load_scores


@pytest.mark.parametrize("named", [True, False])
def test_writes_scores_where_it_is_told(short_run: Path, tmp_path: Path, named: bool) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    options = ["--output", str(other)] if named else []
    assert score.main(["--config", str(short_run), f"output={run}", "mesh.data=1", *options]) == 0
    scores = load_scores(other if named else run / "scores")
    assert scores.provenance["samples"] == 8
    assert (run / "scores").exists() != named


def test_a_place_that_cannot_be_written_to(short_run: Path, tmp_path: Path, capsys) -> None:
    """Not after a forward pass of everything."""
    (tmp_path / "file").write_text("")
    arguments = ["--config", str(short_run), f"output={tmp_path / 'run'}", "mesh.data=1"]
    arguments += ["--output", str(tmp_path / "file")]
    assert score.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err == f"error: --output: {tmp_path / 'file'} is a file; expected a folder\n"
    assert not captured.out


def test_random_weights_are_not_scored(short_run: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--config", str(short_run), f"output={tmp_path}", "mesh.data=1"]
    arguments += ["method=full", "init=random", "train.verify_frozen=false"]
    assert score.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: init: random weights have no experts")


def test_scores_that_are_asked_for(short_run: Path, chats: Path, tmp_path: Path, capsys) -> None:
    """All in one file; the run's own choice and `select` read them there."""
    run, further = tmp_path / "run", "contribution, contrast, gate_taylor, random"
    general = f"score={{methods: [{further}], general: ['{chats}'], general_format: messages, "
    general += "samples: 8, sequence_length: 32, batch_size: 8}"
    arguments = ["--config", str(short_run), f"output={run}", "mesh.data=2", "mesh.expert=2"]
    arguments += ["select={method: contrast, top_k: 2}", general]
    assert score.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "general sample: " in printed and "a choice by contrast, 2 per layer" in printed
    scores = load_scores(run / "scores")
    assert scores.methods == ("token", "gate", "gate_share", *further.split(", "))
    assert scores.provenance["general_samples"] == 8
    assert scores.provenance["general_sha256"] == scores.provenance["data_sha256"]
    # The same rows of the same files.
    expected = scores.token / (scores.token + 1 / 8)
    assert scores.contrast == pytest.approx(expected / expected.sum(axis=1, keepdims=True))
    for method in further.split(", "):
        output = tmp_path / f"{method}.json"
        options = ["--scores", str(run / "scores"), "--method", method, "--top-k", "2"]
        assert select.main([*options, "--output", str(output)]) == 0
        found = ExpertConfig.load(output).experts
        for layer, values in zip(scores.layers, scores.of(method).round(4), strict=True):
            assert sorted(values[list(found[layer])]) == sorted(values)[-2:]


def test_a_general_sample_is_needed_for_contrast(short_run: Path, tmp_path: Path, capsys) -> None:
    """Where the run itself would read given scores, too."""
    arguments = ["--config", str(short_run), f"output={tmp_path / 'run'}", "mesh.data=1"]
    arguments += ["select={method: contrast, scores: [elsewhere]}"]
    assert score.main(arguments) == 2
    assert "score.general: contrast compares with it" in capsys.readouterr().err
