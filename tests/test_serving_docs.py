"""docs/serving.md says what the service has, and its curl commands work; docker/ says nothing that is not there."""

import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from starlette.testclient import TestClient
from typer.testing import CliRunner

from poly_encoders import PolyEncoder
from poly_encoders.cli import app
from poly_encoders.index import CandidateIndex
from poly_encoders.serving.app import ROUTERS, create_app
from poly_encoders.serving.serve_options import ServeOptions

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
DOCKER = ROOT / "docker"
KEY = {"Authorization": "Bearer my-key"}


@pytest.fixture
def client(saved_poly_encoder, tmp_path):
    """A service with an index, whose key is the page's."""
    model = PolyEncoder(str(saved_poly_encoder), device="cpu")
    rows = [{"id": "camp", "text": "I camp.", "year": 2024}, {"id": "no", "text": "No, never.", "year": 2025}]
    CandidateIndex.build(model, rows, str(tmp_path / "replies"))
    options = ServeOptions(str(saved_poly_encoder), str(tmp_path / "replies"), api_key="my-key")
    with TestClient(create_app(options, model)) as client:
        yield client


def curl(client, command):
    """What curl would be answered: of its options the page uses -X, -H and -d."""
    words = shlex.split(command)
    given = {word: words[place + 1] for place, word in enumerate(words) if word in ("-X", "-H", "-d")}
    [url] = [word for word in words if word.startswith("http://localhost:8080")]
    parts = urlsplit(url)
    headers = dict([given["-H"].split(": ")])
    method = given.get("-X", "POST" if "-d" in given else "GET")
    path = f"{parts.path}?{parts.query}"
    return client.request(method, path, headers=headers, content=given.get("-d"))


def test_every_curl_command_is_answered(client):
    commands = re.findall(r"^curl (.*?)(?=^curl |^```)", PAGE, flags=re.MULTILINE | re.DOTALL)
    answers = [curl(client, command) for command in commands]
    assert [answer.status_code for answer in answers] == [200] * 6, [answer.text for answer in answers]
    ranked, found, seen, added, changed, deleted = (answer.json() for answer in answers)
    assert {row["index"] for row in ranked} == {0, 1}
    assert {row["id"] for row in found["results"]} == {"camp", "no"}
    assert [row["id"] for row in seen["candidates"]] == ["no"]
    assert (added["written"], changed["written"], deleted["deleted"], deleted["total"]) == (1, 1, 1, 2)


def test_the_table_has_every_route():
    told = set()  # of "`GET`, `POST /candidates`" two
    for cell in re.findall(r"^\| (`(?:GET|POST)\b.*?) \|", PAGE, flags=re.MULTILINE):
        methods: list[str] = []
        for words in re.findall(r"`([^`]+)`", cell):
            *named, last = words.split()
            if last.startswith("/"):
                told |= {(method, last) for method in [*methods, *named]}
                methods = []
            else:
                methods += [*named, last]
    there = {
        (method, route.path)
        for module in ROUTERS
        for route in module.router.routes
        if route.include_in_schema
        for method in route.methods - {"HEAD"}
    }
    assert told == there


def test_the_table_has_every_option_and_its_default():
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"(--[\w-]+)  ", help_text)) - {"--help"}
    rows = re.findall(r"^\| (`--.*?) \| (.*?) \|", PAGE, flags=re.MULTILINE)
    assert {name for row, _ in rows for name in re.findall(r"`(--[\w-]+)`", row)} == options
    for names, default in rows:
        found = re.findall(rf"{re.findall('`(--[^`]+)`', names)[-1]} .*?default: ([\d.]+)", help_text)
        assert not found or float(default.split(", ")[-1].replace(",", "")) == float(found[0]), names


def test_headers_errors_and_metrics_are_there(client):
    answer = client.post("/rerank", json={"query": "Hi!", "texts": ["a", "b"]}, headers=KEY)
    headers = re.findall(r"`(x-[\w-]+)`", PAGE)
    assert len(headers) == 5
    assert all(name in answer.headers for name in headers)
    forms = {
        "/rerank": ({"query": "", "texts": ["a"]}, 422, {"error", "error_type"}),
        "/v2/rerank": ({"query": "", "documents": ["a"]}, 400, {"message", "detail"}),
        "/score": ({"text_1": "", "text_2": "a"}, 400, {"error"}),
    }
    for path, (body, status, fields) in forms.items():
        wrong = client.post(path, json=body, headers=KEY)
        assert (wrong.status_code, wrong.json().keys()) == (status, fields), path
    assert wrong.json()["error"].keys() >= {"message", "type", "code"}
    counted = client.get("/metrics", headers=KEY).text
    names = re.findall(r"`(?:poly_encoders)?(_[a-z_]+)`", PAGE)
    assert len(names) == 11
    assert all(f"# TYPE poly_encoders{name} " in counted for name in names), names
    assert set(re.findall(r"# TYPE poly_encoders(\w+?)(?<!_created) ", counted)) == set(names)


def test_what_opens_without_the_key(client):
    for path in ("/", "/docs", "/openapi.json", "/health", "/ready", "/ping", "/live"):
        assert client.get(path).status_code == 200, path
    for path in ("/metrics", "/info", "/candidates"):
        assert client.get(path).status_code == 401, path


# --- docker/, which is read only: there is no Docker here ------------------------------------------------------------


def test_the_image_is_made_of_files_that_are_there():
    """Every folder of the package is copied, and let through to the build."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", text, flags=re.MULTILINE)
    copied = {name for line in lines for name in line.split()}
    let_through = set(re.findall(r"^!(.+)$", (DOCKER / "Dockerfile.dockerignore").read_text(), flags=re.MULTILINE))
    assert copied == let_through
    assert all((ROOT / name).exists() for name in copied)
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert {"README.md", "LICENSE", "pyproject.toml", "poly_encoders", *setuptools["package-dir"].values()} <= copied
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"^ARG EXTRAS=(.*)$", text, flags=re.MULTILINE)[1].split(",")) <= extras.keys()
    assert re.search(r"^USER poly$", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["compose.yaml", "compose.milvus.yaml"])
def test_the_compose_files_start_the_command_as_it_is(name):
    services = yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))["services"]
    model, *options = services["serve"]["command"]
    assert model == "/model"
    help_text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert all(f"{word} " in help_text for word in options if word.startswith("--"))


def test_the_compose_file_builds_from_the_checkout():
    made = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    for service in made["services"].values():
        build = service["build"]
        assert (DOCKER / build["context"]).resolve() == ROOT
        assert (ROOT / build["dockerfile"]).is_file()
        volumes = [volume for volume in service["volumes"] if not volume.startswith("${")]
        assert {volume.split(":")[0] for volume in volumes} == set(made["volumes"])
    program, *words = made["services"]["build-index"]["entrypoint"]
    assert (program, words[:2]) == ("poly-encoders", ["index", "build"])
    assert made["services"]["serve"]["command"][2] == words[-1]
