"""Renders chat templates, which are programs by strangers, where they can do no harm.

`esft_jax.data.chat_template` runs this file as a process of its own, one for all templates. The
process imports nothing but Jinja. The operating system bounds what a rendering may take: no list of
Jinja's expensive constructs would be complete.

Each line on standard input is a request:

    {"template", "variables", "arguments", "chats": [
        {"messages", "tools", "renderings": [[count, prompt], ...]}, ...]}

`variables` and `arguments` are what the template sees besides; it has to read all `arguments`. A
rendering is of the first `count` messages, with a generation prompt or without. One line answers
it: `{"text", "spans"}`, or `{"error"}`.
`spans` are the ranges of the text that `{% generation %}` blocks made, null where the template has
no such block. A rendering that takes too long ends the process with SIGPROF.
"""

import contextlib
import datetime
import functools
import json
import re
import resource
import secrets
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

# CPU time of one rendering, and of each in a long row of them.
SECONDS, MEAN_SECONDS = 2.0, 0.05
# Address space of the process.
MEMORY = 1 << 30
# Characters of a rendering beyond ten times those of the chat as JSON.
CHARACTERS = 1_000_000

# What every template is given, besides arguments.
GIVEN = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "pad_token"}

_STARTED = datetime.datetime.now()

# Around what generation blocks render; no message can hold them.
_BEGIN, _END = (f"\ue000{secrets.randbelow(10**18)}\ue000" for _ in range(2))


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant says, as in Transformers."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}
        environment.extend(has_generation_blocks=False)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        vars(self.environment)["has_generation_blocks"] = True
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return _BEGIN + caller() + _END


@functools.lru_cache(8)
def _compile(source: str) -> tuple[jinja2.Template, bool, frozenset[str]]:
    """Compiles with the settings and helpers that Hugging Face templates count on.

    Returns:
        The template, whether it has generation blocks, and the variables that it reads.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[jinja2.ext.loopcontrols, _GenerationBlocks],
    )
    environment.globals["raise_exception"] = _raise_exception
    # One time for all renderings, or they would not continue each other.
    environment.globals["strftime_now"] = _STARTED.strftime
    # Templates ask whether they are none, not whether they are defined.
    environment.globals.update(documents=None)
    environment.filters["tojson"] = _to_json
    template = environment.from_string(source)
    has_blocks = vars(environment)["has_generation_blocks"]
    read = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
    return template, has_blocks, read - environment.globals.keys()


def _raise_exception(message: object) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _answer(
    request: dict[str, Any], chat: dict[str, Any], count: int, prompt: bool
) -> dict[str, Any]:
    template, has_blocks, read = _compile(request["template"])
    for name in request["arguments"]:
        if name not in read:
            known = ", ".join(sorted(read - GIVEN)) or "none"
            return {"error": f"reads no argument {name}; expected some of those it reads: {known}"}
    text = template.render(
        messages=chat["messages"][:count],
        tools=chat["tools"],
        add_generation_prompt=prompt,
        **request["variables"],
        **request["arguments"],
    )
    text.encode()  # fails at half of a surrogate pair
    most = CHARACTERS + 10 * chat["characters"]
    if len(text) > most:
        return {"error": f"renders {len(text)} characters; expected at most {most}"}
    if not has_blocks:
        return {"text": text, "spans": None}
    text, spans = _split(text)
    return {"text": text, "spans": spans}


def _split(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without the marks, and the ranges between them in order, outermost ones only."""
    parts, spans, length, depth, begin = [], [], 0, 0, 0
    for part in re.split(f"({_BEGIN}|{_END})", marked):
        if part == _BEGIN:
            begin = begin if depth else length
            depth += 1
        elif part == _END:
            depth -= 1
            if depth == 0:
                spans.append((begin, length))
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans


def _reply(request: dict[str, Any], chat: dict[str, Any], count: int, prompt: bool) -> str:
    try:
        return json.dumps(_answer(request, chat, count, prompt))
    except MemoryError:
        error = f"needs too much memory; expected at most {MEMORY >> 20} MiB"
    except RecursionError:
        error = "is nested, or calls itself, too deeply"
    except Exception as raised:  # a program by strangers can raise anything
        kind = "" if isinstance(raised, jinja2.TemplateError) else f"{type(raised).__name__}: "
        error = kind + " ".join(str(raised)[:1000].split())[:200]
    return json.dumps({"error": error})


def _main() -> None:
    # Launchers send these to all processes of a group; this one ends with its input.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    left = SECONDS
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for chat in request["chats"]:
            chat["characters"] = len(json.dumps([chat["messages"], chat["tools"]]))
            for count, prompt in chat["renderings"]:
                signal.setitimer(signal.ITIMER_PROF, left)
                reply = _reply(request, chat, count, prompt)
                left = signal.setitimer(signal.ITIMER_PROF, 0)[0]
                left = min(SECONDS, left + MEAN_SECONDS)
                sys.stdout.buffer.write(reply.encode() + b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
