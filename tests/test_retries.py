"""What a real client raises at a real server that fails in passing, and whether another try is made."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2 as httpx
import openai
import pytest

from tiltlm.evidence.running import Isolated, Retried

ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "7"}}],
}

REWARD = """
import httpx2 as httpx


def asked(completions):
    return [float(httpx.post("{url}", json={{}}).raise_for_status().json()["choices"][0]["message"]["content"]) for _ in completions]
"""


class Failing(BaseHTTPRequestHandler):
    """Answers with the statuses that are waiting, 0 hangs up, and then with 200."""

    waiting: list[int] = []  # noqa: RUF012

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status = self.waiting.pop(0) if self.waiting else 200
        if status == 0:
            self.connection.close()
            return
        body = json.dumps(ANSWER if status == 200 else {"error": {"message": "not now"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_):  # what it does after hanging up
        pass


@pytest.fixture
def server():
    Failing.waiting = []
    httpd = Quiet(("127.0.0.1", 0), Failing)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def by_openai(url):
    def reward(completions):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            found = [
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": c}])
                for c in completions
            ]
        return [float(one.choices[0].message.content) for one in found]

    return reward


def by_httpx(url):
    def reward(completions):
        with httpx.Client(timeout=10) as client:
            found = [
                client.post(f"{url}/v1/chat/completions", json={"text": c}).raise_for_status() for c in completions
            ]
        return [float(one.json()["choices"][0]["message"]["content"]) for one in found]

    return reward


@pytest.mark.parametrize("client", [by_openai, by_httpx])
@pytest.mark.parametrize("failures", [[429], [503], [500, 502], [408, 504], [0]], ids=str)
def test_what_passes_is_asked_again(server, client, failures):
    pauses = []
    Failing.waiting = list(failures)
    reward = Retried(client(server), times=2, sleep=pauses.append)
    assert reward(completions=["a text"]) == [7.0]
    assert len(pauses) == len(failures)


@pytest.mark.parametrize("client", [by_openai, by_httpx])
@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_stays_is_not(server, client, status):
    pauses = []
    Failing.waiting = [status]
    with pytest.raises((openai.APIStatusError, httpx.HTTPStatusError)):
        Retried(client(server), times=2, sleep=pauses.append)(completions=["a text"])
    assert pauses == []


def test_the_users_own_choice_is_all_that_counts(server):
    Failing.waiting = [503]
    with pytest.raises(httpx.HTTPStatusError):
        Retried(by_httpx(server), times=2, on=[ValueError], sleep=lambda seconds: None)(completions=["a text"])


def test_a_worker_process_tells_the_status(server, tmp_path):
    (tmp_path / "remote.py").write_text(REWARD.format(url=server))
    pauses = []
    Failing.waiting = [429, 503]
    with Isolated(f"{tmp_path / 'remote.py'}:asked", timeout=60) as worker:
        assert Retried(worker, times=2, sleep=pauses.append)(completions=["a text"]) == [7.0]
    assert len(pauses) == 2
