"""An index on the Hub: pushed as a data set with a card, downloaded, searched."""

from unittest import mock

import pytest

from poly_encoders.index import CandidateIndex, index_hub

pytest.importorskip("lance")


def test_a_push_uploads_the_table_and_a_card(poly_encoder, tmp_path):
    rows = [{"id": "a", "text": "fine thanks", "year": 3}, {"id": "b", "text": "the weather", "year": 4}]
    index = CandidateIndex.build(poly_encoder, rows, tmp_path / "index", show_progress_bar=False)
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
    assert str(tmp_path) not in card
    with mock.patch.object(index_hub, "snapshot_download", return_value=str(tmp_path / "index")) as download:
        again = CandidateIndex.from_pretrained("org/replies", poly_encoder, revision="main")
    assert download.call_args.kwargs["repo_type"] == "dataset"
    assert again.search("hello") == index.search("hello")
    assert CandidateIndex.from_pretrained(str(tmp_path / "index"), poly_encoder).search("hello") == index.search(
        "hello"
    )
