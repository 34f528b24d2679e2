"""The command as it runs: keys, logs, workers, clients that go away, and an end that loses nothing."""

import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from poly_encoders import PolyEncoder
from poly_encoders.cli import app
from served import running

pytestmark = pytest.mark.slow
BODY = {"query": "hello there", "texts": ["yes, green tea", "no"], "raw_scores": True}


def expected(model):
    return [row["score"] for row in PolyEncoder(str(model), device="cpu").rank(BODY["query"], BODY["texts"])]


def test_a_service_from_begin_to_end(saved_poly_encoder):
    with running(saved_poly_encoder) as server:
        status, found = server.call("POST", "/rerank", BODY)
        assert status == 200
        assert [row["score"] for row in json.loads(found)] == pytest.approx(expected(saved_poly_encoder), abs=1e-5)
        assert server.call("POST", "/rerank", BODY, key="wrong")[0] == 401
        # a body that is cut off, and a client that goes away: the service stays up
        large = json.dumps({**BODY, "texts": [f"yes {place} " * 50 for place in range(500)]}).encode()
        for sent, length in ((b"{", 2), (large, len(large))):
            with socket.create_connection(("127.0.0.1", server.port)) as rude:
                head = ["POST /rerank HTTP/1.1", "Host: x", "Authorization: Bearer secret", f"Content-Length: {length}"]
                rude.sendall("\r\n".join([*head, "", ""]).encode() + sent)
        assert server.call("POST", "/rerank", BODY)[0] == 200
        # what was begun is ended
        many = {**BODY, "texts": [f"a candidate, number {place}, of many" for place in range(3000)]}
        with ThreadPoolExecutor(1) as pool:
            begun = pool.submit(server.call, "POST", "/rerank", many)
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            status, found = begun.result()
        assert status == 200
        assert len(json.loads(found)) == 3000
        assert server.process.wait(60) in (0, -signal.SIGTERM)
        lines = [json.loads(line) for line in server.logged().splitlines() if line.startswith("{")]
        assert {line["status"] for line in lines} >= {200, 401}
        assert all({"time", "level", "request", "path", "ms"} <= line.keys() for line in lines)
        assert not any(word in server.logged() for word in ("green tea", "secret", "candidate,", "Traceback"))


def test_several_workers(saved_poly_encoder):
    with running(saved_poly_encoder, "--workers", "2") as server:
        with ThreadPoolExecutor(8) as pool:
            answers = [*pool.map(lambda _: server.call("POST", "/rerank", BODY), range(40))]
        assert {status for status, _ in answers} == {200}
        assert len({found for _, found in answers}) == 1
        metrics = server.call("GET", "/metrics")[1].decode()
        assert 'poly_encoders_requests_total{path="/rerank",status="200"} 40.0' in metrics
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) in (0, -signal.SIGTERM)


def test_answers_do_not_wait_for_their_own_body(saved_poly_encoder, monkeypatch):
    """The listening socket, whose options those of its connections inherit, sends at once."""
    found = {}

    def run(app, fd, **options):
        with socket.socket(fileno=os.dup(fd)) as listening:
            found["nodelay"] = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    monkeypatch.setattr("uvicorn.run", run)
    result = CliRunner().invoke(app, ["serve", str(saved_poly_encoder), "--port", "0"])
    assert result.exit_code == 0, result.output
    assert found["nodelay"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nowhere"], "no saved model"),
        (["MODEL", "--index", "nowhere"], "Error: nowhere does not exist"),
        (["nowhere", "--workers", "2"], "no saved model"),
        (["nowhere", "--host", "0.0.0.0"], "No API key"),
        (["MODEL", "--api-key", " "], "empty"),
        (["MODEL", "--milvus", "http://localhost:1"], "--index"),
        (["MODEL", "--timeout", "0"], "timeout"),
    ],
)
def test_what_cannot_be_served(saved_poly_encoder, options, said):
    words = [str(saved_poly_encoder) if word == "MODEL" else word for word in options]
    result = CliRunner().invoke(app, ["serve", *words, "--port", "0"])
    assert result.exit_code != 0
    assert said in result.output
