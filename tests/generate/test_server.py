"""The server, as OpenAI's client and as strangers meet it: what it answers equals what the engine
gives offline, mistakes get the right status, and whoever leaves frees the slot.
"""

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_server import CONFIG, serving, tiny_text

from olmo_jax.generate import serve
from olmo_jax.generate.chat import TextFiles
from olmo_jax.generate.driver import Driver
from olmo_jax.generate.engine import Completion, Engine, Request
from olmo_jax.generate.openai_schema import IGNORED, NEUTRAL, ChatRequest, CompletionRequest
from olmo_jax.generate.sampling import GREEDY, Sampling
from olmo_jax.generate.server import Server
from olmo_jax.generate.web import BODY_BYTES
from olmo_jax.model.transformer import init

SLOTS, QUEUE = 8, 36
PROMPTS = ["To-morrow, and", "né 漢字", "creeps in this petty pace 🙂", "a", ""]


@pytest.fixture(scope="module")
def model():
    return init(CONFIG)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def tokenizer(text):
    return text.tokenizer


@pytest.fixture(scope="module")
def address(model, text):
    driver = Driver(Engine(model, slots=SLOTS), SLOTS + QUEUE)
    with serving(Server("org/tiny", driver, text)) as address:
        yield address
        assert driver.open == 0 and not driver.engine.busy  # whatever the tests did
        assert driver.failure is None


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)


def post(address, body: bytes | dict, path="/v1/completions", **headers) -> tuple[int, dict]:
    """Status and JSON of a request that need not be a good one."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | headers
    connection.request("POST", path, body, headers)
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response.status, content


def offline(model, requests):
    """What the engine makes of requests, in a batch of the server's size: no other program."""
    engine, done = Engine(model, slots=SLOTS), {}
    ids = [engine.submit(request) for request in requests]
    while engine.busy:
        for event in engine.step():
            done.setdefault(event.id, []).append(event)
    return [
        Completion(
            [token for event in done[id] for token in event.token_ids],
            [score for event in done[id] for score in event.logprobs or ()],
            done[id][-1].finish,
        )
        for id in ids
    ]


def expected(model, tokenizer, ids, tokens, sampling=GREEDY, seed=0, **more):
    """The engine's own text and end, and how many tokens."""
    request = Request(tuple(ids), tokens, sampling, seed, (0,), **more)
    [done] = offline(model, [request])
    text = tokenizer.decode(done.token_ids, skip_special_tokens=False)
    return text, done.finish, len(done.token_ids), done.logprobs


# --- answers --------------------------------------------------------------------------------------


def test_two_hundred_requests_at_once_give_what_each_gives_alone(model, text, client):
    tokenizer = text.tokenizer
    sampled = Sampling(temperature=0.7, top_p=0.9)

    def ask(i):
        prompt = PROMPTS[i % 5]
        common = {"model": "org/tiny", "temperature": 0.7 * (i % 2), "top_p": 0.9, "seed": i}
        common |= {"max_tokens": 5 + i % 16, "stream": i % 3 == 0}
        messages = [{"role": "user", "content": prompt}]
        if i % 4 == 3:
            made = client.chat.completions.create(messages=messages, **common)
        else:
            made = client.completions.create(prompt=prompt, **common)
        if not common["stream"]:
            choice = made.choices[0]
            return choice.message.content if i % 4 == 3 else choice.text, choice.finish_reason
        text, finish = "", None
        for chunk in made:
            choice = chunk.choices[0]
            assert finish is None
            text += (choice.delta.content if i % 4 == 3 else choice.text) or ""
            finish = choice.finish_reason
        return text, finish

    requests = []
    for i in range(200):
        prompt = PROMPTS[i % 5]
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [0]
        ids = tuple(text.chat_ids(messages) if i % 4 == 3 else ids)
        sampling = sampled if i % 2 else Sampling(temperature=0, top_p=0.9)
        requests.append(Request(ids, 5 + i % 16, sampling, i, (0,)))
    alone = [
        (tokenizer.decode(done.token_ids, skip_special_tokens=False), done.finish)
        for done in offline(model, requests)
    ]
    assert len(set(alone)) > 100
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(ask, range(200))) == alone


def test_several_texts_of_several_prompts(model, tokenizer, client):
    made = client.completions.create(
        model="org/tiny", prompt=[[72], [5, 6, 7]], n=2, seed=3, max_tokens=8, echo=True
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    texts = [tokenizer.decode(ids, skip_special_tokens=False) for ids in ([72], [5, 6, 7])]
    prompts = [(texts[0], [72])] * 2 + [(texts[1], [5, 6, 7])] * 2
    total = 0
    for i, (choice, (text, ids)) in enumerate(zip(made.choices, prompts, strict=True)):
        more, finish, n, _ = expected(model, tokenizer, ids, 8, Sampling(1.0), 3 + i)
        assert (choice.text, choice.finish_reason) == (text + more, finish)
        total += n
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (4, total)


def test_a_stop_string_ends_the_text_before_it(model, tokenizer, client):
    ask = {"model": "org/tiny", "prompt": "a", "max_tokens": 50, "temperature": 0}
    whole = client.completions.create(**ask).choices[0]
    assert len(whole.text) > 20
    stop = whole.text[12:15]
    cut = whole.text[: whole.text.index(stop)]
    made = client.completions.create(**ask, stop=[stop, "never there"])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (cut, "stop")
    assert made.usage.completion_tokens < 50
    stream = list(client.completions.create(**ask, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in stream) == cut
    assert stream[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_the_engines_in_both_forms(model, text, client):
    tokenizer = text.tokenizer
    ask = {"model": "org/tiny", "max_tokens": 9, "temperature": 0}
    ids = tokenizer.encode("a", add_special_tokens=False).ids
    *_, scores = expected(model, tokenizer, ids, 9, logprobs=2)
    made = client.completions.create(prompt="a", logprobs=2, **ask).choices[0].logprobs
    assert made.token_logprobs == pytest.approx([s.logprob for s in scores], abs=1e-5)
    assert all(len(top) <= 2 for top in made.top_logprobs)
    messages = [{"role": "user", "content": "a"}]
    *_, scores = expected(model, tokenizer, text.chat_ids(messages), 9, logprobs=3)
    ask |= {"messages": messages, "logprobs": True, "top_logprobs": 3}
    for stream in False, True:
        made = client.chat.completions.create(stream=stream, **ask)
        tokens = [
            token
            for part in (made if stream else [made])
            if part.choices[0].logprobs
            for token in part.choices[0].logprobs.content
        ]
        assert [t.logprob for t in tokens] == pytest.approx([s.logprob for s in scores], abs=1e-5)
        for token, score in zip(tokens, scores, strict=True):
            got = [top.logprob for top in token.top_logprobs]
            assert got == pytest.approx([value for _, value in score.top], abs=1e-5)


def test_a_streams_last_word_is_the_usage(client):
    ask = {"model": "org/tiny", "temperature": 0, "max_tokens": 20, "stream": True}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    options = {"stream_options": {"include_usage": True}}
    *parts, last = client.chat.completions.create(messages=messages, **ask, **options)
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.usage is None for part in parts)
    assert last.choices == [] and last.usage.completion_tokens == 20
    assert last.usage.total_tokens == last.usage.prompt_tokens + 20


def test_without_a_number_an_answer_may_fill_the_context(client):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    made = client.chat.completions.create(model="org/tiny", messages=messages, temperature=0)
    at_end = made.usage.total_tokens == CONFIG.context_length
    assert (made.choices[0].finish_reason == "length") == at_end
    long = client.completions.create(model="org/tiny", prompt=[5] * 58, temperature=0)
    assert long.usage.completion_tokens <= 6


# --- mistakes -------------------------------------------------------------------------------------

GOOD = {"model": "org/tiny", "prompt": "a", "max_tokens": 4}
TALK = {"model": "org/tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
BAD = [
    (b"{", 400, "not JSON"),
    (b"", 400, "not JSON"),
    (b"\xff\xfe", 400, "not JSON"),
    (b"[" * 100_000, 400, "not JSON"),
    (b'{"model": "org/tiny", "prompt": "\\ud800"}', 400, "not JSON"),  # half a character
    (b'{"model": "org/tiny", "prompt": "a", "temperature": NaN}', 400, "temperature = nan"),
    (b"[1]", 400, "the body must be"),
    ({"prompt": "a"}, 400, "model is missing"),
    ({"model": "org/tiny"}, 400, "prompt is missing"),
    (GOOD | {"model": "gpt-4"}, 404, "there is no model 'gpt-4' here: there is 'org/tiny'"),
    (GOOD | {"prompt": "a" * 900}, 400, "the prompt of 900 tokens and max_tokens = 4 are 904"),
    (GOOD | {"prompt": [3] * 60, "max_tokens": 5}, 400, "are 65 together: at most 64 fit"),
    (GOOD | {"max_tokens": 10**30}, 400, "at most 64 fit"),
    (GOOD | {"max_tokens": -1}, 400, "max_tokens = -1"),
    (GOOD | {"max_tokens": 0}, 400, "max_tokens = 0"),
    (GOOD | {"max_tokens": True}, 400, "max_tokens = True"),
    (GOOD | {"temperature": -0.1}, 400, "temperature = -0.1"),
    (GOOD | {"temperature": "hot"}, 400, "temperature = 'hot'"),
    (GOOD | {"top_p": 0}, 400, "top_p = 0"),
    (GOOD | {"top_k": 0}, 400, "top_k = 0"),
    (GOOD | {"seed": 2**63}, 400, "seed = "),
    (GOOD | {"n": 1000}, 400, "n = 1000: it must be less than or equal to 128"),
    (GOOD | {"n": 100}, 400, "at most 44 texts"),
    (GOOD | {"prompt": ["a"] * 45}, 400, "at most 44 texts"),
    (GOOD | {"stop": [str(i) for i in range(100_000)]}, 400, "at most 16"),
    (GOOD | {"stop": ""}, 400, "1 to 256 characters"),
    (GOOD | {"logprobs": 21}, 400, "logprobs = 21"),
    (GOOD | {"logprobs": 1, "echo": True}, 400, "echo and logprobs"),
    (GOOD | {"prompt": {}}, 400, "prompt = {}: it must be a string, a list of"),
    (GOOD | {"prompt": []}, 400, "empty list"),
    (GOOD | {"prompt": [[]]}, 400, "no tokens"),
    (GOOD | {"prompt": [10**9]}, 400, "outside the vocabulary"),
    (GOOD | {"prompt": [-1], "echo": True}, 400, "outside the vocabulary"),
    (GOOD | {"prompt": ["a", [-(10**30)]], "echo": True}, 400, "prompt = "),
    (GOOD | {"prompt": [[10**30]], "echo": True}, 400, "outside the vocabulary"),
    (GOOD | {"frequency_penalty": 1.5}, 400, "frequency_penalty is not supported"),
    (GOOD | {"temprature": 1}, 400, "temprature is not a field"),
    (TALK | {"messages": []}, 400, "messages = []"),
    (TALK | {"messages": [{"role": "cook", "content": "a"}]}, 400, "messages.0.role = 'cook'"),
    (TALK | {"messages": [{"role": "user"}]}, 400, "messages.0.content is missing"),
    (TALK | {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content = 5"),
    (TALK | {"messages": [{"role": "assistant", "content": "a"}]}, 400, "whose turn?"),
    (TALK | {"tools": [{"type": "function"}]}, 400, "tools is not supported"),
    (TALK | {"top_logprobs": 2}, 400, "logprobs is not true"),
    (TALK | {"messages": [{"role": "user", "content": "a" * 900}]}, 400, "the messages of 9"),
]


@pytest.mark.parametrize(("body", "status", "words"), BAD, ids=range(len(BAD)))
def test_mistakes_are_told_in_openais_form(address, body, status, words):
    talk = isinstance(body, dict) and "messages" in body
    path = "/v1/chat/completions" if talk else "/v1/completions"
    got, content = post(address, body, path)
    assert got == status
    error = content["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error"
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 300


def test_bodies_of_the_wrong_size_or_kind(address):
    assert post(address, b" " * (BODY_BYTES + 1))[0] == 413
    status, content = post(address, b"{}", **{"Content-Type": "text/plain"})
    assert status == 415 and "application/json" in content["error"]["message"]
    # Without a length told before.
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    parts = (b" " * 2**16 for _ in range(BODY_BYTES // 2**16 + 1))
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", parts, headers, encode_chunked=True)
    assert connection.getresponse().status == 413


def test_the_clients_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="a")
    with pytest.raises(openai.BadRequestError, match="at most 64 fit"):
        client.completions.create(model="org/tiny", prompt="a", max_tokens=1000)
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="org/tiny", input="a")


def test_another_sites_page_is_not_answered(address):
    """Its name may be made to lead here; a browser sends that name."""
    assert post(address, GOOD)[0] == 200
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", "/v1/models", headers={"Host": "evil.example"})
    response = connection.getresponse()
    assert response.status == 400
    assert response.headers["Access-Control-Allow-Origin"] is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, *NEUTRAL, *IGNORED})
FIELDS.remove("model")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3), st.booleans())
def test_rubbish_never_breaks_it(address, rubbish, talk):
    body = (TALK if talk else GOOD) | rubbish
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    path = "/v1/chat/completions" if talk else "/v1/completions"
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    assert response.status in (200, 400)
    if response.status == 400:
        assert json.loads(content)["error"]["message"]


# --- what it tells of itself ----------------------------------------------------------------------


def get(address, path) -> tuple[int, str]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_models_health_and_metrics(address, client):
    assert [model.id for model in client.models.list()] == ["org/tiny"]
    assert client.models.retrieve("org/tiny").max_model_len == 64
    assert get(address, "/v1/models/none")[0] == 404
    assert get(address, "/health") == (200, '{"status":"ok"}')

    def generated():
        _, text = get(address, "/metrics")
        rows = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        ok = 'olmo_jax_requests_total{endpoint="/v1/completions",status="200"}'
        return float(rows["olmo_jax_generated_tokens_total"]), float(rows.get(ok, 0)), rows

    tokens, requests, _ = generated()
    made = client.completions.create(model="org/tiny", prompt="a", max_tokens=11)
    after = generated()
    assert after[0] == tokens + made.usage.completion_tokens and after[1] == requests + 1
    assert after[2]["olmo_jax_running"] == after[2]["olmo_jax_waiting"] == "0.0"


# --- coming and going -----------------------------------------------------------------------------


class Stepped(Engine):
    """An engine that does a step when it is told to."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.may = threading.Semaphore(0)

    def step(self):
        self.may.acquire()
        return super().step()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def stepped(model, tokenizer):
    """A server with one place in the queue, whose engine waits for the test."""
    engine = Stepped(model, slots=SLOTS)
    driver = Driver(engine, SLOTS + 1)
    server = Server("org/tiny", driver, TextFiles(tokenizer, (), None))
    with serving(server) as address:
        yield server, address
        engine.may.release(1000)


def opened(address, **fields) -> socket.socket:
    """A client that has sent its request and reads nothing yet."""
    body = json.dumps({**GOOD, "max_tokens": 60, **fields}).encode()
    host, port = urlsplit(address).netloc.split(":")
    client = socket.create_connection((host, int(port)), timeout=60)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return client


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_frees_the_slots_and_the_place_in_the_queue(stepped, stream):
    server, address = stepped
    driver, engine = server.driver, server.driver.engine
    one = opened(address, stream=stream, n=SLOTS)
    until(lambda: driver.open == SLOTS)
    engine.may.release()
    if stream:
        while b"text_completion" not in one.recv(4096):
            pass
    two = opened(address, stream=stream)
    until(lambda: driver.open == SLOTS + 1)
    status, content = post(address, GOOD)
    assert status == 429 and content["error"]["code"] == "queue_full"
    one.close()
    until(lambda: driver.open == 1)
    two.close()
    until(lambda: driver.open == 0)
    engine.may.release(2)  # the step that was to come, and one to see
    until(lambda: not engine.busy)
    assert engine.tokens < SLOTS * 60 / 2


def test_a_client_that_does_not_read_holds_up_nobody(stepped):
    server, address = stepped
    slow = opened(address, stream=True, logprobs=20, n=SLOTS)
    until(lambda: server.driver.open == SLOTS)
    server.driver.engine.may.release(1000)
    until(lambda: server.driver.open == 0)
    assert post(address, GOOD)[0] == 200
    slow.close()


def test_connections_that_bring_nothing_are_closed(stepped, monkeypatch):
    """Or whoever opens enough of them would keep all others out."""
    monkeypatch.setattr(serve, "SILENT_SECONDS", 0.5)
    host, port = urlsplit(stepped[1]).netloc.split(":")
    silent, slow, once = (socket.create_connection((host, int(port)), timeout=60) for _ in range(3))
    slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
    once.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    answer = b""
    while not answer.endswith(b'{"status":"ok"}'):
        answer += once.recv(65536)
    once.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
    busy = opened(stepped[1])
    assert silent.recv(10) == slow.recv(10) == once.recv(10) == b""
    stepped[0].driver.engine.may.release(1000)
    assert busy.recv(15).startswith(b"HTTP/1.1 200")


def test_leaving_finishes_what_was_accepted_and_refuses_more(stepped, model, tokenizer):
    server, address = stepped
    driver = server.driver
    idle = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    idle.request("GET", "/health")
    assert idle.getresponse().read() == b'{"status":"ok"}'
    running = opened(address, temperature=0, max_tokens=30, n=SLOTS)
    until(lambda: driver.open == SLOTS)
    waiting = opened(address, temperature=0, max_tokens=30)
    until(lambda: driver.open == SLOTS + 1)
    server.on_failure()  # as a signal does
    until(lambda: server.leaving)
    idle.request("POST", "/v1/completions", json.dumps(GOOD), {"Content-Type": "application/json"})
    response = idle.getresponse()
    assert response.status == 503
    assert json.loads(response.read())["error"]["code"] == "shutting_down"
    driver.engine.may.release(1000)
    ids = tokenizer.encode("a", add_special_tokens=False).ids
    [done] = offline(model, [Request(tuple(ids), 30)])
    for client in running, waiting:
        content = b""
        while part := client.recv(65536):
            content += part
        answer = json.loads(content.partition(b"\r\n\r\n")[2])
        text = tokenizer.decode(done.token_ids, skip_special_tokens=False)
        assert all(choice["text"] == text for choice in answer["choices"])


def test_an_engine_that_fails_tells_everyone_and_ends_the_server(stepped, monkeypatch):
    server, address = stepped

    def fail():
        server.driver.engine.may.acquire()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.driver.engine, "step", fail)
    running = opened(address)
    until(lambda: server.driver.open == 1)
    server.driver.engine.may.release()
    answer = b""
    while part := running.recv(65536):
        answer += part
    assert answer.startswith(b"HTTP/1.1 500 ")
    until(lambda: server.leaving)
    assert str(server.driver.failure) == "out of memory"
