"""Python processes that start at once, forked from one that has loaded the libraries: a fresh one takes seconds."""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[2]


class Process:
    """A forked process, used like `subprocess.Popen`; `stdout` and `stderr` hold what it has written so far."""

    def __init__(
        self, command: Sequence[object], env: Mapping[str, str] | None = None, cwd: Path = ROOT, hide: bool = False
    ) -> None:
        """Start it.

        Args:
            command: What `python` would be given: `["-c", code, ...]`, `["-m", module, ...]` or `[script, ...]`.
            env: The whole environment; this process's when left out.
            cwd: Folder to run in, the checkout unless told.
            hide: Have the import of this package fail, as where it is not installed.
        """
        self.stdout, self.stderr = _file(), _file()
        self.returncode: int | None = None
        self.pid: int = _ask(
            command=[str(word) for word in command],
            env=dict(os.environ if env is None else env),
            cwd=str(cwd),
            hide=hide,
            outputs=[self.stdout.name, self.stderr.name],
        )

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _ask(ended=self.pid)
        return self.returncode

    def wait(self, timeout: float = 300) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"Not done in {timeout} s: {self.stderr.read()[-3000:]}")
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(command: Sequence[object], *, ranks: int = 1, **options: object) -> str:
    """Run it to its end, which must be a good one; what it (with several ranks, the first) printed.

    Args:
        command: As `Process` takes it, like the other options.
        ranks: Processes to run at once as torch.distributed's launcher would, for gloo.
    """
    environments = [options.pop("env", None)]
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {**(environments[0] or os.environ), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    processes = [Process(command, env, **options) for env in environments]
    codes = [process.wait() for process in processes]
    written = "\n".join(process.stdout.read()[-1000:] + process.stderr.read()[-5000:] for process in processes)
    assert not any(codes), f"{codes}\n{written}"
    processes[0].stdout.seek(0)
    return processes[0].stdout.read()


def _file() -> TextIO:
    return tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace")


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def _ask(**request: object) -> int | None:
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


# --- in the process that forks: it runs nothing itself, so that there is no thread and no state to copy --------------


def _serve() -> None:
    for name in ("torch", "datasets", "accelerate", "sentence_transformers", "transformers.trainer"):
        importlib.import_module(name)
    for name in ("models.bert.modeling_bert", "pipelines", "integrations.accelerate"):
        importlib.import_module(f"transformers.{name}")
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            _become(**request)
            return
        print(json.dumps(answer), flush=True)  # noqa: T201 - the protocol


def _become(command: list[str], env: dict[str, str], cwd: str, hide: bool, outputs: list[str]) -> None:
    """Be the process that was asked for; an error or an exit ends this one as it would any."""
    for number, name in enumerate([os.devnull, *outputs]):
        os.dup2(os.open(name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    _read_environment_again()
    if hide:
        sys.meta_path.insert(0, _Hide())
    kind, *words = command
    sys.path[0] = "" if kind in ("-c", "-m") else str(Path(kind).parent.resolve())
    sys.argv = [kind, *words[1:]] if kind in ("-c", "-m") else command
    if kind == "-m":
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(words[0], "<code>", "exec"), vars(main))
    else:
        runpy.run_path(kind, run_name="__main__")


def _read_environment_again() -> None:
    """What the libraries read of the environment on import."""
    import huggingface_hub.constants

    constants = importlib.reload(huggingface_hub.constants)
    importlib.reload(sys.modules["datasets.config"])
    cache = os.environ.get("HF_MODULES_CACHE", os.path.join(constants.HF_HOME, "modules"))
    for name in ("utils.hub", "utils", "dynamic_module_utils"):
        sys.modules[f"transformers.{name}"].HF_MODULES_CACHE = cache


class _Hide:
    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] in ("poly_encoders", "modeling"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if __name__ == "__main__":
    _serve()
