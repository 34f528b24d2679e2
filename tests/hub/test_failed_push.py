"""A push that fails: what it says, what it leaves, and how it goes on."""

import hashlib

import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError

import tiny
from hub_client import logged_in
from poly_encoders.push_errors import PushError
from poly_encoders.pushing import push_folder

TOKENS = ["hf_alice", "hf_alice_read", "hf_bob", "hf_wrong"]


def assert_fails(model, hub, match, name="acme/poly", token=None, **options):
    """The push fails with this message, which holds no token, and the Hub stays as it was."""
    state = hub.state()
    with pytest.raises(PushError, match=match) as caught:
        model.push_to_hub(name, token=token, **options)
    assert not any(token in str(caught.value) for token in TOKENS)
    assert hub.state() == state
    return str(caught.value)


@pytest.mark.parametrize(
    ("token", "making", "replacing", "proposing"),
    [
        ("hf_alice_read", "read-only", "read-only", "read-only"),
        # To bob a private repository looks as if it were not there, and he may not make it.
        ("hf_bob", "member of acme", "member of acme", "member of acme"),
        ("hf_wrong", *["does not accept this token"] * 3),
        (None, *["You are not logged in"] * 3),
    ],
)
def test_who_may_not(token, making, replacing, proposing, models, hub):
    model = models["acme/poly"]
    with logged_in(hub, token):
        assert_fails(model, hub, making)
        model.push_to_hub("acme/private", token="hf_alice", private=True)
        tiny.shift(model)
        uploads = len(hub.requests("PUT"))
        assert_fails(model, hub, replacing, "acme/private", exist_ok=True)
        assert len(hub.requests("PUT")) == uploads  # nothing is sent for nothing
        assert_fails(model, hub, proposing, "acme/private", create_pr=True)
    assert model.model_card_data.model_id == "acme/private"  # of the push that went well


def test_nobody_else_reads_a_private_model(models, hub):
    with logged_in(hub):
        models["acme/poly"].push_to_hub("acme/poly", private=True)
    for token in ("hf_bob", None):
        with logged_in(hub, token), pytest.raises(RepositoryNotFoundError):
            hf_hub_download("acme/poly", "config.json")
    with logged_in(hub, "hf_alice_read"):
        assert hf_hub_download("acme/poly", "config.json")


@pytest.mark.parametrize(
    ("where", "status", "message", "match"),
    [
        (("POST", "/repos/create"), 402, "Payment required", "no room"),
        (("POST", "/objects/batch"), 403, "Private repository storage limit reached", "no room.*settings/billing"),
        (("POST", "/commit/"), 413, "Payload too large", "no room"),
        (("POST", "/commit/"), 429, "Too many", "in 17 seconds"),
        (("POST", "/preupload/"), 400, "Strange file", "Strange file"),
        (("POST", "/commit/"), 412, "changed", "Someone else changed"),
        (("GET", "/api/models/"), 500, "Broken", "status 500"),
        (("PUT", "/lfs/"), 403, "Link expired", "may not write"),
        (("POST", "/validate-yaml"), 503, "Down", "status 503"),
    ],
)
def test_what_the_hub_refuses(where, status, message, match, models, as_alice, no_waiting):
    as_alice.fail_next(*where, status, message=message, times=None, headers={"Retry-After": "17"})
    text = assert_fails_to_fill(models["acme/poly"], as_alice, match)
    assert "/tmp" not in text
    as_alice.clear_faults()
    models["acme/poly"].push_to_hub("acme/poly")  # the same call, no exist_ok
    assert len(as_alice.repository("acme/poly").history()) == 2


def assert_fails_to_fill(model, hub, match):
    """As `assert_fails`, for a name that is new: it may be kept for another try, but empty."""
    with pytest.raises(PushError, match=match) as caught:
        model.push_to_hub("acme/poly")
    text = str(caught.value)
    if "still empty" in text:
        assert hub.files("acme/poly") == {}
    else:
        assert not hub.repositories
    assert model.model_card_data.model_id is None
    return text


def test_a_card_that_the_hub_refuses(models, as_alice, tmp_path):
    model = models["acme/cross"]
    model.save_pretrained(str(tmp_path / "cross"))
    (tmp_path / "cross" / "README.md").write_text("---\npipeline_tag: [1]\n---\n# Mine\n")
    with pytest.raises(PushError, match=r"(?s)pipeline_tag.*README.md.*Nothing was left.*still in .*cross"):
        push_folder(tmp_path / "cross", "acme/cross")
    assert not as_alice.requests("PUT")
    assert not as_alice.repositories


def test_no_network(models, hub, monkeypatch):
    with logged_in(hub):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        assert_fails(models["acme/poly"], hub, "Look whether the network is up")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        assert_fails(models["acme/poly"], hub, "HF_HUB_OFFLINE is set")


def test_a_dropped_upload_changes_nothing_and_goes_on_later(models, as_alice, no_waiting, tmp_path):
    model = models["acme/bi"]
    model.save_pretrained(str(tmp_path / "bi"))
    before = {file: file.read_bytes() for file in (tmp_path / "bi").rglob("*") if file.is_file()}
    first, second = (
        hashlib.sha256((tmp_path / "bi" / f"{side}_0_Transformer" / "model.safetensors").read_bytes()).hexdigest()
        for side in ("query", "document")
    )
    as_alice.drop_next("PUT", f"/lfs/{second}", after=20_000, times=None)
    with pytest.raises(PushError, match="Look whether the network is up") as caught:
        push_folder(tmp_path / "bi", "acme/bi")
    text = str(caught.value)
    assert "acme/bi was made and is still empty" in text
    assert "not sent again" in text
    assert str(tmp_path / "bi") in text
    assert as_alice.files("acme/bi") == {}
    assert before == {file: file.read_bytes() for file in (tmp_path / "bi").rglob("*") if file.is_file()}
    assert not list(as_alice.blobs.glob("arriving-*"))
    as_alice.clear_faults()
    as_alice.log.clear()
    model.push_to_hub("acme/bi")  # from the model, not the folder: its bytes are the same
    assert [request.path.split("?")[0] for request in as_alice.requests("PUT")] == [f"/lfs/{second}"]
    assert first in {entry.sha256 for entry in as_alice.repository("acme/bi").find("main").tree.values()}
    assert len(as_alice.repository("acme/bi").history()) == 2


def test_a_connection_that_comes_back_needs_no_second_push(models, as_alice, no_waiting):
    as_alice.drop_next("PUT", "/lfs/", after=20_000, times=2)
    as_alice.fail_next("POST", "/objects/batch", 503)
    models["acme/poly"].push_to_hub("acme/poly")
    assert len(as_alice.repository("acme/poly").history()) == 2


def test_a_failed_second_push_leaves_the_first_model(models, as_alice, no_waiting):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    tiny.shift(model)
    as_alice.drop_next("PUT", "/lfs/", after=20_000, times=None)
    text = assert_fails(model, as_alice, "network", exist_ok=True, revision="new-branch")
    assert "Nothing in the repository has changed" in text
    as_alice.clear_faults()
    model.push_to_hub("acme/poly", exist_ok=True, revision="new-branch")
    assert len(as_alice.repository("acme/poly").history("new-branch")) == 3


@pytest.mark.parametrize("arrives", [True, False])
def test_a_commit_whose_answer_is_lost_is_made_once(arrives, models, as_alice, no_waiting):
    as_alice.drop_next("POST", "/commit/", after=None if arrives else 100)
    url = models["acme/poly"].push_to_hub("acme/poly")
    history = as_alice.repository("acme/poly").history()
    assert len(history) == 2
    assert url.endswith(history[0].oid)


def test_a_commit_that_never_gets_an_answer(models, as_alice, no_waiting):
    as_alice.drop_next("POST", "/commit/", after=100, times=None)
    with pytest.raises(PushError, match="may have been made all the same"):
        models["acme/poly"].push_to_hub("acme/poly")
    assert as_alice.files("acme/poly") == {}


def test_a_pull_request_is_not_opened_twice(models, as_alice, no_waiting):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    tiny.shift(model)
    as_alice.drop_next("POST", "/commit/", after=None)
    with pytest.raises(PushError, match=r"may have been opened all the same.*/acme/poly/discussions"):
        model.push_to_hub("acme/poly", create_pr=True)
    assert [ref for ref in as_alice.repository("acme/poly").refs if "pr" in ref] == ["refs/pr/1"]


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
    with pytest.raises(PushError, match="Someone else changed acme/poly"):
        model.push_to_hub("acme/poly", exist_ok=True)
    assert as_alice.files("acme/poly")["config.json"] == b"theirs"
