"""`python -m esft_jax.data`: what it shows of the examples of a run."""

import json
from pathlib import Path

import pytest

from esft_jax import data


@pytest.fixture
def shown(short_run: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command on the tiny model's forty chats, and returns its lines."""

    def show(*arguments: str) -> list[str]:
        assert data.main([str(short_run), *arguments]) == 0
        return capsys.readouterr().out.splitlines()

    return show


def test_examples_and_numbers(shown, chats: Path) -> None:
    lines = shown("--show", "2")
    first, text, blank, answer = lines[:4]
    assert first.startswith(f"{chats}:1: ") and first.endswith(" with a loss")
    number = first.removeprefix(f"{chats}:1: ").split()
    assert text.endswith("User: What is 0 plus 0?")
    assert blank == ""
    begin, _, learned = answer.partition("Assistant:")
    assert not begin
    # Without colours, what is learned is in brackets.
    assert learned[0] + learned[-1] == "\u27e6\u27e7"
    assert learned[1:].startswith(" It is 0.<")
    tokens = lines[4].split("\u27e6")
    assert len(tokens[1].split()) == int(number[2])
    assert len(tokens[0].split()) + len(tokens[1].split()) == int(number[0])
    assert sum(line.startswith(f"{chats}:") for line in lines) == 2
    assert lines[-4].startswith("train: 40 examples in ")
    assert lines[-3].startswith("  tokens of an example: ")
    assert lines[-2].startswith("held out, task: 40 examples in ")


def test_colours_and_control_characters(
    shown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [{"role": "user", "content": "\x1b]0;x\x07"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "\n".join(shown(f"data.train=[{tmp_path / 'a.jsonl'}]", "data.valid=[]"))
    assert "\\x1b]0;x\\x07" in text
    assert "\x1b]0" not in text and "\x07" not in text
    assert "\x1b[1;32m yes" in text
    assert "\u27e6" not in text


def test_what_is_cut_and_dropped(shown, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    answers = ["yes", "yes " * 60]
    rows = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": a}] for a in answers
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options = ["--show", "0", f"data.train=[{path}]", "data.valid=[]"]
    drop, _ = shown(*options, "data.too_long=drop")
    cut, _ = shown(*options, "data.too_long=cut")
    assert drop.startswith("train: 1 of 2 examples in 1 rows of 32, ")
    assert drop.endswith("1 dropped; read as messages")
    assert cut.startswith("train: 2 examples in 2 rows of 32, ")
    assert cut.endswith("1 cut to length; read as messages")


def test_the_run_s_own_template(shown, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{{ style }}{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    own = [f"data.chat_template={template}", "data.sequence_length=64", "--show", "1"]
    stop = json.loads((Path("models/tiny-moe") / "tokenizer_config.json").read_text())["eos_token"]
    stop = stop if isinstance(stop, str) else stop["content"]
    lines = shown(*own, "data.template_arguments.style=terse", f"data.stop_token={stop}")
    assert lines[1:3] == ["terse[user]What is 0 plus 0?", f"[assistant]\u27e6It is 0.{stop}\u27e7"]


def test_what_is_wrong_is_one_line(short_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["data.template_arguments.style=x"], "reads no argument style; expected some of"),
        (["data.chat_template=no.jinja"], "no.jinja: cannot be read"),
        (["data.stop_token=<no>"], "data.stop_token: '<no>' is not in the vocabulary"),
        (["--show", "-1"], "--show: "),
    ):
        assert data.main([str(short_run), *arguments]) == 2
        captured = capsys.readouterr()
        assert expected in captured.err
        assert captured.err.count("\n") == 1
