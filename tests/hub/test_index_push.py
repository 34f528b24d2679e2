"""An index on the Hub: pushed as a data set with a card, downloaded, searched."""

import json
from datetime import timedelta
from unittest import mock

import pytest
from huggingface_hub.errors import HfHubHTTPError

from hub_client import run_python
from poly_encoders import PolyEncoder
from poly_encoders.hub.pushing import PushError
from poly_encoders.index import CandidateIndex, index_hub

pytest.importorskip("lance")


def test_a_push_uploads_the_table_and_a_card(poly_encoder, tmp_path):
    rows = [{"id": "a", "text": "fine thanks", "year": 3}, {"id": "b", "text": "the weather", "year": 4}]
    poly_encoder.save(str(tmp_path / "model"))
    poly_encoder = PolyEncoder(str(tmp_path / "model"), device="cpu")
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    assert index.info()["model"] == str(tmp_path / "model")
    (tmp_path / "index" / "derived").mkdir(exist_ok=True)
    with mock.patch.object(index_hub, "HfApi") as api:
        api.return_value.create_repo.return_value = mock.Mock(repo_id="org/replies")
        index.push_to_hub("org/replies", private=True)
    api.return_value.create_repo.assert_called_once_with(
        "org/replies", repo_type="dataset", private=True, exist_ok=True
    )
    options = api.return_value.upload_folder.call_args.kwargs
    assert options["repo_type"] == "dataset"
    assert options["allow_patterns"] == ["README.md", "candidates.lance/**"]
    card = (tmp_path / "index" / "README.md").read_text()
    assert 'from_pretrained("org/replies"' in card
    assert "| `year` | int64 |" in card
    pushed = [
        card,
        *(
            file.read_bytes().decode("latin1")
            for file in (tmp_path / "index").rglob("candidates.lance/**/*")
            if file.is_file()
        ),
    ]
    assert not [text for text in pushed if str(tmp_path) in text]  # no folder of this machine
    (tmp_path / "index" / "README.md").write_text("# Mine\n")
    with mock.patch.object(index_hub, "HfApi") as api:
        api.return_value.create_repo.return_value = mock.Mock(repo_id="org/replies")
        index.push_to_hub("org/replies")
    assert (tmp_path / "index" / "README.md").read_text() == "# Mine\n"
    refused = HfHubHTTPError("no", response=mock.Mock(status_code=401, headers={}))
    with (
        mock.patch.object(index_hub.HfApi, "create_repo", side_effect=refused),
        pytest.raises(PushError, match="logged in"),
    ):
        index.push_to_hub("org/replies")
    with mock.patch.object(index_hub, "snapshot_download", return_value=str(tmp_path / "index")) as download:
        again = CandidateIndex.from_pretrained("org/replies", poly_encoder, revision="main")
    assert download.call_args.kwargs["repo_type"] == "dataset"
    assert again.search("hello") == index.search("hello")
    assert CandidateIndex.from_pretrained(str(tmp_path / "index"), poly_encoder).search("hello") == index.search(
        "hello"
    )


SEARCH = """
import json
from poly_encoders import PolyEncoder
from poly_encoders.index import CandidateIndex

model = PolyEncoder("acme/poly", device="cpu")
print(json.dumps(CandidateIndex.from_pretrained("acme/replies", model).search("hello")))
"""


def test_a_pushed_index_is_found_and_searched_with_an_empty_cache(poly_encoder, as_alice, tmp_path):
    rows = [{"id": f"r{number}", "text": f"fine thanks {number}", "year": number} for number in range(20)]
    poly_encoder.push_to_hub("acme/poly")
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
    assert index.push_to_hub("acme/replies") == f"{as_alice.url}/datasets/acme/replies"
    found = json.loads(run_python(SEARCH, hub=as_alice).splitlines()[-1])
    assert found == index.search("hello")
    index.delete(filter="year < 10")
    index.compact(timedelta(0))
    index.push_to_hub("acme/replies")
    names = {path.relative_to(index.store.path).as_posix() for path in index.store.path.rglob("*") if path.is_file()}
    kept = {name for name in names if name.startswith("candidates.lance/")} | {"README.md"}
    assert as_alice.files("datasets/acme/replies").keys() == kept  # nothing of what the compaction replaced
    found = json.loads(run_python(SEARCH, hub=as_alice).splitlines()[-1])
    assert found == index.search("hello")
    assert len(found) == 10
