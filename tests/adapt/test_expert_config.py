import json
import re
import time

import pytest

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.errors import InputError
from esft_jax.routing.select import combine_experts


@pytest.mark.parametrize("task", ["intent", "law"])
def test_released_files_survive_a_round_trip(esft_reference, tmp_path, task):
    released = esft_reference / "results" / "expert_configs" / f"{task}.json"
    config = ExpertConfig.load(released)
    config.validate(range(1, 27), 64)
    assert config.num_experts_selected == {"intent": 124, "law": 153}[task]
    config.save(tmp_path / "expert_cfg.json")
    assert (tmp_path / "expert_cfg.json").read_bytes() == released.read_bytes()


def test_bytes_are_those_of_the_reference(tmp_path):
    config = ExpertConfig({10: (5,), 2: (3, 1), 1: ()}, also=("shared_experts",))
    config.save(tmp_path / "new" / "expert_cfg.json")
    assert (tmp_path / "new" / "expert_cfg.json").read_text() == (
        '{"experts": {"1": [], "10": [5], "2": [3, 1]},'
        ' "shared_experts": true, "non_expert_modules": false}'
    )
    assert ExpertConfig.load(tmp_path / "new" / "expert_cfg.json") == config
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["expert_cfg.json"]
    assert list(config.experts) == [1, 2, 10]


@pytest.mark.parametrize(
    ("also", "text"),
    [
        (("non_expert_modules",), '"shared_experts": false, "non_expert_modules": true}'),
        (("router",), '"shared_experts": false, "also": ["router"]}'),
        (("head", "router", "head"), '"shared_experts": false, "also": ["router", "head"]}'),
        (("norms", "shared_experts"), '"shared_experts": true, "also": ["norms"]}'),
        (
            ("router", "non_expert_modules", "shared_experts"),
            '"shared_experts": true, "non_expert_modules": true}',
        ),
    ],
)
def test_flags_are_written_where_they_are_true_of_all_they_stand_for(tmp_path, also, text):
    path = tmp_path / "c.json"
    ExpertConfig({1: (0,)}, also).save(path)
    assert path.read_text() == '{"experts": {"1": [0]}, ' + text
    assert ExpertConfig.load(path) == ExpertConfig({1: (0,)}, also)


def test_flags_and_parts_may_stand_beside_each_other(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(
        '{"experts": {}, "non_expert_modules": false, "shared_experts": true, "also": ["router"]}'
    )
    assert ExpertConfig.load(path).also == ("shared_experts", "router")


def test_flags_default_to_false(tmp_path):
    (tmp_path / "c.json").write_text('{"experts": {"1": [0]}}')
    assert ExpertConfig.load(tmp_path / "c.json") == ExpertConfig({1: (0,)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object"),
        ('{"experts": ', "not valid JSON"),
        ('{"experts": {"1": [1], "1": [2]}}', "key '1' appears twice"),
        ('{"experts": {}, "shared_expert": true}', "unknown key 'shared_expert'"),
        ('{"shared_experts": true}', "key 'experts' must be an object"),
        ('{"experts": {"1": [1]}, "shared_experts": 1}', "'shared_experts' must be true or false"),
        ('{"experts": {}, "also": true}', "'also' must be a list, not True"),
        ('{"experts": {}, "also": ["mtp"]}', "also: 'mtp' is unknown; expected some of shared"),
        ('{"experts": {}, "also": [["router"]]}', "also: ['router'] is unknown"),
        (
            '{"experts": {}, "shared_experts": false, "also": ["shared_experts"]}',
            "'shared_experts' is false, but also names it",
        ),
        ('{"experts": {"one": [1]}}', "'one' is no layer index"),
        ('{"experts": {"01": [1]}}', "'01' is no layer index"),
        ('{"experts": {"1": 3}}', "experts.1: expected a list"),
        ('{"experts": {"1": [1.5]}}', "experts.1: 1.5 is no expert id"),
        ('{"experts": {"1": [true]}}', "experts.1: True is no expert id"),
        ('{"experts": {"1": [-1]}}', "experts.1: -1 is no expert id"),
        ('{"experts": {"2": [4, 7, 4]}}', "experts.2: expert 4 is listed twice"),
    ],
)
def test_malformed_files_are_named(tmp_path, text, message):
    path = tmp_path / "expert_cfg.json"
    path.write_text(text)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        ExpertConfig.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.json: cannot be read"):
        ExpertConfig.load(tmp_path / "nowhere.json")


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        ExpertConfig({1: (0,)}).save(tmp_path / "file" / "expert_cfg.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ExpertConfig({0: (1,)}), "layer 0 is no MoE layer; they are 1, 2"),
        (ExpertConfig({1: (0, 4)}), "layer 1: expert 4 is out of range; expected 0 to 3"),
        (ExpertConfig({2: (-1,)}), "layer 2: expert -1 is out of range"),
        (ExpertConfig({2: (10**4000,)}), "layer 2: expert 1000000000000000"),
        (ExpertConfig({2: (3, 3)}), "layer 2: expert 3 is listed twice"),
        (ExpertConfig({1: ()}), "nothing is selected"),
    ],
)
def test_a_config_must_fit_the_model(config, message):
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        config.validate([1, 2], 4)
    assert len(str(refused.value)) < 200


def test_other_modules_alone_are_a_selection():
    ExpertConfig({}, also=("shared_experts",)).validate([1, 2], 4)
    ExpertConfig({}, also=("non_expert_modules",)).validate([1, 2], 4)
    ExpertConfig({2: (3,)}).validate([1, 2], 4)


def test_many_ids_are_refused_at_once(tmp_path):
    path = tmp_path / "expert_cfg.json"
    ids = [*range(100_000), 99_999]
    path.write_text(json.dumps({"experts": {"1": ids}}))
    begin = time.process_time()
    with pytest.raises(InputError, match=r"experts.1: expert 99999 is listed twice"):
        ExpertConfig.load(path)
    path.write_text(json.dumps({"experts": {"1": [str(ids), *ids]}}))
    with pytest.raises(InputError) as error:
        ExpertConfig.load(path)
    assert len(str(error.value)) < 500
    one = ExpertConfig({1: tuple(range(100_000))})
    assert combine_experts([one, one], "intersection") == one
    assert time.process_time() - begin < 10
