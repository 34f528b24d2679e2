"""Cards of pushed models: the Hub takes them, and each of their Python blocks runs as printed, from an empty cache."""

import re

import torch
from transformers import AutoModel

import tiny
from card_snippets import assert_prints_what_it_shows, python_blocks
from hub_client import logged_in, run_python
from hub_server import running_hub
from poly_encoders import BiEncoder, CandidateRankingEvaluator, CrossEncoder, PolyEncoder

KINDS = {"acme/poly": PolyEncoder, "acme/bi": BiEncoder, "acme/cross": CrossEncoder}
SETS = [{"context": ["a fish?", "no, a bird"], "candidates": ["it flies", "it swims"], "label": 0}]


def test_blocks_of_pushed_cards_run_as_printed(tmp_path):
    encoder = tmp_path / "encoder"
    config = tiny.family_config("bert")
    config.max_position_embeddings = 256
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(encoder)
    tiny.make_tokenizer().save_pretrained(encoder)
    with running_hub(tmp_path) as hub:
        with logged_in(hub):
            for name, kind in KINDS.items():
                model = kind(str(encoder), device="cpu")
                CandidateRankingEvaluator(SETS, show_progress_bar=False, at_k=(1,))(model)
                model.push_to_hub(name)
        checks = hub.requests("POST", "/api/validate-yaml")
        assert checks
        assert all(check.status == 200 for check in checks)
        blocks = []
        for name in KINDS:
            card = hub.files(name)["README.md"].decode()
            assert str(tmp_path) not in card
            blocks += python_blocks(card)
            assert len(re.findall(re.escape(f'"{name}"'), card)) >= len(python_blocks(card))
        ours = [block for block in blocks if "poly_encoders" in block]
        others = [block for block in blocks if "poly_encoders" not in block]
        assert (len(ours), len(others)) == (3, 4)
        for group, hidden in ((ours, False), (others, True)):
            code = "\nprint('=====')\n".join(group)
            outputs = run_python(code, hub=hub, hide_package=hidden).split("=====\n")
            for block, output in zip(group, outputs, strict=True):
                assert_prints_what_it_shows(block, output)
