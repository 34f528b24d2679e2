"""What cannot be converted is refused by name, and leaves nothing behind."""

import json
import os

import pytest
import torch

from parlai_original import write_checkpoint
from poly_encoders.parlai import convert_parlai_checkpoint


def refuse(model_file, output, match, error=ValueError):
    with pytest.raises(error, match=match):
        convert_parlai_checkpoint(model_file, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("kind", "option", "value"),
    [
        ("poly", "codes_attention_type", "multihead"),
        ("poly", "poly_attention_type", "multihead"),
        ("poly", "polyencoder_type", "something_new"),
        ("poly", "polyencoder_attention_keys", "position"),
        ("poly", "polyencoder_image_encoder_num_layers", 1),
        ("poly", "variant", "aiayn"),
        ("poly", "variant", "prelayernorm"),
        ("poly", "variant", "bart"),
        ("poly", "activation", "swish"),
        ("poly", "reduction_type", "max"),
        ("poly", "dict_tokenizer", "re"),
        ("poly", "dict_tokenizer", "bytelevelbpe"),
        ("poly", "history_reversed", True),
        ("poly", "person_tokens", True),
        ("poly", "split_lines", True),
        ("poly", "add_p1_after_newln", True),
        ("poly", "history_add_global_end_token", "end"),
        ("poly", "special_tok_lst", "__a__,__b__"),
        ("poly", "dict_max_ngram_size", 2),
        ("bi", "share_encoders", True),
        ("bi", "use_memories", True),
        ("bi", "wrap_memory_encoder", True),
        ("bi", "normalize_sent_emb", True),
        ("cross", "variant", "prelayernorm"),
    ],
)
def test_options_without_a_counterpart(kind, option, value, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai", kind)
    file = tmp_path / "parlai" / "model.opt"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    refuse(model_file, tmp_path / "out", f"{option}={value!r}")


def test_every_problem_is_named_at_once(tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai", variant="aiayn", person_tokens=True)
    refuse(model_file, tmp_path / "out", "(?s)variant='aiayn'.*person_tokens=True")


@pytest.mark.parametrize(
    "agent",
    [
        "transformer/ranker",
        "transformer/generator",
        "bert_ranker/poly_encoder",
        "transformer/polyencoder:MyAgent",
        None,
    ],
)
def test_other_agents(agent, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai", model=agent)
    refuse(model_file, tmp_path / "out", "transformer/polyencoder, transformer/biencoder and transformer/crossencoder")


@pytest.mark.parametrize(
    "agent",
    [
        "transformer/polyencoder:PolyencoderAgent",
        "transformer/polyencoder:IRFriendlyPolyencoderAgent",
        "parlai.agents.transformer.polyencoder:PolyencoderAgent",
    ],
)
def test_agents_may_be_named_by_their_class(agent, tmp_path):
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai", model=agent), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    "option",
    ["variant", "n_heads", "output_scaling", "poly_n_codes", "dict_lower", "embeddings_scale", "poly_attention_type"],
)
def test_a_missing_option_is_not_guessed(option, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    file = tmp_path / "parlai" / "model.opt"
    options = json.loads(file.read_text())
    del options[option]
    file.write_text(json.dumps(options))
    refuse(model_file, tmp_path / "out", f"{option} is missing")


@pytest.mark.parametrize(
    "option", ["history_size", "delimiter", "special_tok_lst", "dict_max_ngram_size", "n_encoder_layers", "n_positions"]
)
def test_other_options_may_be_missing(option, tmp_path, caplog):
    model_file = write_checkpoint(tmp_path / "parlai")
    file = tmp_path / "parlai" / "model.opt"
    options = json.loads(file.read_text())
    del options[option]
    file.write_text(json.dumps(options))
    convert_parlai_checkpoint(model_file, tmp_path / "out")
    if option in ("history_size", "delimiter"):
        assert f"defaults are assumed: {option}=" in caplog.text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_heads", "2"),
        ("n_heads", 0),
        ("n_heads", -2),
        ("n_heads", True),
        ("n_heads", 3),
        ("poly_n_codes", 0),
        ("poly_n_codes", None),
        ("output_scaling", None),
        ("output_scaling", 0.0),
        ("output_scaling", float("nan")),
        ("dropout", "x"),
        ("n_encoder_layers", "x"),
        ("embedding_size", "32"),
        ("embeddings_scale", "false"),
        ("dict_lower", None),
        ("dict_nulltoken", None),
        ("delimiter", None),
        ("history_size", "3"),
        ("text_truncate", "36"),
        ("label_truncate", 1),
        ("label_truncate", 2),
    ],
)
def test_senseless_values_are_named(option, value, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    file = tmp_path / "parlai" / "model.opt"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    refuse(model_file, tmp_path / "out", f"{option}={value!r}")


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
def test_the_options_of_another_model(kind, option, value, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai", kind)
    file = tmp_path / "parlai" / "model.opt"
    file.write_text(json.dumps(json.loads(file.read_text()) | {option: value}))
    name = "n_layers" if option == "n_encoder_layers" else option
    refuse(model_file, tmp_path / "out", f"options call for {name}={value}")


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_code_is_refused(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_file = write_checkpoint(tmp_path / "parlai")
    saved = torch.load(model_file, weights_only=True)
    torch.save(saved | {"more": Exploit()}, model_file, _use_new_zipfile_serialization=zipped)
    refuse(model_file, tmp_path / "out", r"refused.*asks to run code.*mkdir")
    assert not (tmp_path / "exploited").exists()


def test_pickled_options_are_refused(tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    (tmp_path / "parlai" / "model.opt").write_bytes(
        b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01a\x94K\x01s."
    )
    refuse(model_file, tmp_path / "out", "a pickle can run code")


@pytest.mark.parametrize("suffix", [".opt", ".dict", ".dict.codecs"])
def test_a_neighbour_of_the_model_file(suffix, tmp_path):
    write_checkpoint(tmp_path / "parlai")
    refuse(tmp_path / "parlai" / f"model{suffix}", tmp_path / "out", "name its model file, model")


@pytest.mark.parametrize("suffix", ["", ".opt", ".dict", ".dict.codecs"])
def test_a_missing_file_is_named(suffix, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    (tmp_path / "parlai" / f"model{suffix}").unlink()
    refuse(model_file, tmp_path / "out", rf"has no model{suffix}\. ", FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 10, 5_000])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_model_file(keep, zipped, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    saved = torch.load(model_file, weights_only=True)
    torch.save(saved, model_file, _use_new_zipfile_serialization=zipped)
    model_file.write_bytes(model_file.read_bytes()[:keep])
    refuse(model_file, tmp_path / "out", "truncated or corrupted|damaged")


@pytest.mark.parametrize(
    ("suffix", "content", "match"),
    [
        (".opt", "[]", "object of options"),
        (".opt", "{", "not JSON"),
        (".dict", "", "no token"),
        (".dict.codecs", "t h\n", "version"),
        (".dict.codecs", "#version: 0.1\nt h\n", "version"),
        (".dict.codecs", "#version: 0.2\nt h e\n", "Line 2"),
        (".dict.codecs", "#version: 0.2\nth e\nt h\n", "'th e' before it makes 'th'"),
        (".opt", "[" * 100_000, "not JSON"),
        (".opt", '{"seed": ' + "1" * 5000 + "}", "model.opt is not JSON"),
    ],
)
def test_a_damaged_file(suffix, content, match, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    (tmp_path / "parlai" / f"model{suffix}").write_text(content)
    refuse(model_file, tmp_path / "out", match)


def changed_weights(model_file, change):
    saved = torch.load(model_file, weights_only=True)
    change(saved["model"])
    torch.save(saved, model_file)


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        ("poly", lambda w: w.pop("encoder_cand.layers.1.ffn.lin1.bias"), "no weight 'encoder_cand.layers.1.ffn.lin1"),
        ("poly", lambda w: w.update({"code_attention.q_lin.weight": torch.ones(2)}), "code_attention.q_lin.weight"),
        ("poly", lambda w: w.update({"codes": torch.zeros(4, 32)}), r"codes is \(4, 32\), expected \(8, 32\)"),
        ("poly", lambda w: w["codes"].fill_(float("nan")), "'codes' holds NaN"),
        ("poly", lambda w: w.update({"codes": w["codes"].to(torch.complex64)}), "'codes' is a torch.complex64 tensor"),
        ("poly", lambda w: w.update({"codes": w["codes"].to_sparse()}), "'codes' is a .*sparse"),
        ("poly", lambda w: w.update({"codes": torch.tensor(1.0)}), "'codes' is a .*2 dimensions"),
        ("poly", lambda w: w.update({"encoder_cand.embeddings.weight": torch.ones(116)}), "2 dimensions"),
        ("poly", lambda w: w.update({"encoder_cand.layers.x.norm1.bias": torch.ones(32)}), "encoder_cand.layers.x"),
        ("poly", lambda w: w.update({3: torch.ones(2)}), "named tensors, but 3"),
        ("poly", lambda w: w.update({"codes": [1.0]}), "named tensors, but 'codes' is a list"),
        ("cross", lambda w: w.update({"encoder.segment_embeddings.weight": torch.ones(1, 32)}), "n_segments=2"),
        ("cross", lambda w: w.pop("encoder.segment_embeddings.weight"), "n_segments=2"),
        ("bi", lambda w: w.update({"memory_transformer.norm_embeddings.bias": torch.ones(32)}), "memory_transformer"),
        ("bi", lambda w: w.update({"cand_encoder.mlp.0.weight": torch.ones(2)}), "cand_encoder.mlp.0.weight"),
        (
            "bi",
            lambda w: w.update({"embeddings.weight": torch.ones(116, 32)}),
            "'embeddings.weight' should be a second",
        ),
        ("cross", lambda w: w.pop("linear_layer.bias"), "no weight 'linear_layer.bias'"),
    ],
)
def test_weights_that_do_not_belong(kind, change, match, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai", kind)
    changed_weights(model_file, change)
    refuse(model_file, tmp_path / "out", match)


def test_a_file_of_something_else(tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    torch.save({"weights": torch.ones(2)}, model_file)
    refuse(model_file, tmp_path / "out", "no state dict under 'model'")


def test_the_dictionary_of_another_model(tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai", rows=100)
    refuse(model_file, tmp_path / "out", "116 tokens, but the model embeds only 100")


def test_a_refusal_leaves_the_last_good_conversion(tmp_path):
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "good"), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    with pytest.raises(ValueError, match="variant"):
        convert_parlai_checkpoint(write_checkpoint(tmp_path / "bad", variant="aiayn"), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()} == before


@pytest.mark.parametrize(
    ("suffix", "said"),
    [(".dict", "more tokens than model.dict has"), (".dict.codecs", "is model.dict.codecs complete")],
)
def test_a_file_that_lacks_lines_is_mentioned(suffix, said, tmp_path, caplog):
    model_file = write_checkpoint(tmp_path / "parlai")
    convert_parlai_checkpoint(model_file, tmp_path / "whole")
    assert "complete" not in caplog.text
    file = tmp_path / "parlai" / f"model{suffix}"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:50]))
    convert_parlai_checkpoint(model_file, tmp_path / "out")
    assert said in caplog.text


def test_a_dictionary_that_is_not_all_text_is_mentioned(tmp_path, caplog):
    model_file = write_checkpoint(tmp_path / "parlai")
    file = tmp_path / "parlai" / "model.dict"
    file.write_bytes(file.read_bytes().replace(b"persona", b"pers\xffona"))
    convert_parlai_checkpoint(model_file, tmp_path / "out")
    assert "not all UTF-8" in caplog.text


@pytest.mark.parametrize(("kind", "positions"), [("poly", 2), ("bi", 2), ("cross", 5)])
def test_positions_for_nothing(kind, positions, tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai", kind, n_positions=positions)
    refuse(model_file, tmp_path / "out", f"positions for {positions} tokens")


def test_harmless_options_are_mentioned(tmp_path, caplog):
    convert_parlai_checkpoint(write_checkpoint(tmp_path / "p", relu_dropout=0.1, use_reply="none"), tmp_path / "out")
    assert "relu_dropout" in caplog.text
    assert "use_reply" in caplog.text


def test_codes_that_are_no_text(tmp_path):
    model_file = write_checkpoint(tmp_path / "parlai")
    (tmp_path / "parlai" / "model.dict.codecs").write_bytes(b"#version: 0.2\n\xff h\n")
    refuse(model_file, tmp_path / "out", "model.dict.codecs is not UTF-8")


def test_no_place_to_write_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="empty name"):
        convert_parlai_checkpoint(write_checkpoint(tmp_path / "parlai"), "")
    assert [file.name for file in tmp_path.iterdir()] == ["parlai"]


@pytest.mark.parametrize(("kind", "positions"), [("poly", 30), ("bi", 30), ("cross", 40)])
def test_too_few_positions_are_mentioned(kind, positions, tmp_path, caplog):
    model = convert_parlai_checkpoint(write_checkpoint(tmp_path / "p", kind, n_positions=positions), tmp_path / "out")
    assert f"positions for {positions} tokens" in caplog.text
    assert len(model.rank(["tea " * 100], ["no " * 100])) == 1
