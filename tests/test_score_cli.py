"""`python -m esft_jax.score`: what it writes, and what it refuses before any weight is read."""

from pathlib import Path

import pytest

from esft_jax import score
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
