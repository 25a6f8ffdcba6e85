import numpy as np
import pytest

from esft_jax.errors import InputError
from esft_jax.routing.log import ROUTING_FILE, RoutingLog, load_routing
from esft_jax.routing.scores import ExpertScores, load_scores

LOG_1 = "0\t2\t2\t3\t\t0.5\t0.25\t0.125\t0.25\n3\t0\t\t0.5\t0.25\n"
LOG_2 = "1\t0\t1\t2\t\t0.4\t0.2\t0.6\t0.1\n2\t1\t\t0.3\t0.3\n"


def make_log() -> RoutingLog:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((2, 9, 300)), axis=-1)[..., :2]
    gates = rng.random(ids.shape).astype(np.float16)
    return RoutingLog((3, 4), 300, ids, gates, np.array([0, 4, 9]), np.arange(9))


def test_logs_of_the_reference(tmp_path) -> None:
    (tmp_path / "expert_weights_1.txt").write_text(LOG_1)
    (tmp_path / "expert_weights_2.txt").write_text(LOG_2)
    log = load_scores(tmp_path, experts_per_token=2).routing
    assert log is not None
    assert (log.layers, log.num_experts, log.num_tokens, log.top_k) == ((1, 2), 4, 3, 2)
    np.testing.assert_array_equal(log.starts, [0, 2, 3])
    assert log.tokens is None
    counts, gates = log.sequence_sums()
    np.testing.assert_array_equal(
        counts, [[[1, 0, 2, 1], [1, 2, 1, 0]], [[1, 0, 0, 1], [0, 1, 1, 0]]]
    )
    np.testing.assert_allclose(
        gates, [[[0.5, 0, 0.375, 0.25], [0.2, 1, 0.1, 0]], [[0.25, 0, 0, 0.5], [0, 0.3, 0.3, 0]]]
    )


def test_own_file_round_trips(tmp_path) -> None:
    log = make_log()
    log.save(tmp_path)
    loaded = load_routing(tmp_path)
    assert loaded is not None
    assert (loaded.layers, loaded.num_experts) == (log.layers, log.num_experts)
    for name in ("expert_ids", "gates", "starts", "tokens"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(log, name))
    assert loaded.expert_ids.dtype == np.uint16
    assert [file.name for file in tmp_path.iterdir()] == [ROUTING_FILE]


def test_names_of_logs_are_those_that_the_reference_writes(tmp_path) -> None:
    (tmp_path / "expert_weights_1.txt").write_text(LOG_1)
    for name in ("01", "\u0661"):  # would be layer 1, too
        (tmp_path / f"expert_weights_{name}.txt").write_text("")
    assert load_scores(tmp_path, experts_per_token=2).layers == (1,)
    (tmp_path / "expert_weights_999999999999.txt").write_text(LOG_2)
    with pytest.raises(InputError, match="layer 2 is missing; expected every layer from 1 to 99"):
        load_scores(tmp_path, experts_per_token=2)


def test_a_folder_without_routing(tmp_path) -> None:
    assert load_routing(tmp_path) is None
    assert load_routing(tmp_path / "scores.json") is None
    (tmp_path / ROUTING_FILE).symlink_to("nowhere")  # as in a pruned cache
    with pytest.raises(InputError, match="routing.npz: cannot be read: No such file"):
        load_routing(tmp_path)


def test_routing_is_never_left_beside_other_scores(tmp_path) -> None:
    token = np.full((2, 4), 0.25)
    ExpertScores((3, 4), token, token, routing=make_log()).save(tmp_path)
    assert (tmp_path / ROUTING_FILE).exists()
    ExpertScores((3, 4), token, token).save(tmp_path)
    assert not (tmp_path / ROUTING_FILE).exists()


def test_damaged_files_are_named(tmp_path) -> None:
    path = tmp_path / ROUTING_FILE
    path.write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"routing\.npz: not a file of `score`"):
        load_routing(tmp_path)
    np.savez(path, layers=np.array([1]))
    with pytest.raises(InputError, match=r"routing\.npz: not a file of `score`"):
        load_routing(tmp_path)
    log = make_log()
    RoutingLog(log.layers, 200, log.expert_ids, log.gates, log.starts).save(tmp_path)
    with pytest.raises(InputError, match="do not fit together"):
        load_routing(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("expert_ids", lambda a: a.astype(np.int64) - 300, "arrays do not fit together"),
        ("expert_ids", lambda a: a.astype(np.float32), "expert_ids: float32 of shape"),
        ("gates", lambda a: a * np.float16("nan"), "arrays do not fit together"),
        ("gates", lambda a: -a, "arrays do not fit together"),
        ("tokens", lambda a: a - 1, "arrays do not fit together"),
        ("layers", lambda a: a[::-1], "arrays do not fit together"),
        ("starts", lambda a: a[:0], "arrays do not fit together"),
        ("starts", lambda a: a[::-1].astype(np.uint64), "arrays do not fit together"),
        ("layers", lambda a: a[None], r"layers: int32 of shape \[1, 2\]"),
        ("num_experts", lambda a: a[None], r"num_experts: int32 of shape \[1\]"),
        ("tokens", lambda a: a.astype("U"), "tokens: <U"),
        ("gates", lambda a: None, "gates is missing"),
    ],
)
def test_arrays_of_other_kinds_are_named(tmp_path, name, change, message) -> None:
    make_log().save(tmp_path)
    with np.load(tmp_path / ROUTING_FILE) as file:
        arrays = dict(file)
    changed = change(arrays[name])
    arrays = {k: v for k, v in arrays.items() if k != name}
    np.savez(tmp_path / ROUTING_FILE, **arrays, **({} if changed is None else {name: changed}))
    with pytest.raises(InputError, match=message):
        load_routing(tmp_path)


def test_any_byte_of_the_file_may_be_damaged(tmp_path) -> None:
    make_log().save(tmp_path)
    path = tmp_path / ROUTING_FILE
    whole = path.read_bytes()
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            load_routing(tmp_path)
        except InputError as error:
            assert "routing.npz: " in str(error)
