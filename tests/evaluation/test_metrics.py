import re

import pytest
from sacrebleu.metrics.bleu import BLEU

from esft_jax.errors import InputError
from esft_jax.evaluation.metrics import METRICS, Completion, read_completions, write_completions
from esft_jax.values import METRIC_NAMES


def test_a_configuration_may_name_every_metric():
    assert set(METRICS) == set(METRIC_NAMES)


def test_stored_intent_scores_are_reproduced(esft_reference, tmp_path):
    stored = esft_reference / "results" / "completions" / "token" / "intent.jsonl"
    completions = read_completions(stored)
    result = METRICS["intent"].score(
        [completion.raw_prediction for completion in completions],
        [completion.raw_answers for completion in completions],
    )
    assert result.per_example == [completion.score for completion in completions]
    assert len(completions) == 500
    assert result.aggregate == pytest.approx(76.0)
    write_completions(tmp_path / "intent.jsonl", completions)
    assert (tmp_path / "intent.jsonl").read_bytes() == stored.read_bytes()


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ('{"intent": "Play", "slots": {"artist": ["a", "b"], "n": 1}}', 1),
        (' {"intent": "Play", "slots": {"artist": ["a", "b"], "n": 1}}。\n', 1),
        ('{"intent": "Play", "slots": {"artist": ["a", "b"], "n": 1}}.', 1),
        ('{"slots":{"n":1,"artist":["a","b"]},"intent":"Play"}', 1),  # keys in any order
        ('{"intent": "Play", "slots": {"artist": ["b", "a"], "n": 1}}', 1),  # lists in any order
        ('{"intent": "Play", "slots": {"artist": ["a", "b", "b"], "n": 1}}', 0),
        ('{"intent": "Play", "slots": {"artist": ["a", "B"], "n": 1}}', 0),
        ('{"intent": "Play", "slots": {"artist": ["a", "b"]}}', 0),
        ('{"intent": "Play", "slots": {"artist": ["a", "b"], "n": 1}, "extra": 0}', 0),
        ('{"intent": "Play", "slots": {"artist": ["a", "b"], "n": true}}', 0),
        ('{"intent": "Play", "slots": {"artist": ["a", "b"], "n": "1"}}', 0),
        ('{"intent": "Play", "slots": {"artist": ["a", "b"], "n": 1}', 0),  # not JSON
        ('{"intent": "Play", "slots": {"artist": ["a", "b"], "n": 1}} and more', 0),
        ("", 0),
        ("[" * 100_000, 0),
    ],
)
def test_intent(prediction, score):
    answer = '{"intent": "Play", "slots": {"artist": ["a", "b"], "n": 1}}'
    assert METRICS["intent"].score([prediction], [[answer]]).per_example == [score]


def test_an_intent_list_is_not_its_only_element():
    answer = '{"date": ["monday", "monday"]}'
    assert METRICS["intent"].score(['{"date": "monday"}'], [[answer]]).per_example == [0]


def test_an_intent_answer_must_be_json():
    with pytest.raises(InputError, match="example 1: an answer is not JSON, which intent needs"):
        METRICS["intent"].score(["{}", "{}"], [["{}"], ["{"]])


def test_exact_match_ignores_outer_white_space_only():
    result = METRICS["exact_match"].score(
        [" yes\n", "Yes", "y es", "no"], [["yes"], ["yes"], ["yes"], ["yes", "no"]]
    )
    assert result.per_example == [1, 0, 0, 1]
    assert result.aggregate == 50


def test_bleu_by_hand():
    # Matches 5/6, 3/5, 2/4, 1/3 and no brevity penalty.
    result = METRICS["bleu"].score(["the cat sat on a mat"], [["the cat sat on the mat"]])
    expected = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert result.aggregate == pytest.approx(100 * expected)
    assert result.per_example == [pytest.approx(expected)]


def test_corpus_bleu_is_no_mean_of_sentences():
    # Sentences of two words have no 4-grams: alone they count by the orders they have.
    result = METRICS["bleu"].score(["a b c d e", "f x"], [["a b c d e"], ["f g"]])
    corpus = (6 / 7 * 4 / 5 * 3 / 3 * 2 / 2) ** 0.25
    assert result.aggregate == pytest.approx(100 * corpus)
    assert result.per_example[0] == 1


def test_chrf_by_hand():
    # Of "ab" and "ac" one character matches, no pair: (precision + recall) 1/2 and 0, mean 1/4.
    result = METRICS["chrf"].score(["ab"], [["ac"]])
    assert result.per_example == [pytest.approx(0.25)]
    assert result.aggregate == pytest.approx(25)


@pytest.mark.parametrize("name", ["chrf", "bleu", "rouge_l", "exact_match"])
def test_the_best_reference_counts(name):
    predictions = ["the cat sat on the mat", "a dog barks at the moon"]
    references = [["something else", "the cat sat on the mat"], ["a dog barks at the moon"]]
    result = METRICS[name].score(predictions, references)
    assert result.per_example == [1, 1]
    assert result.aggregate == pytest.approx(100)


@pytest.mark.parametrize("name", ["chrf", "bleu", "rouge_l", "exact_match", "intent"])
def test_an_empty_prediction_scores_zero(name):
    result = METRICS[name].score([""], [['{"a": "b"}']])
    assert result.per_example == [0]
    assert result.aggregate == 0


def test_rouge_l_by_hand():
    # Longest common subsequence "return sum": precision 2/3, recall 2/4.
    result = METRICS["rouge_l"].score(["Return the sum"], [["return a big sum."]])
    assert result.per_example == [pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))]


def test_rouge_l_counts_other_scripts():
    assert METRICS["rouge_l"].score(["播放音乐"], [["播放视频"]]).per_example == [
        pytest.approx(0.5)
    ]
    assert METRICS["rouge_l"].score(["été chaud"], [["été froid"]]).per_example == [
        pytest.approx(0.5)
    ]


# A sentence, and the same with another place in it.
LANGUAGES = {
    "Chinese": ("我今天要去北京参加会议，明天回来。", "我今天要去上海参加会议，明天回来。"),
    "rare Chinese": ("𠀀𠀁𠀂𠀃𠀄𠀅𠀆", "𠀀𠀁𠀂𠀃𠀄𠀅𠀇"),
    "Japanese": ("私は今日、東京の学校に行きます。", "私は今日、大阪の学校に行きます。"),
    "Thai": ("วันนี้ฉันจะไปโรงเรียนที่กรุงเทพ", "วันนี้ฉันจะไปโรงเรียนที่ภูเก็ต"),
    "Khmer": ("ថ្ងៃនេះខ្ញុំទៅសាលារៀន", "ថ្ងៃនេះខ្ញុំទៅផ្សារ"),
    "Burmese": ("ဒီနေ့ကျောင်းကိုသွားမယ်", "ဒီနေ့ဈေးကိုသွားမယ်"),
    "Arabic": ("أنا ذاهب اليوم إلى مدرسة في القاهرة", "أنا ذاهب اليوم إلى مدرسة في دمشق"),
    "Hindi": ("मैं आज दिल्ली के स्कूल जा रहा हूँ", "मैं आज मुंबई के स्कूल जा रहा हूँ"),
    "Russian": ("Сегодня я иду в школу в Москве", "Сегодня я иду в школу в Казани"),
    "Greek": ("Σήμερα πηγαίνω στο σχολείο της Αθήνας", "Σήμερα πηγαίνω στο σχολείο της Πάτρας"),
    "Korean": (
        "나는 오늘 서울에 있는 학교에 걸어서 갑니다",
        "나는 오늘 부산에 있는 학교에 걸어서 갑니다",
    ),
}


@pytest.mark.parametrize("name", ["bleu", "chrf", "rouge_l"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_script_counts(language, name):
    answer, other = LANGUAGES[language]
    assert METRICS[name].score([answer], [[answer]]).aggregate == pytest.approx(100)
    near = METRICS[name].score([other], [[answer]])
    assert 30 < near.aggregate < 95
    assert 0.3 < near.per_example[0] < 0.95


def test_bleu_of_chinese_is_that_of_sacrebleu():
    answer, other = (
        "他说：“我今天要去北京”，对吗？OK，3.5元。",
        "他说：“我明天去北京”，对吧？OK，3.5元。",
    )
    expected = BLEU(tokenize="zh").corpus_score([other], [[answer]]).score
    assert METRICS["bleu"].score([other], [[answer]]).aggregate == pytest.approx(expected)


def test_bleu_says_what_it_counts():
    english, other = "The cat sat on the mat.", "A dog sat on the mat, too."
    chinese, japanese = LANGUAGES["Chinese"][0], LANGUAGES["Japanese"][0]
    for answers, label in (
        ([english], "bleu (13a)"),
        ([english, chinese], "bleu (zh)"),
        ([english, chinese, japanese], "bleu (zh+char)"),
    ):
        assert METRICS["bleu"].label([[answer] for answer in answers]) == label
    assert METRICS["chrf"].label([[chinese]]) == "chrf"
    # Without such answers it is the usual figure, whatever is predicted; with some, English counts
    # as before.
    usual = BLEU().corpus_score([other, chinese], [[english, english]]).score
    found = METRICS["bleu"].score([other, chinese], [[english], [english]])
    assert found.aggregate == pytest.approx(usual)
    mixed = METRICS["bleu"].score([other, japanese], [[english], [japanese]])
    assert mixed.per_example[0] == pytest.approx(found.per_example[0])


@pytest.mark.parametrize("answers", [[["yes"], ["no"]], [["播放", "放"]], [["😀😀😀😀"]]])
def test_bleu_of_answers_that_are_too_short_is_refused(answers):
    """It is 0 whatever is predicted."""
    with pytest.raises(InputError, match=r"bleu: the longest answer has \d tokens .*expected a l"):
        METRICS["bleu"].score([each[0] for each in answers], answers)


def test_marks_belong_to_their_letters():
    """Hindi "day" and "gift" differ in a vowel, which is a mark."""
    assert METRICS["rouge_l"].score(["दान"], [["दिन"]]).per_example == [0]


def test_emoji_are_words():
    assert METRICS["rouge_l"].score(["😀😃"], [["😀 😁"]]).per_example == [pytest.approx(0.5)]
    with pytest.raises(InputError, match="example 0: an answer has no words, which rouge_l needs"):
        METRICS["rouge_l"].score(["?"], [["?!"]])


@pytest.mark.parametrize("name", ["exact_match", "intent", "chrf", "bleu", "rouge_l"])
def test_equivalent_texts_are_equal(name):
    composed, decomposed = '"d\u00e9j\u00e0 vu"', '"de\u0301ja\u0300 vu"'
    assert METRICS[name].score([composed], [[decomposed]]).per_example == [1]
    assert METRICS["intent"].score(['"\\u0065\\u0301"'], [['"\u00e9"']]).per_example == [1]


@pytest.mark.parametrize("name", METRICS)
def test_nothing_to_score(name):
    with pytest.raises(InputError, match=f"{name}: no examples"):
        METRICS[name].score([], [])
    with pytest.raises(InputError, match=f"example 0: no answers for {name}"):
        METRICS[name].score(["a"], [[]])
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        METRICS[name].score(["a"], [["a"], ["b"]])


@pytest.mark.parametrize("name", ["chrf", "bleu"])
def test_an_empty_answer_is_named(name):
    with pytest.raises(InputError, match=f"example 1: an answer has no text, which {name} needs"):
        METRICS[name].score(["a", "b"], [["a"], ["b", " "]])


def test_completions_round_trip(tmp_path):
    completions = [
        Completion("Prompt:\n播放", " {}\u2028", ("{}",), 1.0),
        Completion("", "", ("a", "b"), 0.25),
    ]
    path = tmp_path / "run" / "completions.jsonl"
    write_completions(path, completions)
    assert path.read_text(encoding="utf-8") == (
        '{"example": {"prompt": "Prompt:\\n播放", "raw_prediction": " {}\u2028",'
        ' "raw_answers": ["{}"]}, "score": 1}\n'
        '{"example": {"prompt": "", "raw_prediction": "", "raw_answers": ["a", "b"]},'
        ' "score": 0.25}\n'
    )
    assert read_completions(path) == completions
    assert [file.name for file in path.parent.iterdir()] == ["completions.jsonl"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"example": ', "not valid JSON"),
        ("[]", "is []; expected an object"),
        (
            '{"example": {"prompt": "a", "raw_prediction": "b"}, "score": 1}',
            "example.raw_answers: ",
        ),
        (
            '{"example": {"prompt": 1, "raw_prediction": "b", "raw_answers": []}, "score": 1}',
            "example.prompt: is 1; expected a valid string",
        ),
        (
            '{"example": {"prompt": "a", "raw_prediction": "b", "raw_answers": "c"}, "score": 1}',
            "example.raw_answers: is 'c'; expected a valid array",
        ),
        (
            '{"example": {"prompt": "a", "raw_prediction": "b", "raw_answers": []}, "score": "1"}',
            "score: is '1'; expected a valid number",
        ),
        *(
            (
                '{"example": {"prompt": "a", "raw_prediction": "b", "raw_answers": []}, '
                f'"score": {score}}}',
                "score: is ",
            )
            for score in ("NaN", "1e999", "true", "70", "-1")
        ),
    ],
)
def test_malformed_completions_are_named(tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    write_completions(path, [Completion("a", "b", ("c",), 0)])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_completions(path)
    assert str(caught.value).startswith(f"{path}:2: ")
