"""A server that speaks vLLM's endpoints, on a real socket, with real tokens of a tiny Llama, its adapters and its weights.

It draws with a model of its own that it reads from a folder, as vLLM does: nothing of the client's is shared but the files. Its
faults are chosen by name, so that a test says what is wrong with a server.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

import tiltlm as tl
from tiltlm.records import Prompts


@dataclass
class Serving:
    """`with Serving(folder) as server: VLLMServer(server.url)`.

    Attributes:
        model: folder of the base model.
        seconds: that every answer takes.
        stale: adapters and weights are taken and never used.
        runtime_lora, dev_mode: whether the endpoints that change weights are there.
        most: tokens after which a completion stops by itself, whatever was asked.
        deaf: ignore stop strings and end tokens.
        mangle: changes each choice before it is sent.
        log: (path, body) of every request.
    """

    model: Any
    seconds: float = 0.0
    stale: bool = False
    runtime_lora: bool = True
    dev_mode: bool = True
    most: int = 10_000
    deaf: bool = False
    mangle: Callable[[dict], dict] = lambda choice: choice
    log: list = field(default_factory=list)
    adapters: dict[str, str] = field(default_factory=dict)

    def __enter__(self):
        self._load(self.model)
        self._turn = threading.Lock()  # one model, one request at a time
        handler = type("Handler", (_Handler,), {"serving": self})
        self._http = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self._http.shutdown()
        self._http.server_close()

    def _load(self, folder):
        self._lm, self._priors = tl.load(folder), {}

    def calls(self, path):
        return [body for where, body in self.log if where == path]

    def answer(self, path: str, body: Mapping) -> tuple[int, Any]:
        time.sleep(self.seconds)
        with self._turn:
            self.log.append((path, body))
            routes = {"/v1/models": self._models, "/v1/completions": self._completions}
            if self.runtime_lora:
                routes |= {"/v1/load_lora_adapter": self._load_adapter, "/v1/unload_lora_adapter": self._unload}
            if self.dev_mode:
                routes |= {"/collective_rpc": self._rpc, "/reset_prefix_cache": lambda body: (200, None)}
            if path not in routes:
                return 404, {"detail": "Not Found"}
            return routes[path](body)

    def _models(self, body):
        base = {"id": "tiny", "root": str(self.model), "parent": None}
        return 200, {
            "data": [{"id": name, "root": path, "parent": "tiny"} for name, path in self.adapters.items()] + [base]
        }

    def _load_adapter(self, body):
        name, path = body["lora_name"], body["lora_path"]
        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        self.adapters[name] = path
        if not self.stale:
            self._priors[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _unload(self, body):
        del self.adapters[body["lora_name"]]
        return 200, "Success"

    def _rpc(self, body):
        assert body["method"] == "reload_weights"
        if not self.stale:
            self._load(body["kwargs"]["weights_path"])
        return 200, {"results": [None]}

    def _completions(self, body):
        if body["model"] not in {"tiny", *self.adapters}:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if len(body["prompt"]) >= 100:
            return 400, {"error": {"message": "This model's maximum context length is 100 tokens."}}
        prior = self._lm.prior(
            max_new_tokens=min(body["max_tokens"], self.most),
            temperature=body["temperature"],
            top_k=body["top_k"] or None,
            stop=() if self.deaf else tuple(body["stop"]),
            adapter=self._priors.get(body["model"]),
        )
        ends = tuple(body["stop_token_ids"])
        assert set(prior.body.eos) <= set(ends)
        if not self.deaf:
            prior = replace(prior, body=replace(prior.body, eos=ends))
        tokens = torch.tensor([body["prompt"]])
        prompts = Prompts(tokens, torch.ones_like(tokens, dtype=torch.bool), ("",))
        draws = prior.draw(prompts, body["n"], torch.Generator().manual_seed(body["seed"] % 2**63))
        choices = []
        for row, (tokens, keep, log_q) in enumerate(zip(draws.tokens, draws.mask, draws.log_q, strict=True)):
            known = {"token_logprobs": log_q[keep].tolist()}
            choices.append(self.mangle({"index": row, "token_ids": tokens[keep].tolist(), "logprobs": known}))
        return 200, {"choices": choices[::-1]}  # in whatever order they finished


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256


class _Handler(BaseHTTPRequestHandler):
    serving: Serving
    protocol_version = "HTTP/1.1"

    def _send(self, body):
        code, answer = self.serving.answer(self.path, body)
        content = b"" if answer is None else json.dumps(answer).encode()
        if isinstance(answer, str):
            content = answer.encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json" if isinstance(answer, dict) else "text/plain")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self._send({})

    def do_POST(self):
        self._send(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def log_message(self, *args):
        """A test's output is its own."""
