"""What cannot be converted is refused by name, and leaves nothing behind; what is doubtful is mentioned."""

import json
import os

import pytest
import torch

from parlai_original import write_checkpoint
from poly_encoders.parlai import convert_parlai_checkpoint
from poly_encoders.parlai.convert import take_apart


def change_options(model_file, remove=None, **changes):
    file = model_file.with_name("model.opt")
    options = json.loads(file.read_text()) | changes
    options.pop(remove, None)
    file.write_text(json.dumps(options))


@pytest.fixture
def refused(tmp_path):
    """A function that makes a checkpoint of a kind, changes it, and sees one of its files refused with some words."""

    def refuse(match, change=None, kind="poly", error=ValueError, suffix="", **options):
        model_file = write_checkpoint(tmp_path / "parlai", kind, **options)
        if change is not None:
            change(model_file)
        with pytest.raises(error, match=match):
            convert_parlai_checkpoint(f"{model_file}{suffix}", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    return refuse


# What has no counterpart, and what is senseless, as in model.opt.
BAD_OPTIONS = {
    "poly": """
        variant="aiayn" variant="prelayernorm" variant="bart" activation="swish" reduction_type="max"
        codes_attention_type="multihead" poly_attention_type="multihead" polyencoder_type="something_new"
        polyencoder_attention_keys="position" polyencoder_image_encoder_num_layers=1
        dict_tokenizer="re" dict_tokenizer="bytelevelbpe" dict_max_ngram_size=2 special_tok_lst="__a__,__b__"
        history_reversed=true person_tokens=true split_lines=true add_p1_after_newln=true
        history_add_global_end_token="end"
        n_heads="2" n_heads=0 n_heads=-2 n_heads=true n_heads=3 n_encoder_layers="x" embedding_size="32"
        poly_n_codes=0 poly_n_codes=null output_scaling=null output_scaling=0.0 output_scaling=NaN dropout="x"
        embeddings_scale="false" dict_lower=null dict_nulltoken=null delimiter=null history_size="3"
        text_truncate="36" label_truncate=1 label_truncate=2
    """,
    "bi": "share_encoders=true use_memories=true wrap_memory_encoder=true normalize_sent_emb=true",
    "cross": 'variant="prelayernorm"',
}


@pytest.mark.parametrize(
    ("kind", "option"), [(kind, option) for kind, options in BAD_OPTIONS.items() for option in options.split()]
)
def test_bad_options_are_named(kind, option, refused):
    name, value = option.split("=")
    value = json.loads(value)
    refused(f"{name}={value!r}", lambda model_file: change_options(model_file, **{name: value}), kind)


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("poly", "n_layers", 5),
        ("poly", "n_encoder_layers", 1),
        ("poly", "embedding_size", 64),
        ("poly", "ffn_size", 7),
        ("poly", "n_positions", 12),
        ("bi", "n_segments", 3),
    ],
)
def test_the_options_of_another_model(kind, option, value, refused):
    name = "n_layers" if option == "n_encoder_layers" else option
    change = {option: value}
    refused(f"options call for {name}={value}", lambda model_file: change_options(model_file, **change), kind)


OTHER_AGENTS = ["transformer/ranker", "bert_ranker/poly_encoder", "transformer/polyencoder:MyAgent", None]


@pytest.mark.parametrize(
    "agent",
    [
        "transformer/polyencoder:PolyencoderAgent",
        "transformer/polyencoder:IRFriendlyPolyencoderAgent",
        "parlai.agents.transformer.polyencoder:PolyencoderAgent",
    ],
)
def test_agents_may_be_named_by_their_class(agent, tmp_path):
    assert take_apart(write_checkpoint(tmp_path, model=agent)).settings.kind == "poly"


@pytest.mark.parametrize(
    "option",
    ["variant", "n_heads", "output_scaling", "poly_n_codes", "dict_lower", "embeddings_scale", "poly_attention_type"],
)
def test_a_missing_option_is_not_guessed(option, refused):
    refused(f"{option} is missing", lambda model_file: change_options(model_file, remove=option))


@pytest.mark.parametrize(
    "option", ["history_size", "delimiter", "special_tok_lst", "dict_max_ngram_size", "n_encoder_layers", "n_positions"]
)
def test_other_options_may_be_missing(option, tmp_path, caplog):
    model_file = write_checkpoint(tmp_path)
    change_options(model_file, remove=option)
    settings = take_apart(model_file).settings
    assert (f"defaults are assumed: {option}=" in caplog.text) == (option in ("history_size", "delimiter"))
    assert (settings.turn_separator, settings.max_turns) == ("\n", None if option == "history_size" else 20)


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


def rewrite(model_file, change, zipped=True):
    """Change what a model file holds."""
    saved = torch.load(model_file, weights_only=True)
    torch.save(change(saved) or saved, model_file, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_code_is_refused(zipped, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exploit = lambda model_file: rewrite(model_file, lambda saved: saved | {"more": Exploit()}, zipped)  # noqa: E731
    refused(r"refused.*asks to run code.*mkdir", exploit)
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize("suffix", ["", ".opt", ".dict", ".dict.codecs"])
def test_a_missing_file_and_a_neighbour_of_the_model_file(suffix, refused):
    if suffix:
        refused("name its model file, model", suffix=suffix)
    remove = lambda model_file: model_file.with_name(f"model{suffix}").unlink()  # noqa: E731
    refused(rf"has no model{suffix}\. ", remove, error=FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 10, 5_000])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_model_file(keep, zipped, refused):
    def change(model_file):
        rewrite(model_file, lambda saved: None, zipped)
        model_file.write_bytes(model_file.read_bytes()[:keep])

    refused("truncated or corrupted|damaged", change)
    refused("no state dict", lambda model_file: torch.save({"weights": torch.ones(2)}, model_file))


@pytest.mark.parametrize(
    ("suffix", "content", "match"),
    [
        (".opt", b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s.", "a pickle can run code"),
        (".opt", b"[]", "object of options"),
        (".opt", b"{", "not JSON"),
        (".opt", b"[" * 100_000, "not JSON"),
        (".opt", b'{"seed": ' + b"1" * 5000 + b"}", "model.opt is not JSON"),
        (".dict", b"", "no token"),
        (".dict", b"x\t1\nx</w>@@\t1\n", "cannot be told apart"),
        (".dict.codecs", b"#version: 0.2\n__start_ _\n", "reads like a special token"),
        (".dict.codecs", b"t h\n", "version"),
        (".dict.codecs", b"#version: 0.1\nt h\n", "version"),
        (".dict.codecs", b"#version: 0.2\nt h e\n", "Line 2"),
        (".dict.codecs", b"#version: 0.2\nth e\nt h\n", "'th e' before it makes 'th'"),
        (".dict.codecs", b"#version: 0.2\n\xff h\n", "model.dict.codecs is not UTF-8"),
    ],
)
def test_a_damaged_file(suffix, content, match, refused):
    refused(match, lambda model_file: model_file.with_name(f"model{suffix}").write_bytes(content))


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("poly", without("encoder_cand.layers.1.ffn.lin1.bias"), "no weight 'encoder_cand.layers.1.ffn.lin1"),
        ("poly", lambda w: w | {"code_attention.q_lin.weight": torch.ones(2)}, "code_attention.q_lin.weight"),
        ("poly", lambda w: w | {"codes": torch.zeros(4, 32)}, r"codes is \(4, 32\), expected \(8, 32\)"),
        ("poly", lambda w: w | {"codes": w["codes"] * float("nan")}, "'codes' holds NaN"),
        ("poly", lambda w: w | {"codes": w["codes"].to(torch.complex64)}, "'codes' is a torch.complex64 tensor"),
        ("poly", lambda w: w | {"codes": w["codes"].to_sparse()}, "'codes' is a .*sparse"),
        ("poly", lambda w: w | {"codes": torch.tensor(1.0)}, "'codes' is a .*2 dimensions"),
        ("poly", lambda w: w | {"encoder_cand.embeddings.weight": torch.ones(116)}, "2 dimensions"),
        ("poly", lambda w: w | {"encoder_cand.layers.x.norm1.bias": torch.ones(32)}, "encoder_cand.layers.x"),
        ("poly", lambda w: w | {3: torch.ones(2)}, "named tensors, but 3"),
        ("poly", lambda w: w | {"codes": [1.0]}, "named tensors, but 'codes' is a list"),
        ("cross", lambda w: w | {"encoder.segment_embeddings.weight": torch.ones(1, 32)}, "n_segments=2"),
        ("cross", without("encoder.segment_embeddings.weight"), "n_segments=2"),
        ("cross", without("linear_layer.bias"), "no weight 'linear_layer.bias'"),
        ("cross", lambda w: {name: w[name] for name in w if ".layers." not in name}, "has no layers"),
        ("bi", lambda w: w | {"cand_encoder.embeddings.weight": torch.ones(99, 32)}, r"embed \[99, 116\] tokens"),
        ("bi", lambda w: w | {"memory_transformer.norm_embeddings.bias": torch.ones(32)}, "memory_transformer"),
        ("bi", lambda w: w | {"cand_encoder.mlp.0.weight": torch.ones(2)}, "cand_encoder.mlp.0.weight"),
        ("bi", lambda w: w | {"embeddings.weight": torch.ones(116, 32)}, "'embeddings.weight' should be a seco"),
    ],
)
def test_weights_that_do_not_belong(kind, change, match, refused):
    refused(match, lambda model_file: rewrite(model_file, lambda saved: {"model": change(saved["model"])}), kind)


@pytest.mark.parametrize(
    ("kind", "options", "match"),
    [
        ("poly", {"rows": 100}, "116 tokens, but the model embeds only 100"),
        ("poly", {"n_positions": 2}, "positions for 2 tokens"),
        ("bi", {"n_positions": 2}, "positions for 2 tokens"),
        ("cross", {"n_positions": 5}, "positions for 5 tokens"),
        ("poly", {"variant": "aiayn", "person_tokens": True}, "(?s)variant='aiayn'.*person_tokens=True"),  # all at once
        *(("poly", {"model": agent}, "transformer/crossencoder can be converted") for agent in OTHER_AGENTS),
    ],
)
def test_other_checkpoints(kind, options, match, refused):
    refused(match, kind=kind, **options)


def test_a_refusal_leaves_the_last_good_conversion(tmp_path):
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "good"), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    with pytest.raises(ValueError, match="variant"):
        convert_parlai_checkpoint(write_checkpoint(tmp_path / "bad", variant="aiayn"), tmp_path / "out")
    with pytest.raises(ValueError, match="empty name"):
        convert_parlai_checkpoint(tmp_path / "good", "")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()} == before


@pytest.mark.parametrize(
    ("suffix", "old", "new", "said"),
    [
        (".dict", b"persona", b"pers\xffona", "not all UTF-8"),
        (".dict", None, b"", "more tokens than model.dict has"),
        (".dict.codecs", None, b"", "is model.dict.codecs complete"),
    ],
)
def test_a_file_that_looks_incomplete_is_mentioned(suffix, old, new, said, tmp_path, caplog):
    model_file = write_checkpoint(tmp_path)
    take_apart(model_file)
    assert caplog.text == ""
    file = model_file.with_name(f"model{suffix}")
    content = file.read_bytes()
    file.write_bytes(content.replace(old, new) if old else b"".join(content.splitlines(keepends=True)[:50]))
    take_apart(model_file)
    assert said in caplog.text


def test_harmless_options_are_mentioned(tmp_path, caplog):
    take_apart(write_checkpoint(tmp_path, relu_dropout=0.1, use_reply="none"))
    assert "relu_dropout" in caplog.text
    assert "use_reply" in caplog.text


@pytest.mark.parametrize(("kind", "positions"), [("poly", 30), ("bi", 30), ("cross", 40)])
def test_too_few_positions_are_mentioned(kind, positions, tmp_path, caplog):
    model = convert_parlai_checkpoint(write_checkpoint(tmp_path / "p", kind, n_positions=positions), tmp_path / "out")
    assert f"positions for {positions} tokens" in caplog.text
    assert len(model.rank(["tea " * 100], ["no " * 100])) == 1
