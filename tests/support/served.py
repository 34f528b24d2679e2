"""`poly-encoders serve` in a process of its own, on a free port."""

import http.client
import json
import time
from contextlib import contextmanager

import forks


class Server:
    """A running `poly-encoders serve`."""

    def __init__(self, process):
        self.process = process
        self.wait(lambda: " at http://" in process.stdout.read())
        process.stdout.seek(0)
        said = process.stdout.read()
        self.port = int(said.split("http://127.0.0.1:")[1].split()[0])
        self.wait(self.answers)

    def wait(self, condition):
        end = time.monotonic() + 240
        while not condition():
            self.process.stdout.seek(0)
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.1)

    def answers(self):
        try:
            return self.call("GET", "/health")[0] == 200
        except OSError:
            return False

    def call(self, method, path, body=None, key="secret"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        found = answer.read()
        connection.close()
        return answer.status, found

    def logged(self):
        self.process.stderr.seek(0)
        return self.process.stderr.read()


@contextmanager
def running(model, *options):
    command = ["-m", "poly_encoders", "serve", str(model), "--port", "0", "--api-key", "secret", *options]
    process = forks.Process(command)
    try:
        yield Server(process)
    finally:
        if process.poll() is None:
            process.kill()
