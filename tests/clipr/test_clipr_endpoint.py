"""The endpoint, against a server in a thread that does as it is told."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ftlib.clipr.endpoint import (
    Asked,
    Budget,
    BudgetSpentError,
    Endpoint,
    EndpointError,
    Patience,
    Reply,
    ReplyCache,
)
from ftlib.clipr.loop import LearningInterrupted, State, learn
from ftlib.clipr.models import NOT_CHOSEN, RecordedReplies, Usage
from ftlib.clipr.prompted import PromptedReasoner
from ftlib.clipr.rules import Rule, RuleSet, Vocabulary
from ftlib.clipr.settings import Settings
from ftlib.clipr.tasks import Option, Task
from ftlib.clipr.users import SimulatedUser

KEY = "sk-very-secret-0123456789"


def answer(text, usage=(7, 3)):
    """A body as an OpenAI-compatible server gives it."""
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    if usage:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return json.dumps(body)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        self.server.seen.append((self.path, dict(self.headers), body))
        step = self.server.script.pop(0) if self.server.script else (200, answer("B"))
        if callable(step):
            step(self)
            return
        status, text, *headers = step
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    made.script, made.seen = [], []
    made.url = f"http://127.0.0.1:{made.server_port}/v1"
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


@pytest.fixture
def connect(server, tmp_path):
    """Make an endpoint; the times it would have slept are in its ``slept``."""

    def make(script=(), **options):
        server.script[:] = script
        slept = []
        given = {"cache": tmp_path / "replies.jsonl", "key": KEY, **options}
        given.setdefault("patience", Patience(timeout=5))
        model = Endpoint(server.url, "toy", sleep=slept.append, **given)
        model.slept = slept
        return model

    return make


def hang(handler):
    time.sleep(1.2)


def break_off(handler):
    """Promise more than is sent."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def close(handler):
    handler.close_connection = True


# --- one request ----------------------------------------------------------------------


def test_a_request_is_what_the_interface_asks_for(connect, server):
    model = connect([(200, answer("steel"))])
    assert model.complete("Which?", max_tokens=5, stop=["\n"]) == "steel"
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert headers["Content-Type"] == "application/json"
    assert body == {
        "model": "toy",
        "messages": [{"role": "user", "content": "Which?"}],
        "max_tokens": 5,
        "temperature": 0,
        "stop": ["\n"],
    }
    assert model.slept == []
    assert (model.usage.calls, model.usage.tokens) == (1, 10)
    assert model.usage.seconds > 0
    assert (model.paid.calls, model.paid.tokens) == (1, 10)


def test_more_fields_are_sent_and_none_leaves_one_out(connect, server):
    extra = {"seed": 3, "max_tokens": None, "max_completion_tokens": 99}
    connect(extra=extra).complete("Which?", max_tokens=5)
    assert server.seen[0][2] == {
        "model": "toy",
        "messages": [{"role": "user", "content": "Which?"}],
        "temperature": 0,
        "seed": 3,
        "max_completion_tokens": 99,
    }


def test_no_key_is_sent_where_there_is_none(connect, server):
    connect(key=None).complete("Which?", max_tokens=5)
    assert "Authorization" not in server.seen[0][1]


def test_what_a_server_does_not_tell_is_estimated(connect):
    odd = json.dumps(json.loads(answer("12345", None)) | {"usage": [1]})
    model = connect([(200, answer("12345", None)), (200, odd)])
    model.complete("x" * 9, max_tokens=5)
    assert (model.usage.prompt_tokens, model.usage.completion_tokens) == (3, 2)
    model.complete("y" * 9, max_tokens=5)
    assert (model.usage.prompt_tokens, model.usage.completion_tokens) == (6, 4)


def test_a_server_that_does_not_stop_is_cut(connect):
    assert connect([(200, answer("one\ntwo"))]).complete(
        "?", max_tokens=5, stop=["\n"]
    ) == ("one")


def test_a_refusal_is_an_empty_reply(connect):
    model = connect([(200, answer(None))])
    assert model.complete("?", max_tokens=5) == ""


def test_scores_are_votes_for_the_letter(connect):
    model = connect([(200, answer("B) the mug")), (200, answer("Who knows?"))])
    assert model.score("A or B?", ["A", "B"]) == [NOT_CHOSEN, 0.0]
    tied = model.score("Again: A or B?", ["A", "B"])
    assert tied[0] == tied[1]
    assert model.usage.problems == 1


# --- trouble that passes --------------------------------------------------------------


def test_too_many_requests_then_success(connect):
    model = connect(
        [
            (429, "slow down", ("Retry-After", "7")),
            (429, "slow down", ("Retry-After", "tomorrow")),
            (200, answer("A")),
        ]
    )
    assert model.complete("?", max_tokens=5) == "A"
    assert model.slept == [7.0, 2.0]
    assert (model.usage.calls, model.paid.calls) == (1, 3)
    assert model.paid.tokens == 10


def test_a_broken_server_is_tried_as_often_as_agreed(connect, server):
    model = connect(
        [(500, "oops"), (503, "busy"), (502, "<html>")], patience=Patience(5, 3)
    )
    with pytest.raises(EndpointError, match=r"3 attempts: status 502: '<html>'"):
        model.complete("?", max_tokens=5)
    assert model.slept == [1.0, 2.0]
    assert len(server.seen) == 3
    assert model.usage == Usage()
    assert (model.paid.calls, model.paid.tokens) == (3, 0)


def test_waits_double_up_to_a_limit():
    patience = Patience(delay=2, longest_delay=9)
    waits = [patience.before(attempt, None) for attempt in range(2, 6)]
    assert waits == [2, 4, 8, 9]
    assert patience.before(2, "9" * 400) == 9


@pytest.mark.parametrize(
    ("trouble", "named"),
    [
        (hang, "timed out"),
        (break_off, "IncompleteRead"),
        (close, "RemoteDisconnected"),
        ((200, "{'choices': not JSON"), "JSONDecodeError"),
        ((200, ""), "JSONDecodeError"),
        ((200, "[" * 100_000), "RecursionError"),
        ((200, "[]"), "TypeError"),
        ((200, '{"choices": []}'), "IndexError"),
        ((200, '{"error": "overloaded"}'), "KeyError.*overloaded"),
        ((200, answer([{"type": "text"}])), "no text"),
    ],
)
def test_trouble_passes_or_is_named(connect, server, trouble, named):
    timeout = 0.6 if trouble is hang else 5
    model = connect([trouble], patience=Patience(timeout, attempts=2))
    assert model.complete("?", max_tokens=5) == "B"
    assert len(server.seen) == 2
    server.script[:] = [trouble, trouble]
    with pytest.raises(EndpointError, match=named) as caught:
        model.complete("another", max_tokens=5)
    assert len(str(caught.value)) < 1000


def test_a_server_that_is_not_there_is_named(tmp_path):
    model = Endpoint(
        "http://127.0.0.1:9/v1",
        "toy",
        cache=tmp_path / "c",
        patience=Patience(1, 2),
        sleep=lambda seconds: None,
    )
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:9.*refused"):
        model.complete("?", max_tokens=5)


# --- trouble that does not ------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_wrong_request_is_not_repeated(connect, server, status):
    model = connect([(status, '{"error": "no such model"}')])
    with pytest.raises(EndpointError, match=f"status {status}.*no such model"):
        model.complete("?", max_tokens=5)
    assert len(server.seen) == 1


def test_the_key_does_not_follow_a_redirection(connect, server):
    elsewhere = f"{server.url}/elsewhere"
    for status in (301, 302, 307, 308):
        server.seen.clear()
        model = connect([(status, "", ("Location", elsewhere))])
        with pytest.raises(EndpointError, match=f"status {status}"):
            model.complete("?", max_tokens=5)
        assert len(server.seen) == 1


def test_the_key_is_nowhere_to_be_seen(connect, server, tmp_path):
    said = f"Incorrect API key: {KEY} and more " + "x" * 400
    spread = "x" * 290 + KEY
    model = connect(
        [(401, said), (400, spread), (200, said), (200, answer(f"Your key is {KEY}"))]
    )
    for prompt in ("one", "two"):
        with pytest.raises(EndpointError) as caught:
            model.complete(prompt, max_tokens=5)
        assert KEY[:9] not in f"{caught.value!r} {caught.value.__cause__!r}"
        assert KEY[:9] not in f"{caught.value.__context__!r}"
    assert model.complete("three", max_tokens=5) == "Your key is [key]"
    assert KEY not in repr(model)
    assert KEY not in str(model)
    for path in tmp_path.rglob("*"):
        assert KEY not in path.read_text()


def test_a_stand_in_for_a_key_is_no_secret(connect):
    model = connect([(200, answer("none of them"))], key="none")
    assert model.complete("?", max_tokens=5) == "none of them"


@pytest.mark.parametrize("key", ["two words", "line\nend", "schlüssel", "nul\0"])
def test_a_key_that_no_header_can_hold_is_refused_unseen(connect, key):
    with pytest.raises(ValueError, match="copy it again") as caught:
        connect(key=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "localhost:8000/v1", "ftp://h/v1", "", "http:///v1"]
)
def test_only_web_addresses_are_asked(tmp_path, url):
    with pytest.raises(ValueError, match="http://localhost:8000/v1"):
        Endpoint(url, "toy", cache=tmp_path / "c")


@pytest.mark.parametrize("url", ["http://u:secret@h/v1", "https://h/v1?key=secret"])
def test_secrets_in_an_address_are_refused_unseen(tmp_path, url):
    with pytest.raises(ValueError, match="plain URL") as caught:
        Endpoint(url, "toy", cache=tmp_path / "c")
    assert "secret" not in str(caught.value)


def test_no_attempt_is_refused(connect):
    with pytest.raises(ValueError, match="attempts is 0"):
        connect(patience=Patience(attempts=0))


# --- the budget -----------------------------------------------------------------------


def test_calls_are_limited_and_what_was_spent_is_said(connect, server):
    model = connect(budget=Budget(calls=2))
    for prompt in ("one", "two"):
        model.complete(prompt, max_tokens=5)
    with pytest.raises(
        BudgetSpentError,
        match=r"2 calls and .* Spent: 2 calls, 14 tokens read, 6 written",
    ):
        model.complete("three", max_tokens=5)
    assert len(server.seen) == 2
    assert model.complete("one", max_tokens=5) == "B"  # from the cache


def test_tokens_are_limited_before_they_are_spent(connect, server):
    model = connect(budget=Budget(tokens=30))
    model.complete("x" * 40, max_tokens=20)  # at most 30
    with pytest.raises(BudgetSpentError, match=r"30 tokens.*may take 21 tokens"):
        model.complete("y" * 4, max_tokens=20)
    assert len(server.seen) == 1
    model.complete("y" * 4, max_tokens=19)


def test_attempts_that_fail_are_within_the_budget(connect, server):
    model = connect([(500, "oops")] * 9, budget=Budget(calls=2))
    with pytest.raises(
        BudgetSpentError, match="last attempt failed: status 500: 'oops'"
    ):
        model.complete("?", max_tokens=5)
    assert len(server.seen) == 2


# --- the cache ------------------------------------------------------------------------


def test_nothing_is_paid_for_twice(connect, server):
    first = connect([(200, answer("A")), (200, answer("C"))])
    first.complete("?", max_tokens=5)
    first.complete("?", max_tokens=5)
    again = connect()
    assert again.complete("?", max_tokens=5) == "A"
    assert len(server.seen) == 1
    assert again.paid == Usage()
    assert again.usage + first.usage == first.usage + again.usage
    assert first.usage.calls == 2
    assert again.usage.tokens == 10
    assert again.usage.seconds * 2 == pytest.approx(first.usage.seconds)


def test_another_setting_is_another_question(connect, server):
    connect().complete("?", max_tokens=5)
    connect().complete("?", max_tokens=6)
    connect().complete("?", max_tokens=5, stop=["."])
    connect(extra={"seed": 1}).complete("?", max_tokens=5)
    assert len(server.seen) == 4


def test_a_failure_half_way_loses_nothing(connect, server):
    prompts = [f"task {n}" for n in range(6)]
    model = connect([*[(200, answer(f"reply {n}")) for n in range(3)], (401, "no")])
    done = []
    with pytest.raises(EndpointError, match=r"Every reply is in .*replies\.jsonl"):
        done.extend(model.complete(prompt, max_tokens=5) for prompt in prompts)
    assert len(server.seen) == 4
    again = connect([(200, answer(f"reply {n}")) for n in range(3, 6)])
    replies = [again.complete(prompt, max_tokens=5) for prompt in prompts]
    assert replies == [f"reply {n}" for n in range(6)]
    assert again.paid.calls == 3


def test_a_cache_replays_without_the_server(connect, tmp_path):
    text = 'two\nlines, "quotes", \u2028 and half a pair: \ud83d'
    model = connect([(200, answer(text))])
    said = model.complete("Wüst?\n", max_tokens=5)
    assert said == text.replace("\ud83d", "?")
    recorded = RecordedReplies.read(tmp_path / "replies.jsonl")
    assert recorded.complete("Wüst?\n", max_tokens=5) == said


def test_lines_that_were_cut_off_or_are_no_replies_are_passed_over(connect, tmp_path):
    path = tmp_path / "replies.jsonl"
    connect([(200, answer("A"))]).complete("one", max_tokens=5)
    whole = path.read_bytes()
    row = json.loads(whole)
    odd = [{**row, "completion": 3}, {**row, "prompt_tokens": "7"}, [row], "text", None]
    path.write_bytes(
        b"\n".join(
            [*(json.dumps(x).encode() for x in odd), whole, b"\xff{", whole[:-20]]
        )
    )
    model = connect([(200, answer("C"))])
    assert model._cache.damaged == 7
    assert model.complete("one", max_tokens=5) == "A"
    assert model.complete("two", max_tokens=5) == "C"
    assert path.read_bytes().startswith(b'{"url"')
    again = ReplyCache(path)
    assert len(again) == 2
    assert again.damaged == 7


def test_replies_of_two_processes_do_not_mix(tmp_path):
    """Two caches on one file, each line longer than a buffer."""
    path = tmp_path / "replies.jsonl"
    caches = [ReplyCache(path), ReplyCache(path)]

    def fill(at):
        for n in range(20):
            asked = Asked("u", "m", f"{at} {n}", {})
            caches[at].put(asked, Reply(str(at) * 20_000, 1, 1, 0.0))

    threads = [threading.Thread(target=fill, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    read = ReplyCache(path)
    assert (len(read), read.damaged) == (40, 0)


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_paid(tmp_path):
    with pytest.raises(OSError, match="directory"):
        ReplyCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ReplyCache(tmp_path / "file" / "replies.jsonl")


# --- in the loop ----------------------------------------------------------------------

LIKES = RuleSet((Rule("material", "glass", "steel"),))


def tasks_of(family, n):
    """Tasks in which glass stands now here, now there."""
    options = [Option(f"{m} {family}", {"material": m}) for m in ("steel", "glass")]
    return [
        Task(
            f"{family} {i}",
            f"Shelf {i}.",
            "Bring one.",
            family,
            options[:: 1 - i % 2 * 2],
        )
        for i in range(n)
    ]


def wise(prompt):
    """Ask for the material, write what was answered, choose by the rules."""
    if prompt.endswith("Question:"):
        return "NONE" if "\nA: " in prompt else "Which material, for all of them?"
    if prompt.endswith("Rules:"):
        return "Sure!\nPrefer material glass over steel."
    glass_first = "A. glass" in prompt
    return "A" if glass_first == ("prefer material glass" in prompt.lower()) else "B"


def replying(server, failing=()):
    """Let the server reply wisely, but refuse the requests of these numbers."""

    def reply(handler):
        number = len(server.seen)
        prompt = server.seen[-1][2]["messages"][0]["content"]
        data = answer(wise(prompt)).encode()
        handler.send_response(401 if number in failing else 200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    server.script[:] = [reply] * 100


def test_what_was_learnt_outlives_an_endpoint_that_fails(connect, server, tmp_path):
    """It refuses the fourth and the eleventh request; a new process goes on."""
    examples, tasks = tasks_of("mugs", 2), tasks_of("bowls", 8)
    names = Vocabulary.of(examples + tasks)
    state = State()
    causes = []
    while state.phase != "done":
        model = connect()
        replying(server, failing=(4, 11))
        reasoner = PromptedReasoner(model, names)
        user = SimulatedUser(LIKES)
        try:
            state = learn(reasoner, user, examples, tasks, Settings(), state)
        except LearningInterrupted as interrupted:
            interrupted.state.save(tmp_path / "state.json")
            state = State.load(tmp_path / "state.json")
            causes.append(type(interrupted.__cause__))
    assert causes == [EndpointError] * 2
    assert state.rules[0].claim == LIKES[0]
    assert all(made.accepted for made in state.decisions)
    # Two questions, the rules, eight choices; and the two that were refused.
    assert state.usage.calls == 11
    assert len(server.seen) == 13
    assert state.usage.problems == 1  # "Sure!" is no rule


# --- the environment ------------------------------------------------------------------


def test_the_environment_says_where_to_ask(server, tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_ENDPOINT_URL", server.url + "/")
    monkeypatch.setenv("FTLIB_ENDPOINT_MODEL", "toy")
    monkeypatch.setenv("FTLIB_ENDPOINT_KEY", KEY + "\n")
    model = Endpoint.from_environment(tmp_path / "new" / "replies.jsonl")
    assert model.complete("?", max_tokens=5) == "B"
    path, headers, _ = server.seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("missing", ["URL", "MODEL"])
def test_an_environment_that_says_too_little_is_named(tmp_path, monkeypatch, missing):
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.setenv(f"FTLIB_ENDPOINT_{name}", "http://localhost/v1")
    monkeypatch.delenv(f"FTLIB_ENDPOINT_{missing}")
    with pytest.raises(ValueError, match=f"FTLIB_ENDPOINT_{missing}"):
        Endpoint.from_environment(tmp_path / "c")
