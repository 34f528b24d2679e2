"""A push that fails: what it says, what it leaves, and how it goes on."""

import hashlib

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

import tiny
from hub_client import logged_in
from poly_encoders.hub.pushing import PushError, push_folder

TOKENS = ["hf_alice", "hf_alice_read", "hf_bob", "hf_wrong"]


def assert_fails(model, hub, match, name="acme/poly", **options):
    """The push fails with this message, which holds no token, and the Hub stays as it was."""
    state = hub.state()
    with pytest.raises(PushError, match=match) as caught:
        model.push_to_hub(name, **options)
    assert not any(token in str(caught.value) for token in TOKENS)
    assert hub.state() == state


@pytest.mark.parametrize(
    ("token", "match"),
    [
        ("hf_alice_read", r"may not write to acme/\w+ .*read-only"),
        # To bob a private repository looks as if it were not there, and he may not make it.
        ("hf_bob", r"may not write to acme/\w+ .*namespace"),
        ("hf_wrong", "not logged in .* or with a token that is misspelt"),
        (None, "not logged in"),
    ],
)
def test_no_token_and_no_right(token, match, models, hub):
    model = models["acme/poly"]
    with logged_in(hub, token):
        assert_fails(model, hub, match)
        model.push_to_hub("acme/private", token="hf_alice", private=True)
        tiny.shift(model)
        uploads = len(hub.requests("PUT"))
        assert_fails(model, hub, match, "acme/private", exist_ok=True)
        assert len(hub.requests("PUT")) == uploads  # nothing is sent for nothing
        assert_fails(model, hub, match, "acme/private", create_pr=True)
    if token != "hf_alice_read":
        with logged_in(hub, token), pytest.raises((RepositoryNotFoundError, HfHubHTTPError)):
            hf_hub_download("acme/private", "config.json")  # nobody else reads a private model
    assert model.model_card_data.model_id == "acme/private"  # of the push that went well


def test_no_network(models, hub, monkeypatch):
    with logged_in(hub):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert_fails(models["acme/poly"], hub, "Look whether the network is up")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert_fails(models["acme/poly"], hub, "offline mode is enabled.*Look whether")


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        (("POST", "/repos/create"), 402, "Payment required"),
        (("POST", "/preupload/"), 400, "Strange file"),
        (("POST", "/commit/"), 413, "Payload too large"),
        (("GET", "/api/models/"), 500, "Broken"),
    ],
)
def test_what_else_the_hub_says_is_passed_on(where, status, message, models, as_alice, no_waiting):
    as_alice.fail_next(*where, status, message=message, times=9)
    with pytest.raises(HfHubHTTPError, match=f"{status}|{message}"):
        models["acme/poly"].push_to_hub("acme/poly")
    as_alice.faults.clear()
    models["acme/poly"].push_to_hub("acme/poly")  # the same call, no exist_ok
    assert len(as_alice.titles("acme/poly")) == 2


def test_a_card_that_the_hub_refuses(models, as_alice, tmp_path):
    models["acme/cross"].save_pretrained(str(tmp_path))
    (tmp_path / "README.md").write_text("---\npipeline_tag: [1]\n---\n# Mine\n")
    with pytest.raises(ValueError, match="pipeline_tag"):
        push_folder(tmp_path, "acme/cross")
    assert not as_alice.requests("PUT")
    assert as_alice.files("acme/cross") == {}


def test_a_dropped_upload_changes_nothing_and_goes_on_later(models, as_alice, no_waiting, tmp_path):
    model = models["acme/bi"]
    model.save_pretrained(str(tmp_path / "bi"))
    before = {file: file.read_bytes() for file in (tmp_path / "bi").rglob("*") if file.is_file()}
    second = tmp_path / "bi" / "document_0_Transformer" / "model.safetensors"
    place = f"/lfs/{hashlib.sha256(second.read_bytes()).hexdigest()}"
    as_alice.drop_next("PUT", place, times=99)
    with pytest.raises(PushError, match=r"Look whether the network is up.*not sent twice"):
        push_folder(tmp_path / "bi", "acme/bi")
    assert as_alice.files("acme/bi") == {}
    assert before == {file: file.read_bytes() for file in (tmp_path / "bi").rglob("*") if file.is_file()}
    as_alice.faults.clear()
    as_alice.log.clear()
    model.push_to_hub("acme/bi")  # from the model, not the folder: its bytes are the same
    assert [request.path.split("?")[0] for request in as_alice.requests("PUT")] == [place]
    assert len(as_alice.titles("acme/bi")) == 2


def test_a_failed_second_push_leaves_the_first_model(models, as_alice, no_waiting):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    tiny.shift(model)
    as_alice.fail_next("HEAD", "/README.md", 500, times=99)
    state = as_alice.state()
    with pytest.raises(OSError, match="on the Hub"):  # what cannot be read is not replaced
        model.push_to_hub("acme/poly", exist_ok=True)
    assert as_alice.state() == state
    as_alice.faults.clear()
    as_alice.drop_next("PUT", "/lfs/", times=99)
    assert_fails(model, as_alice, "network", exist_ok=True)


def test_a_commit_of_someone_else_s_in_between_is_not_undone(models, as_alice, monkeypatch):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    tiny.shift(model)
    original = HfApi.list_repo_files

    def meanwhile(api, *args, **kwargs):
        files = original(api, *args, **kwargs)
        HfApi().upload_file(path_or_fileobj=b"theirs", path_in_repo="config.json", repo_id="acme/poly")
        return files

    monkeypatch.setattr(HfApi, "list_repo_files", meanwhile)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        model.push_to_hub("acme/poly", exist_ok=True)
    assert as_alice.files("acme/poly")["config.json"] == b"theirs"
