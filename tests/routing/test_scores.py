import json
import re

import numpy as np
import pytest

from esft_jax.errors import InputError
from esft_jax.routing.scores import ExpertScores, load_scores, round_scores

# Two layers, two sequences of two and one tokens, two of four experts per token.
LOG_1 = "0\t2\t2\t3\t\t0.5\t0.25\t0.125\t0.25\n3\t0\t\t0.5\t0.25\n"
LOG_2 = "1\t0\t1\t2\t\t0.4\t0.2\t0.6\t0.1\n2\t1\t\t0.3\t0.3\n"


def write_logs(folder, *logs):
    for layer, log in enumerate(logs, start=1):
        (folder / f"expert_weights_{layer}.txt").write_text(log)


@pytest.mark.parametrize("task", ["intent", "law"])
def test_released_logs_give_the_released_summary(esft_reference, tmp_path, task):
    released = esft_reference / "results" / "expert_scores" / task
    scores = load_scores(released)
    assert scores.layers == tuple(range(1, 27))
    assert scores.num_experts == 64
    scores.save(tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == (released / "summary.json").read_bytes()
    summary = load_scores(released / "summary.json")
    np.testing.assert_array_equal(summary.token, round_scores(scores.token))
    np.testing.assert_array_equal(summary.gate, round_scores(scores.gate))


def test_scores_of_logs(tmp_path):
    write_logs(tmp_path, LOG_1, LOG_2)
    scores = load_scores(tmp_path, experts_per_token=2)
    assert scores.layers == (1, 2)
    np.testing.assert_allclose(scores.token, np.array([[2, 0, 2, 2], [1, 3, 2, 0]]) / 6)
    np.testing.assert_allclose(
        scores.gate, np.array([[0.75, 0, 0.375, 0.75], [0.2, 1.3, 0.4, 0]]) / 3
    )
    assert scores.provenance["tokens"] == 3
    assert scores.provenance["sequences"] == 2


def test_own_files_keep_full_precision(tmp_path):
    token = np.array([[1 / 3, 2 / 3], [0.00004, 0.99996]])
    scores = ExpertScores((9, 10), token, token / 7, {"data": "sha256:0", "tokens": 12})
    scores.save(tmp_path)
    for path in (tmp_path, tmp_path / "scores.json"):
        loaded = load_scores(path)
        assert loaded.layers == (9, 10)
        np.testing.assert_array_equal(loaded.token, token)
        np.testing.assert_array_equal(loaded.gate, token / 7)
        assert loaded.provenance == scores.provenance
    assert (tmp_path / "summary.json").read_text() == (
        '{"token_scores": {"10": {"0": 0.0, "1": 1.0}, "9": {"0": 0.3333, "1": 0.6667}},'
        ' "gate_scores": {"10": {"0": 0.0, "1": 0.1429}, "9": {"0": 0.0476, "1": 0.0952}}}'
    )
    np.testing.assert_array_equal(load_scores(tmp_path / "summary.json").token, round_scores(token))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["scores.json", "summary.json"]


def test_files_say_which_gate_scores_they_hold(tmp_path):
    token = np.array([[0.25, 0.75], [0.5, 0.5]])
    shares = np.array([[0.125, 0.875], [0.4, 0.6]])
    for gate in (None, shares / 3):
        ExpertScores((1, 2), token, gate, gate_share=shares).save(tmp_path)
        loaded = load_scores(tmp_path)
        np.testing.assert_array_equal(loaded.gate_share, shares)
        assert loaded.methods == (
            ("token", "gate_share") if gate is None else ("token", "gate", "gate_share")
        )
        summary = json.loads((tmp_path / "summary.json").read_text())
        kind = "gate_share" if gate is None else "gate"
        assert set(summary) == {"token_scores", f"{kind}_scores"}
        (tmp_path / "scores.json").unlink()
        loaded = load_scores(tmp_path)
        expected = shares if gate is None else gate
        np.testing.assert_array_equal(loaded.of(kind), round_scores(expected))
        assert loaded.methods == ("token", kind)
        other = "gate" if gate is None else "gate_share"
        with pytest.raises(InputError, match=f"method: {other}: these are"):
            loaded.of(other)


@pytest.mark.parametrize("name", ["scores.json", "summary.json"])
def test_files_without_gate_shares_hold_those_of_a_router_that_renormalises(tmp_path, name):
    """As older versions, and others, have written them."""
    token = np.array([[0.25, 0.75], [0.5, 0.5]])
    for gate, kind in ((token, "gate_share"), (token * [[1.0], [0.9]], "gate")):
        ExpertScores((1, 2), token, gate).save(tmp_path)
        loaded = load_scores(tmp_path / name)
        assert loaded.methods == ("token", kind)
        np.testing.assert_allclose(loaded.of(kind), gate)


def test_layers_of_a_summary_that_were_not_measured_are_left_out(tmp_path):
    none = {"0": 0.0, "1": 0}
    path = tmp_path / "summary.json"
    path.write_text(
        json.dumps({"token_scores": {**GOOD, "3": none}, "gate_scores": {**GOOD, "3": none}})
    )
    with pytest.warns(UserWarning, match=r"summary.json: every score of layer 3 is 0; left out"):
        assert load_scores(path).layers == (1, 2)
    # It may be in one of the two tables only. With a gate, but no token, it is damaged.
    path.write_text(json.dumps({"token_scores": GOOD, "gate_scores": {**GOOD, "3": none}}))
    with pytest.warns(UserWarning, match="layer 3"):
        assert load_scores(path).layers == (1, 2)
    path.write_text(json.dumps({"token_scores": {"1": none}, "gate_scores": {"1": none}}))
    with pytest.warns(UserWarning, match="layer 1"), pytest.raises(InputError, match="no layers"):
        load_scores(path)
    path.write_text(json.dumps({"token_scores": {**GOOD, "3": none}, "gate_scores": GOOD3}))
    with pytest.raises(InputError, match="layer 3: token scores sum to 0.0000, not to 1"):
        load_scores(path)


def test_logs_of_a_router_that_renormalises(tmp_path):
    write_logs(tmp_path, "0\t2\t2\t3\t\t0.5\t0.5\t0.3333\t0.6667\n")
    scores = load_scores(tmp_path, experts_per_token=2)
    assert scores.methods == ("token", "gate_share")
    np.testing.assert_allclose(scores.gate_share, [[0.25, 0, 0.41665, 0.33335]])


def test_gate_shares_of_logs(tmp_path):
    # The second token's gates have vanished.
    write_logs(tmp_path, "0\t2\t2\t3\t\t0.3\t0.1\t0\t0\n")
    scores = load_scores(tmp_path, experts_per_token=2)
    np.testing.assert_allclose(scores.gate_share, [[0.375, 0, 0.125, 0]])
    _, sums = scores.routing.sequence_sums(shares=True)
    np.testing.assert_allclose(sums[0] / 2, scores.gate_share)


def test_rounding_is_that_of_decimal_printing():
    # The doubles next to 0.12345 and 0.00285 lie above them, the one next to 0.00035 below.
    values = np.array([[0.12345, 0.00285, 0.00035]])
    assert round_scores(values).tolist() == [[0.1235, 0.0029, 0.0003]]


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("0\t1\t0.5\t0.25\n", ":1: expected expert ids, two tabs, gates"),
        ("0\t1\t\t0.5\t0.25\n\n", ":2: expected expert ids, two tabs, gates"),
        ("0\tx\t\t0.5\t0.25\n", ":1: invalid literal for int"),
        ("0\t1\t\t0.5\tx\n", ":1: could not convert string to float"),
        ("0\t1\t\t0.5\n", ":1: 2 expert ids but 1 gates"),
        ("0\t1\t2\t\t0.5\t0.25\t0.1\n", ":1: 3 expert ids are no multiple of 2 per token"),
        ("0\t1\t\t0.5\tnan\n", ":1: a gate is not a finite number"),
        ("0\t1\t\t0.5\t-0.1\n", ":1: a gate is not a finite number"),
        ("0\t-1\t\t0.5\t0.1\n", ":1: an expert id is not in 0 to"),
        ("0\t99999999999\t\t0.5\t0.1\n", ":1: an expert id is not in 0 to"),
        ("0\t1\t\t0.5\t0.1\n3\t3\t\t0.1\t0.2\n", ":2: a token has one expert twice"),
        ("", ": empty log"),
        ("0\t1\t\t0.5\t0.1\n", ": 1 tokens in 1 sequences, but layer 1 has 3 in 2"),
    ],
)
def test_malformed_logs_are_named(tmp_path, log, message):
    write_logs(tmp_path, LOG_1, log)
    with pytest.raises(InputError) as caught:
        load_scores(tmp_path, experts_per_token=2)
    assert f"expert_weights_2.txt{message}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_layer_is_named(tmp_path):
    write_logs(tmp_path, LOG_1, LOG_2, LOG_1)
    (tmp_path / "expert_weights_2.txt").unlink()
    with pytest.raises(InputError, match="layer 2 is missing; expected every layer from 1 to 3"):
        load_scores(tmp_path, experts_per_token=2)


def test_wrong_number_of_experts_per_token(tmp_path):
    write_logs(tmp_path, LOG_1)
    with pytest.raises(InputError, match="experts_per_token: 0"):
        load_scores(tmp_path, experts_per_token=0)
    with pytest.raises(InputError, match=r"txt:1: 4 expert ids are no multiple of 6"):
        load_scores(tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="no scores in this folder"):
        load_scores(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_scores(tmp_path / "nowhere")


GOOD3 = {"1": {"0": 0.2, "1": 0.3}, "2": {"0": 0.1, "1": 0.3}, "3": {"0": 0.1, "1": 0.0}}
GOOD = {"1": {"0": 0.25, "1": 0.75}, "2": {"0": 0.5, "1": 0.5}}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("token", "gate", "message"),
    [
        ([], GOOD, "token_scores: expected an object"),
        ({}, GOOD, "token_scores: no layers"),
        ({"1": [1.0]}, GOOD, "token_scores.1: expected an object"),
        ({"x": {"0": 1.0}}, GOOD, "token_scores: 'x' is no layer index"),
        ({"1" * 5000: {"0": 0.0}}, GOOD, "is no layer index"),
        ({layer: {"0": 0, "1": 0} for layer in GOOD}, GOOD, "layer 1: token scores sum to 0.0000"),
        ({"1": {"0": 0.5, "2": 0.5}}, GOOD, "token_scores.1: no score of expert 1"),
        ({"1": {"0": 0.5, "1": "half"}}, GOOD, "layer 1, expert 1: 'half' is no number"),
        ({"1": {"0": 0.5, "1": 10**400}}, GOOD, "beyond the range"),
        ({**GOOD, "2": {"0": 1.0}}, GOOD, "layer 2 has 1 experts, layer 1 has 2"),
        ({"1": GOOD["1"]}, GOOD, "layer 2 has token or gate scores only"),
        (GOOD, {key: {"0": 0.5} for key in GOOD}, "2 token scores but 1 gate scores per layer"),
        ({**GOOD, "2": {"0": 0.5, "1": float("nan")}}, GOOD, "layer 2, expert 1: token score nan"),
        (GOOD, {**GOOD, "1": {"0": -0.5, "1": 0.5}}, "layer 1, expert 0: gate score -0.5"),
        ({**GOOD, "2": {"0": 1.5, "1": 0.5}}, GOOD, "layer 2: token scores sum to 2.0000"),
        (
            {"1": GOOD["1"], "3": GOOD["2"]},
            {"1": GOOD["1"], "3": GOOD["2"]},
            "layer 2 is missing",
        ),
    ],
)
def test_malformed_summaries_are_named(tmp_path, token, gate, message):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({"token_scores": token, "gate_scores": gate}))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_scores(tmp_path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [1]}, "token_scores: 2 rows for 1 layers"),
        ({"layers": [2, 1]}, "layers are [2, 1]; expected ascending"),
        ({"layers": [1, 1]}, "layers are [1, 1]; expected ascending"),
        ({"layers": [1, "2"]}, "layers: expected a list of decoder layer indices"),
        ({"gate_scores": [0.5, 0.5]}, "gate_scores: expected a list of rows"),
        ({"gate_scores": [[0.5, 0.5], [0.5]]}, "layer 2 has 1 experts, layer 1 has 2"),
        ({"gate_scores": [[0.5, None], [0.5, 0.5]]}, "layer 1, expert 1: None is no number"),
        ({"provenance": 3}, "provenance: expected an object"),
        ({"gate_share_scores": [[0.5, 0.5]]}, "gate_share_scores: 1 rows for 2 layers"),
        ({"gate_share_scores": [[0.5, 0.7]] * 2}, "layer 1: gate shares sum to 1.2000, to more"),
        ({"gate_share_scores": [[0.5, -0.5]] * 2}, "layer 1, expert 1: gate share -0.5"),
    ],
)
def test_malformed_scores_are_named(tmp_path, change, message):
    rows = [[0.5, 0.5], [0.25, 0.75]]
    content = {"layers": [1, 2], "token_scores": rows, "gate_scores": rows, **change}
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        load_scores(path)
    assert str(caught.value).startswith(str(path))


def test_other_json_is_refused(tmp_path):
    (tmp_path / "c.json").write_text('{"experts": {}}')
    with pytest.raises(InputError, match="expected a JSON object with the keys token_scores"):
        load_scores(tmp_path / "c.json")


@pytest.mark.parametrize(
    ("together", "message"),
    [
        ([[[1.5, 0], [0, 1]]], "chosen_together.*0.0.0: is 1.5; expected"),
        ([[["1", 0], [0, 1]]], "chosen_together.*0.0.0: is '1'; expected"),
        ([[[True, 0], [0, 1]]], "chosen_together.*0.0.0: is True; expected"),
        ([[[1, 0], [0]]], "chosen_together: expected whole numbers"),
        ([[[2**70, 0], [0, 1]]], "chosen_together: expected whole numbers"),
    ],
)
def test_counts_are_whole_numbers(tmp_path, together, message):
    content = {
        "layers": [1],
        "token_scores": [[0.5, 0.5]],
        "gate_scores": [[0.5, 0.5]],
        "chosen_together": together,
    }
    (tmp_path / "scores.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_scores(tmp_path)
