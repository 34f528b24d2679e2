"""push_to_hub: one commit with all of a model and nothing else, on whatever was there before."""

import json

import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from typer.testing import CliRunner

import tiny
from hub_client import logged_in
from poly_encoders.cards.card_text import is_generated
from poly_encoders.cli import app
from poly_encoders.hub.model_files import model_files
from poly_encoders.hub.pushing import PushError, push_folder

KINDS = ["acme/poly", "acme/bi", "acme/cross"]


def names_in(folder):
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def upload(name, files):
    """One commit of texts, by path."""
    operations = [CommitOperationAdd(path, text.encode()) for path, text in files.items()]
    HfApi().create_commit(name, operations, commit_message="by hand")


@pytest.mark.parametrize("name", KINDS)
def test_a_push_is_one_commit_with_every_file(name, models, as_alice, tmp_path):
    model, folder = models[name], tmp_path / "saved"
    model.save_pretrained(str(folder))
    url = model.push_to_hub(name)
    pushed = as_alice.files(name)
    assert set(pushed) == names_in(folder)
    assert as_alice.titles(name) == [f"Add new {type(model).__name__} model", "initial commit"]
    assert url == f"{as_alice.url}/{name}/commit/{as_alice.repositories[name].find('main').oid}"
    assert f'"{name}"' in pushed["README.md"].decode()  # the card's snippets load it from there
    assert is_generated(pushed["README.md"].decode())
    assert model.model_card_data.model_id == name
    for path in pushed.keys() - {"README.md"}:
        assert pushed[path] == (folder / path).read_bytes(), path
    tree = as_alice.repositories[name].find("main").tree
    assert all(tree[path].sha256 for path in tree if path.endswith(".safetensors"))
    # What `poly-encoders push` picks out of a folder is all that a model consists of.
    assert set(model_files(folder)) == set(pushed)
    # The Hub, Inference Endpoints and TEI serve Bi- and Cross-encoders as they are.
    assert len([path for path in pushed if path.endswith(".py")]) == (6 if name == "acme/poly" else 0)


def test_an_unchanged_model_makes_no_commit(models, as_alice):
    for name, model in models.items():
        first = model.push_to_hub(name)
        state, uploads = as_alice.state(), len(as_alice.requests("PUT"))
        assert model.push_to_hub(name, exist_ok=True, replace_model_card=True) == first
        assert as_alice.state() == state
        assert len(as_alice.requests("PUT")) == uploads


def test_a_repository_with_files_is_replaced_when_asked_and_an_empty_one_filled(models, as_alice):
    model = models["acme/poly"]
    HfApi().create_repo("acme/poly")
    model.push_to_hub("acme/poly")
    before, state = as_alice.files("acme/poly"), as_alice.state()
    tiny.shift(model)
    with pytest.raises(PushError, match=r"exists already.*exist_ok=True"):
        model.push_to_hub("acme/poly")
    assert as_alice.state() == state
    model.push_to_hub("acme/poly", exist_ok=True, commit_message="Train longer")
    after = as_alice.files("acme/poly")
    assert as_alice.titles("acme/poly")[0] == "Train longer"
    assert (
        "model.safetensors"
        in {path for path in after if after[path] != before[path]}
        <= {
            "model.safetensors",
            "README.md",
        }
    )


OURS = "# Copyright 2026 The poly-encoders authors.\n"


def test_what_an_earlier_model_left_goes_and_what_a_user_put_there_stays(models, as_alice):
    HfApi().create_repo("acme/x")
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    parts += ["pytorch_model.bin", "vocab.txt", "2_Normalize/config.json"]
    stale = dict.fromkeys(parts, "old") | dict.fromkeys(["endpoint.py", "handler.py", "pairs.py"], OURS)
    files = ["notes.md", "demo/data.json", "LICENSE", "train.py", "onnx/model.onnx", "my_config.json", "lengths.py"]
    own = dict.fromkeys([*files, "adapter_config.json", "ranking.py", "figures/curve.png"], "mine")
    upload("acme/x", stale)
    upload("acme/x", own)
    models["acme/bi"].push_to_hub("acme/x", exist_ok=True)
    bi = as_alice.files("acme/x")
    assert not set(stale) & bi.keys()
    assert {name: bi[name].decode() for name in own} == own
    # From two encoders in folders to one model at the root, and no trace of the others.
    models["acme/poly"].push_to_hub("acme/x", exist_ok=True)
    poly = as_alice.files("acme/x")
    assert not [name for name in poly if name.startswith(("query_", "document_", "router_"))]
    assert {name: poly[name].decode() for name in own} == own
    assert "handler.py" in poly
    # And back: its code goes with it.
    models["acme/bi"].push_to_hub("acme/x", exist_ok=True)
    assert as_alice.files("acme/x").keys() == bi.keys()
    assert len(as_alice.titles("acme/x")) == 1 + 2 + 3


@pytest.mark.parametrize("name", KINDS)
def test_code_of_a_user_s_own_is_neither_overwritten_nor_deleted(name, models, as_alice, caplog):
    HfApi().create_repo("acme/x")
    own = dict.fromkeys(["handler.py", "first_m_pooling.py", "pairs.py"], "mine = 1")
    upload("acme/x", own)
    models[name].push_to_hub("acme/x", exist_ok=True)
    there = as_alice.files("acme/x")
    assert {file: there[file].decode() for file in own} == own
    assert ("handler.py in acme/x was written or edited by hand" in caplog.text) == (name == "acme/poly")


def test_a_card_that_a_person_wrote_or_edited_stays_unless_it_is_to_be_replaced(models, as_alice, tmp_path):
    model = models["acme/cross"]
    model.push_to_hub("acme/cross")
    ours = as_alice.files("acme/cross")["README.md"].decode()
    model.model_card_data.set_license("mit")
    model.push_to_hub("acme/cross", exist_ok=True)  # nobody has touched it, so it is written anew
    licensed = as_alice.files("acme/cross")["README.md"].decode()
    assert "license: mit" in licensed
    for person_s in ("# Written by hand\n", licensed.replace("## Usage", "## How to use it"), ours + "\nThanks!\n"):
        upload("acme/cross", {"README.md": person_s})
        model.push_to_hub("acme/cross", exist_ok=True)
        model.save_pretrained(str(tmp_path / "cross"))
        push_folder(tmp_path / "cross", "acme/cross", exist_ok=True)
        assert as_alice.files("acme/cross")["README.md"].decode() == person_s
    model.push_to_hub("acme/cross", exist_ok=True, replace_model_card=True)
    assert as_alice.files("acme/cross")["README.md"].decode() == licensed
    # What was edited beside the weights goes up as it is.
    (tmp_path / "cross" / "README.md").write_text("# Mine, of path/to/this/model\n")
    push_folder(tmp_path / "cross", "acme/cross", exist_ok=True)
    assert as_alice.files("acme/cross")["README.md"] == b"# Mine, of path/to/this/model\n"


def test_a_name_alone_is_one_s_own(models, as_alice):
    assert "/alice/poly/" in models["acme/poly"].push_to_hub("poly")
    assert b'"alice/poly"' in as_alice.files("alice/poly")["README.md"]


def test_private(models, as_alice):
    model = models["acme/poly"]
    model.push_to_hub("acme/secret", private=True)
    assert as_alice.repositories["acme/secret"].private
    model.push_to_hub("acme/open")
    assert not as_alice.repositories["acme/open"].private
    state = as_alice.state()
    tiny.shift(model)
    with pytest.raises(PushError, match="exists already and is public"):
        model.push_to_hub("acme/open", private=True, exist_ok=True)
    assert as_alice.state() == state


def test_a_branch_is_made_and_main_stays(models, as_alice):
    model = models["acme/poly"]
    model.push_to_hub("acme/poly")
    main = as_alice.repositories["acme/poly"].find("main")
    tiny.shift(model)
    for _ in range(2):
        model.push_to_hub("acme/poly", revision="longer", exist_ok=True)
    assert as_alice.repositories["acme/poly"].find("main") == main
    assert as_alice.titles("acme/poly", "longer")[1:] == as_alice.titles("acme/poly")
    longer = as_alice.files("acme/poly", "longer")
    assert longer["model.safetensors"] != as_alice.files("acme/poly")["model.safetensors"]


def test_a_pull_request_needs_no_right_to_write(models, hub):
    model = models["acme/poly"]
    with logged_in(hub, "hf_bob"):
        model.push_to_hub("acme/poly", token="hf_alice")  # which comes before the one logged in
        assert hub.repositories["acme/poly"].history()[0].author == "alice"
        main = hub.repositories["acme/poly"].find("main")
        tiny.shift(model)
        url = model.push_to_hub("acme/poly", create_pr=True)
        assert url == f"{hub.url}/acme/poly/discussions/1"
        model.push_to_hub("acme/poly", revision="refs/pr/1", exist_ok=True, token="hf_alice")
    assert hub.repositories["acme/poly"].find("main") == main
    assert len(hub.titles("acme/poly", "refs/pr/1")) == 3  # what was proposed is there, and no more
    assert hub.files("acme/poly", "refs/pr/1")["model.safetensors"] != hub.files("acme/poly")["model.safetensors"]


def test_a_training_folder_gives_its_model_alone(models, as_alice, tmp_path):
    folder = tmp_path / "out"
    models["acme/bi"].save_pretrained(str(folder))
    model = names_in(folder)
    others = [
        *["optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "training_args.bin", "pytorch_model.bin"],
        *["trainer_state.json", "training_args.json", "evaluation.json", "evaluation.png", "trainable.safetensors"],
        *["bad_batch_step_3_process_0.json", "notes.md", ".env", ".hidden/config.json", "data.json", "log.txt"],
        *["eval/results.csv", "runs/host/events.out.tfevents.1", "checkpoint-2/model.safetensors", "eval/config.json"],
        *["checkpoint-2/optimizer.pt", "wandb/config.json", "1_secret/config.json", "query_1_Pooling/.env"],
        *["settings.py", "secrets.py", "db_config.json", "config_prod.json", "tokenizer_secret_token.txt"],
        *["query_0_Transformer/pytorch_model.bin"],
    ]
    for name in others:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"not of the model")
    push_folder(folder, "acme/bi")
    assert as_alice.files("acme/bi").keys() == model
    # What a person put there on purpose, and what their card shows.
    for name in ("requirements.txt", "LICENSE", "handler.py"):
        (folder / name).write_text("mine")
    (folder / "README.md").write_text("# Mine\n![curve](evaluation.png) ![](../secret.png)\n")
    push_folder(folder, "acme/shown")
    assert as_alice.files("acme/shown").keys() == model | {
        "evaluation.png",
        "requirements.txt",
        "LICENSE",
        "handler.py",
    }


def test_code_that_the_configuration_names_goes_along(models, tmp_path):
    models["acme/cross"].save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling_mine.Mine", "AutoConfig": "acme/other--configuration_other.Other"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("modeling_mine.py", "configuration_other.py"):
        (tmp_path / name).write_text("mine = 1\n")
    assert {name for name in model_files(tmp_path) if name.endswith(".py")} == {"modeling_mine.py"}


def test_an_incomplete_folder_is_refused_before_anything_is_sent(models, hub, tmp_path):
    models["acme/bi"].save_pretrained(str(tmp_path / "bi"))
    (tmp_path / "bi" / "query_0_Transformer" / "model.safetensors").unlink()
    models["acme/cross"].save_pretrained(str(tmp_path / "cross"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / "cross" / "model.safetensors.index.json").write_text(json.dumps(index))
    models["acme/cross"].save_pretrained(str(tmp_path / "broken"))
    (tmp_path / "broken" / "modules.json").write_text("[{")
    for folder, missing in [
        ("bi", "query_0_Transformer/model.safetensors"),
        ("cross", "00001-of-00002"),
        ("broken", "truncated or corrupted"),
        ("nowhere", "There is no folder"),
        ("", "no config.json, model.safetensors"),
    ]:
        with pytest.raises(ValueError, match=missing):
            push_folder(tmp_path / folder, "acme/x", token="hf_alice")
    with pytest.raises(ValueError, match="safetensors"):
        models["acme/poly"].push_to_hub("acme/poly", safe_serialization=False)
    assert not hub.log


def test_a_saved_model_is_pushed_in_place_of_this_one(models, as_alice, tmp_path):
    models["acme/cross"].save_pretrained(str(tmp_path / "cross"))
    saved = (tmp_path / "cross" / "README.md").read_text()
    models["acme/poly"].push_to_hub("acme/first", local_model_path=str(tmp_path / "cross"))
    pushed = as_alice.files("acme/first")
    assert "modeling_poly_encoder.py" not in pushed
    assert (tmp_path / "cross" / "README.md").read_text() == saved
    # Its snippets load what was pushed, from wherever the card came.
    assert pushed["README.md"].decode().count('"acme/first"') == saved.count('"path/to/this/model"') == 2
    (tmp_path / "cross" / "README.md").write_bytes(pushed["README.md"])
    push_folder(tmp_path / "cross", "acme/second")
    assert as_alice.files("acme/second")["README.md"].decode().count('"acme/second"') == 2


def test_the_command(models, as_alice, tmp_path):
    models["acme/bi"].save_pretrained(str(tmp_path / "bi"))
    push = ["push", str(tmp_path / "bi"), "acme/bi"]
    result = CliRunner().invoke(app, [*push, "--private", "--message", "First"])
    assert result.exit_code == 0, result.output
    assert f"Pushed to {as_alice.url}/acme/bi/commit/" in result.output
    assert as_alice.repositories["acme/bi"].private
    assert as_alice.titles("acme/bi")[0] == "First"
    result = CliRunner().invoke(app, push)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: acme/bi exists already")
    (tmp_path / "bi" / "requirements.txt").write_text("sentence-transformers\n")
    result = CliRunner().invoke(app, [*push, "--create-pr"])
    assert f"Pushed to {as_alice.url}/acme/bi/discussions/1" in result.output
    CliRunner().invoke(app, [*push, "--exist-ok", "--revision", "next"])
    assert "requirements.txt" in as_alice.files("acme/bi", "next")
    assert "requirements.txt" not in as_alice.files("acme/bi")
