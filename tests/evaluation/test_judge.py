"""The judge, against a server of our own that speaks chat completions."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from esft_jax.errors import InputError
from esft_jax.evaluation import judge as judge_module
from esft_jax.evaluation.judge import VARIABLES, Judge
from esft_jax.evaluation.metrics import METRICS

KEY = "sk-secret-0123456789"
RUBRIC = METRICS["judge_summary"].rubric
assert RUBRIC is not None
PROMPTS = ["Summarise: one", "Summarise: two", "Summarise: three"]
ANSWERS = ["1", "2", "3"]
REFERENCES = [["uno"], ["dos", "due"], ["tres"]]


class Server:
    """Answers each request by `answer(body)`: a status, and a completion's content or raw bytes."""

    def __init__(self) -> None:
        self.answer: Callable[[dict[str, Any]], tuple[int, Any]] = lambda body: (
            200,
            "Fine.\nScore: 7",
        )
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.busy = self.busiest = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    server.requests.append(body | {"path": self.path})
                    server.keys.add(self.headers["Authorization"])
                    server.busy += 1
                    server.busiest = max(server.busiest, server.busy)
                status, text = server.answer(body)
                message = {"role": "assistant", "content": text}
                content: dict[str, Any] = {"choices": [{"index": 0, "message": message}]}
                if status != 200:
                    content = {"error": {"message": f"no: {self.headers['Authorization']}"}}
                payload = text if isinstance(text, bytes) else json.dumps(content).encode()
                with lock:
                    server.busy -= 1
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def asked(self) -> list[str]:
        """The answers that were to be graded, one for each request."""
        return [json.loads(r["messages"][1]["content"])["answer"] for r in self.requests]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def judge(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judge:
    for name, value in zip(VARIABLES, (server.url, KEY, "grader"), strict=True):
        monkeypatch.setenv(name, value)
    return Judge.from_environment(tmp_path / "judge")


def grade(judge: Judge) -> Any:
    return judge.score(RUBRIC, PROMPTS, ANSWERS, REFERENCES)


def test_grades_are_means_of_what_the_judge_says(judge: Judge, server: Server) -> None:
    scores = {"1": "Score: 10", "2": "It is fair.\n\nScore: 4\n", "3": "Wrong.\nScore: 0"}
    server.answer = lambda body: (200, scores[json.loads(body["messages"][1]["content"])["answer"]])
    result = grade(judge)
    assert result.per_example == [1.0, 0.4, 0.0]
    assert result.aggregate == pytest.approx(100 * 1.4 / 3)
    assert result.failures == 0
    assert server.keys == {f"Bearer {KEY}"}
    for request in server.requests:
        assert (request["path"], request["model"]) == ("/v1/chat/completions", "grader")
        system, user = request["messages"]
        assert RUBRIC in system["content"] and "Score: N" in system["content"]
        number = ANSWERS.index(json.loads(user["content"])["answer"])
        assert json.loads(user["content"]) == {
            "prompt": PROMPTS[number],
            "references": REFERENCES[number],
            "answer": ANSWERS[number],
        }


def test_refusals_for_the_moment_are_asked_again(judge: Judge, server: Server) -> None:
    refusals = iter([429, 500, 503])
    server.answer = lambda body: (next(refusals, 200), "Score: 5")
    assert grade(judge).per_example == [0.5] * 3
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "7",
        "Score: 11",
        "Score: 7.5",
        "score: 7",
        "Score: -1",
        "Score: 7 of 10",
        "The score: 7",
        "Score: 7\nThat is all.",
        "Score: 3\nNo:\nScore: 7",
        None,
    ],
)
def test_replies_without_exactly_one_score_are_counted(
    judge: Judge, server: Server, reply: str | None
) -> None:
    def answer(body: dict[str, Any]) -> tuple[int, str | None]:
        graded = json.loads(body["messages"][1]["content"])["answer"]
        return 200, reply if graded == "2" else "Score: 6"

    server.answer = answer
    result = grade(judge)
    assert result.per_example == [0.6, None, 0.6]
    assert result.aggregate == pytest.approx(60.0)  # not 40: it is no 0
    assert result.failures == 1


@pytest.mark.parametrize(
    "reply",
    [
        b"",
        b"{",
        b'{"choices": [{"message": {"content": "\xff"}}]}',
        b"[]",
        b'{"choices": {}}',
        "\ud800 Score: 7",
        [{"type": "text", "text": "Score: 7"}],
        7,
    ],
)
def test_replies_that_are_no_completion_end_it_and_are_not_kept(
    judge: Judge, server: Server, tmp_path: Path, reply: Any
) -> None:
    server.answer = lambda body: (200, reply)
    with pytest.raises(InputError, match="OPENAI_BASE_URL.: the reply is no chat completion"):
        grade(judge)
    assert not list(tmp_path.rglob("*.json"))


def test_a_judge_that_never_gives_a_score_is_an_error(judge: Judge, server: Server) -> None:
    server.answer = lambda body: (200, "I cannot say.")
    with pytest.raises(InputError, match="none of 3 replies ended with `Score: N`"):
        grade(judge)


def test_nothing_is_asked_twice(judge: Judge, server: Server, tmp_path: Path) -> None:
    first = grade(judge)
    again = Judge.from_environment(tmp_path / "judge")
    server.answer = lambda body: (500, None)
    assert grade(again) == first
    assert len(server.requests) == 3
    # Another model, rubric, or answer is another question.
    server.answer = lambda body: (200, "Score: 1")
    other = Judge(tmp_path / "judge", base_url=server.url, key=KEY, model="other")
    assert grade(other).per_example == [0.1] * 3
    judge.score("Look at the length.", PROMPTS[:1], ANSWERS[:1], REFERENCES[:1])
    judge.score(RUBRIC, PROMPTS[:1], ["new"], REFERENCES[:1])
    assert len(server.requests) == 3 + 3 + 1 + 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kept: [], "is []; expected an object"),
        (lambda kept: {"reply": 5}, "model: "),
        (lambda kept: kept | {"reply": 5}, "reply: is 5; expected a valid string"),
        (lambda kept: kept | {"reply": None}, "reply: is None; expected a valid string"),
        (lambda kept: kept | {"messages": {}}, "messages: is {}; expected a valid array"),
        (lambda kept: kept | {"score": 7}, "score: "),
        (lambda kept: kept | {"model": "other"}, "holds the reply to another question"),
        (lambda kept: kept | {"messages": []}, "holds the reply to another question"),
        (lambda kept: kept | {"reply": float("nan")}, "reply: is nan; expected a finite number"),
    ],
)
def test_a_damaged_reply_is_named(
    judge: Judge, server: Server, tmp_path: Path, damage: Any, message: str
) -> None:
    grade(judge)
    path = sorted((tmp_path / "judge").iterdir())[0]
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError) as caught:
        grade(judge)
    assert str(caught.value).startswith(f"{path}: {message}")
    path.write_bytes(b"\xff")
    with pytest.raises(InputError, match="byte 0 is not UTF-8 text"):
        grade(judge)
    assert len(server.requests) == 3


def test_the_same_answer_is_asked_about_once(judge: Judge, server: Server) -> None:
    result = judge.score(RUBRIC, ["a", "a"], ["b", "b"], [["c"], ["c"]])
    assert result.per_example == [0.7, 0.7]
    assert len(server.requests) == 1


def test_what_was_answered_before_a_stop_is_not_asked_again(
    judge: Judge, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_module, "_CONCURRENT", 1)
    left = iter(range(2))
    server.answer = lambda body: (200 if next(left, None) is not None else 401, "Score: 8")
    with pytest.raises(InputError, match="judge grader .OPENAI_BASE_URL.: .*401"):
        grade(judge)
    asked = server.asked()
    assert len(asked) == 3  # a refused key is not tried again
    server.requests.clear()
    server.answer = lambda body: (200, "Score: 8")
    assert grade(judge).per_example == [0.8] * 3
    assert server.asked() == asked[2:]


def test_a_killed_judge_asks_for_the_rest_only(
    judge: Judge, server: Server, tmp_path: Path
) -> None:
    killed = threading.Event()

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        if json.loads(body["messages"][1]["content"])["answer"] == "3":
            killed.wait(60)
        return 200, "Score: 9"

    server.answer = answer
    code = (
        "from pathlib import Path; from esft_jax.evaluation.judge import Judge\n"
        f"judge = Judge.from_environment(Path({str(tmp_path / 'judge')!r}))\n"
        f"judge.score({RUBRIC!r}, {PROMPTS!r}, {ANSWERS!r}, {REFERENCES!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("judge/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    assert process.wait() != 0
    server.requests.clear()
    killed.set()
    assert grade(judge).per_example == [0.9] * 3
    assert server.asked() == ["3"]


def test_requests_at_one_time_are_bounded(
    judge: Judge, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_module, "_CONCURRENT", 3)
    together = threading.Barrier(3)

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        together.wait(timeout=20)  # breaks unless three are asked at one time
        return 200, "Score: 2"

    server.answer = answer
    answers = [str(number) for number in range(12)]
    result = judge.score(RUBRIC, answers, answers, [["x"]] * 12)
    assert result.per_example == [0.2] * 12
    assert server.busiest == 3


def test_the_key_is_written_nowhere(
    judge: Judge, server: Server, tmp_path: Path, capfd: Any, caplog: Any
) -> None:
    caplog.set_level("DEBUG")
    grade(judge)
    server.answer = lambda body: (403, None)  # and the reply repeats the key
    with pytest.raises(InputError) as refused:
        judge.score(RUBRIC, PROMPTS[:1], ["new"], REFERENCES[:1])
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    for text in (*written, str(refused.value), caplog.text, *capfd.readouterr(), repr(judge)):
        assert KEY not in text
    assert "***" in str(refused.value)


@pytest.mark.parametrize("name", VARIABLES)
def test_a_missing_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    for other in VARIABLES:
        monkeypatch.setenv(other, "x")
    monkeypatch.delenv(name)
    with pytest.raises(InputError, match=f"{name}: not set"):
        Judge.from_environment(tmp_path)


def test_a_key_that_no_header_holds(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-“quoted”")
    with pytest.raises(InputError, match="OPENAI_API_KEY: expected ASCII"):
        Judge.from_environment(Path("unused"))


def test_an_endpoint_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "_RETRIES", 0)
    judge = Judge(tmp_path, base_url="http://127.0.0.1:9/v1", key=KEY, model="m")
    with pytest.raises(InputError, match="judge m .OPENAI_BASE_URL.: Connection error"):
        grade(judge)
