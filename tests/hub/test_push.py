"""push_to_hub: one commit with all of a model and nothing else, on whatever was there before."""

import json

import pytest
from huggingface_hub import HfApi
from typer.testing import CliRunner

import tiny
from hub_client import logged_in
from parlai_original import FIXTURES
from poly_encoders.cards.user_text import Card
from poly_encoders.cli import app
from poly_encoders.model_files import model_files
from poly_encoders.push_errors import PushError
from poly_encoders.pushing import push_folder

KINDS = ["acme/poly", "acme/bi", "acme/cross"]


def titles(hub, name, revision="main"):
    return [commit.title for commit in hub.repository(name).history(revision)]


@pytest.mark.parametrize("name", KINDS)
def test_a_push_is_one_commit_with_every_file(name, models, as_alice, tmp_path):
    model = models[name]
    model.save_pretrained(str(tmp_path / "saved"))
    url = model.push_to_hub(name)
    saved = {file.relative_to(tmp_path / "saved").as_posix() for file in (tmp_path / "saved").rglob("*.*")}
    saved = {path for path in saved if (tmp_path / "saved" / path).is_file()}
    pushed = as_alice.files(name)
    assert set(pushed) == saved
    assert titles(as_alice, name) == [f"Add new {type(model).__name__} model", "initial commit"]
    assert url == f"{as_alice.url}/{name}/commit/{as_alice.repository(name).find('main').oid}"
    assert f'"{name}"' in pushed["README.md"].decode()  # the card's snippets load it from there
    for path in saved - {"README.md"}:
        assert pushed[path] == (tmp_path / "saved" / path).read_bytes(), path
    weights = [entry for path, entry in as_alice.repository(name).find("main").tree.items() if path.endswith("tensors")]
    assert weights
    assert all(entry.sha256 for entry in weights)
    # What `poly-encoders push` picks out of a folder is all that a model consists of.
    assert set(model_files(tmp_path / "saved")) == saved


def test_an_unchanged_model_makes_no_commit(models, as_alice):
    for name, model in models.items():
        first = model.push_to_hub(name)
        state, uploads = as_alice.state(), len(as_alice.requests("PUT"))
        assert model.push_to_hub(name, exist_ok=True, replace_model_card=True) == first
        assert as_alice.state() == state
        assert len(as_alice.requests("PUT")) == uploads


def test_a_second_push_with_other_weights(models, as_alice, tmp_path, capsys):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    assert "model.safetensors: 100%" in capsys.readouterr().err  # the progress bar
    before = as_alice.files("acme/poly")
    tiny.shift(model)
    model.push_to_hub("acme/poly", exist_ok=True, commit_message="Train longer")
    after = as_alice.files("acme/poly")
    assert titles(as_alice, "acme/poly") == ["Train longer", "Add new PolyEncoder model", "initial commit"]
    assert {path for path in after if after[path] != before[path]} == {"model.safetensors"}
    model.save_pretrained(str(tmp_path))
    assert after["model.safetensors"] == (tmp_path / "model.safetensors").read_bytes()


def test_a_repository_is_not_overwritten_unasked(models, as_alice):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    state = as_alice.state()
    tiny.shift(model)
    with pytest.raises(PushError, match="exist_ok=True"):
        model.push_to_hub("acme/poly")
    assert as_alice.state() == state


def test_a_repository_made_by_hand_is_filled(models, as_alice):
    HfApi().create_repo("acme/poly")
    models["acme/poly"].push_to_hub("acme/poly")
    assert "model.safetensors" in as_alice.files("acme/poly")


def test_what_an_earlier_model_left_goes_and_what_a_user_put_there_stays(models, as_alice):
    stale = [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "vocab.txt",
        "2_Normalize/config.json",
    ]
    own = ["notes.md", "demo/data.json", "figures/curve.png", "LICENSE", "train.py", "scores.json", "onnx/model.onnx"]
    own += ["my_config.json", "adapter_config.json", "user_vocabulary_notes.txt"]
    api = HfApi()
    api.create_repo("acme/x")
    for name in [*stale, *own]:
        api.upload_file(path_or_fileobj=f"this is {name}".encode(), path_in_repo=name, repo_id="acme/x")
    models["acme/bi"].push_to_hub("acme/x", exist_ok=True)
    bi = as_alice.files("acme/x")
    assert not set(stale) & bi.keys()
    assert {name: bi[name] for name in own} == {name: f"this is {name}".encode() for name in own}
    # From two encoders in folders to one model at the root, and no trace of the others.
    models["acme/poly"].push_to_hub("acme/x", exist_ok=True)
    poly = as_alice.files("acme/x")
    assert not [name for name in poly if name.startswith(("query_", "document_"))]
    assert "router_config.json" not in poly
    assert set(own) < poly.keys()
    assert len(as_alice.repository("acme/x").history()) == 1 + len(stale + own) + 2


def test_a_card_on_the_hub_stays_unless_it_is_to_be_replaced(models, as_alice):
    model = models["acme/cross"]
    model.push_to_hub("acme/cross")
    written = b"---\nlicense: mit\n---\n# Written by hand\n"
    HfApi().upload_file(path_or_fileobj=written, path_in_repo="README.md", repo_id="acme/cross")
    tiny.shift(model)
    model.push_to_hub("acme/cross", exist_ok=True)
    assert as_alice.files("acme/cross")["README.md"] == written
    model.push_to_hub("acme/cross", exist_ok=True, replace_model_card=True)
    ours = as_alice.files("acme/cross")["README.md"]
    assert b"Written by hand" not in ours
    HfApi().upload_file(path_or_fileobj=ours + b"\n## Thanks\nto all\n", path_in_repo="README.md", repo_id="acme/cross")
    model.push_to_hub("acme/cross", exist_ok=True, replace_model_card=True)
    assert b"## Thanks\nto all" in as_alice.files("acme/cross")["README.md"]


def test_a_name_alone_is_one_s_own(models, as_alice):
    url = models["acme/poly"].push_to_hub("poly")
    assert "/alice/poly/" in url
    assert b'"alice/poly"' in as_alice.files("alice/poly")["README.md"]


def test_private(models, as_alice):
    model = models["acme/poly"]
    model.push_to_hub("acme/secret", private=True)
    assert as_alice.repository("acme/secret").private
    model.push_to_hub("acme/open")
    assert not as_alice.repository("acme/open").private
    state = as_alice.state()
    tiny.shift(model)
    with pytest.raises(PushError, match="is public"):
        model.push_to_hub("acme/open", private=True, exist_ok=True)
    assert as_alice.state() == state


def test_a_branch_is_made_and_main_stays(models, as_alice):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    main = as_alice.repository("acme/poly").find("main")
    tiny.shift(model)
    model.push_to_hub("acme/poly", revision="longer", exist_ok=True)
    model.push_to_hub("acme/poly", revision="longer", exist_ok=True)
    assert as_alice.repository("acme/poly").find("main") == main
    assert titles(as_alice, "acme/poly", "longer")[1:] == titles(as_alice, "acme/poly")
    assert (
        as_alice.files("acme/poly", "longer")["model.safetensors"] != as_alice.files("acme/poly")["model.safetensors"]
    )


def test_tags_and_commits_cannot_be_pushed_to(models, as_alice):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    HfApi().create_tag("acme/poly", tag="v1")
    state = as_alice.state()
    tiny.shift(model)
    with pytest.raises(ValueError, match="is a tag"):
        model.push_to_hub("acme/poly", revision="v1", exist_ok=True)
    with pytest.raises(ValueError, match="is a commit"):
        model.push_to_hub("acme/poly", revision=as_alice.repository("acme/poly").find("main").oid, exist_ok=True)
    assert as_alice.state() == state


def test_a_pull_request_needs_no_right_to_write(models, hub):
    model = models["acme/poly"]
    with logged_in(hub, "hf_alice"):
        model.push_to_hub("acme/poly")
    main = hub.repository("acme/poly").find("main")
    tiny.shift(model)
    with logged_in(hub, "hf_bob"):
        url = model.push_to_hub("acme/poly", create_pr=True)
        assert url == f"{hub.url}/acme/poly/discussions/1"
        model.push_to_hub("acme/poly", revision="refs/pr/1", exist_ok=True, token="hf_alice")
    assert hub.repository("acme/poly").find("main") == main
    assert len(hub.repository("acme/poly").history("refs/pr/1")) == 3  # what was proposed is there, and no more
    assert hub.files("acme/poly", "refs/pr/1")["model.safetensors"] != hub.files("acme/poly")["model.safetensors"]


def test_a_token_that_is_passed_comes_before_the_one_logged_in(models, hub):
    with logged_in(hub, "hf_bob"):
        models["acme/poly"].push_to_hub("acme/poly", token="hf_alice")
    assert hub.repository("acme/poly").history()[0].author == "alice"


def test_a_training_folder_gives_its_model_alone(models, as_alice, tmp_path):
    folder = tmp_path / "out"
    models["acme/poly"].save_pretrained(str(folder))
    model = {file.name for file in folder.iterdir()}
    others = [
        *["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "pytorch_model.bin"],
        *["trainer_state.json", "training_args.json", "evaluation.json", "evaluation.png", "trainable.safetensors"],
        *["bad_batch_step_3_process_0.json", "notes.md", ".env", ".hidden/config.json", "data.json", "log.txt"],
        *["eval/results.csv", "runs/host/events.out.tfevents.1", "checkpoint-2/model.safetensors", "eval/config.json"],
        *["checkpoint-2/optimizer.pt", "wandb/config.json", "1_secret/config.json"],
        *["settings.py", "secrets.py", "db_config.json", "config_prod.json", "tokenizer_secret_token.txt"],
    ]
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not of the model")
    push_folder(folder, "acme/poly")
    assert as_alice.files("acme/poly").keys() == model
    (folder / "README.md").write_text("# Mine\n![curve](evaluation.png) ![](../secret.png)\n")
    (tmp_path / "secret.png").write_bytes(b"elsewhere")
    push_folder(folder, "acme/shown")
    assert as_alice.files("acme/shown").keys() == model | {"evaluation.png"}


def test_an_incomplete_folder_is_refused_before_anything_is_sent(models, hub, tmp_path):
    models["acme/bi"].save_pretrained(str(tmp_path / "bi"))
    (tmp_path / "bi" / "query_0_Transformer" / "model.safetensors").unlink()
    models["acme/cross"].save_pretrained(str(tmp_path / "cross"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "cross" / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder, missing in [
        ("bi", "query_0_Transformer/model.safetensors"),
        ("cross", "00001-of-00002"),
        ("nowhere", "There is no folder"),
    ]:
        with pytest.raises(ValueError, match=missing):
            push_folder(tmp_path / folder, "acme/x", token="hf_alice")
    assert not hub.log


def test_arguments_that_make_no_sense(models, hub):
    with pytest.raises(ValueError, match="safetensors"):
        models["acme/poly"].push_to_hub("acme/poly", safe_serialization=False)
    with pytest.raises(ValueError, match="Repo id"):
        models["acme/poly"].push_to_hub("acme/po ly")
    with pytest.raises(ValueError, match="Repo id"):
        models["acme/poly"].push_to_hub("a/b/c")
    assert not hub.log


def test_a_saved_model_is_pushed_in_place_of_this_one(models, as_alice, tmp_path):
    models["acme/cross"].save_pretrained(str(tmp_path / "cross"))
    card = tmp_path / "cross" / "README.md"
    saved = card.read_text() + "\n## Thanks\nto all\n"
    card.write_text(saved)
    assert '"path/to/this/model"' in saved
    models["acme/poly"].push_to_hub("acme/cross", local_model_path=str(tmp_path / "cross"))
    pushed = as_alice.files("acme/cross")
    assert "modeling_poly_encoder.py" not in pushed
    assert card.read_text() == saved
    # Its snippets load what was pushed, and what was edited is still known from what was not.
    assert b"path/to/this/model" not in pushed["README.md"]
    assert b"## Thanks\nto all" in pushed["README.md"]
    again = Card.parse(pushed["README.md"].decode())
    assert [name for name in again.sections if again.is_users("sections", name)] == ["Thanks"]
    assert again.record["id"] == "acme/cross"


def test_the_command(models, as_alice, tmp_path):
    models["acme/bi"].save_pretrained(str(tmp_path / "bi"))
    runner = CliRunner()
    result = runner.invoke(app, ["push", str(tmp_path / "bi"), "acme/bi", "--private", "--message", "First"])
    assert result.exit_code == 0, result.output
    assert f"Pushed to {as_alice.url}/acme/bi/commit/" in result.output
    assert as_alice.repository("acme/bi").private
    assert titles(as_alice, "acme/bi")[0] == "First"
    result = runner.invoke(app, ["push", str(tmp_path / "bi"), "acme/bi"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: acme/bi exists already")
    result = runner.invoke(app, ["push", str(tmp_path), "acme/other"])
    assert result.exit_code == 1
    assert "no complete model" in result.stderr
    (tmp_path / "bi" / "requirements.txt").write_text("sentence-transformers\n")
    result = runner.invoke(app, ["push", str(tmp_path / "bi"), "acme/bi", "--create-pr"])
    assert f"Pushed to {as_alice.url}/acme/bi/discussions/1" in result.output
    result = runner.invoke(app, ["push", str(tmp_path / "bi"), "acme/bi", "--exist-ok", "--revision", "next"])
    assert "requirements.txt" in as_alice.files("acme/bi", "next")
    assert "requirements.txt" not in as_alice.files("acme/bi")


def test_a_converted_model_that_could_not_be_pushed_is_pushed_from_its_folder(as_alice, tmp_path):
    command = ["convert-parlai", str(FIXTURES / "poly_codes8" / "model"), str(tmp_path / "out")]
    as_alice.fail_next("POST", "/repos/create", 500)
    result = CliRunner().invoke(app, [*command, "--push-to-hub", "acme/parlai", "--private"])
    assert result.exit_code == 1
    again = f"poly-encoders push {tmp_path / 'out'} acme/parlai --private"
    assert again in result.stderr
    assert CliRunner().invoke(app, again.split()[1:]).exit_code == 0
    assert set(model_files(tmp_path / "out")) == as_alice.files("acme/parlai").keys()
    assert {file.name for file in (tmp_path / "out").iterdir()} == as_alice.files("acme/parlai").keys()


def test_a_folder_leaves_what_was_edited_on_the_hub(models, as_alice, tmp_path):
    model = models["acme/bi"]
    model.save_pretrained(str(tmp_path / "bi"))
    local = tmp_path / "bi" / "README.md"
    local.write_text(local.read_text() + "\n## Here\nwritten beside the weights\n")
    push_folder(tmp_path / "bi", "acme/bi")
    there = as_alice.files("acme/bi")["README.md"] + b"\n## Thanks\nto all\n"
    HfApi().upload_file(path_or_fileobj=there, path_in_repo="README.md", repo_id="acme/bi")
    for _ in range(2):  # the second time, over what the first one made
        push_folder(tmp_path / "bi", "acme/bi", exist_ok=True, replace_model_card=True)
        card = as_alice.files("acme/bi")["README.md"].decode()
        assert "## Thanks\nto all" in card
        assert "## Here\nwritten beside the weights" in card
    as_alice.fail_next("GET", "/README.md", status=500, times=20)
    as_alice.fail_next("HEAD", "/README.md", status=500, times=20)
    state = as_alice.state()
    with pytest.raises(PushError):  # rather than replacing what could not be read
        push_folder(tmp_path / "bi", "acme/bi", exist_ok=True, replace_model_card=True)
    assert as_alice.state() == state
