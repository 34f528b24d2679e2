"""LoRA in the three encoders: what learns, what stays, and that merging gives back a plain model."""

import sys
from copy import deepcopy

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2Model

import tiny
from poly_encoders import BiEncoder, CrossEncoder, PolyEncoder
from poly_encoders.training.methods.lora import add_lora, has_lora, load_trainable_state, merged_copy, trainable_state
from training_runs import KINDS as TRAINERS
from training_runs import QUIET, weights

CODES = {"context_vectors": "learnt_codes", "normalize": False, "num_codes": 4, "config_kwargs": {"code_std": 1.0}}
CLASSES = {
    "poly": (PolyEncoder, CODES),
    "poly shared": (PolyEncoder, {**CODES, "share_encoders": True}),
    "bi": (BiEncoder, {}),
    "bi shared": (BiEncoder, {"share_encoders": True}),
    "cross": (CrossEncoder, {}),
}
DATA = Dataset.from_dict({"context": [f"say {i}" for i in range(4)], "reply": [f"{i} it is" for i in range(4)]})
# What learns beside the LoRA matrices, by the end of its name.
NEW = {
    "poly": ["codes"],
    "poly shared": ["codes"],
    "bi": [],
    "bi shared": [],
    "cross": ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"],
}


def make(kind, folder, seed=0):
    torch.manual_seed(seed)
    model_class, options = CLASSES[kind]
    return model_class(folder, device="cpu", **options)


def scores(model):
    candidates = ["a", "bcd", "what else is there"]
    ranked = sorted(model.rank(["hello", "you"], candidates), key=lambda entry: entry["corpus_id"])
    return torch.tensor([entry["score"] for entry in ranked])


def randomise_adapters(model):
    """B starts as zero, where merging and loading have nothing to show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)


def trainer_of(model, folder, **options):
    _, trainer_class, arguments_class = next(kind for kind in TRAINERS.values() if type(model) is kind[0])
    settings = {"output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return trainer_class(model, arguments_class(**{**settings, "save_strategy": "no", **QUIET, **options}), DATA)


@pytest.mark.parametrize("kind", ["poly", "bi shared", "cross"])
def test_training_moves_the_adapters_and_what_is_new(kind, checkpoints, tmp_path):
    model = make(kind, checkpoints())
    before = scores(model)
    add_lora(model, rank=2)
    torch.testing.assert_close(scores(model), before, rtol=0, atol=0)
    old = weights(model)
    trainer_of(model, tmp_path).train()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, old[name])}
    assert moved == trainable_state(model).keys()
    adapters = {name for name in moved if "lora_" in name}
    assert len(adapters) == 2 * 12 * (2 if kind == "poly" else 1)
    assert len(moved - adapters) == len(NEW[kind])
    assert all(name.endswith(tuple(NEW[kind])) for name in moved - adapters)
    assert not torch.allclose(scores(model), before)


@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family != "bert"])
def test_every_family_takes_adapters_and_gives_them_back(family, checkpoints):
    # T5's own sequence classifier does not run on the tiny configuration, with LoRA or without.
    for kind in ["poly", "cross"] if family != "t5" else ["poly"]:
        model = make(kind, checkpoints(family))
        names, before = set(model.state_dict()), scores(model)
        add_lora(model, rank=2)
        torch.testing.assert_close(scores(model), before, rtol=0, atol=0)
        for name in trainable_state(model):
            assert "lora_" in name or not any(word in name for word in ("layer.", "layers.", "embeddings")), name
        randomise_adapters(model)
        adapted = scores(model)
        assert not torch.allclose(adapted, before)
        merged = merged_copy(model)
        torch.testing.assert_close(scores(merged), adapted, rtol=1e-4, atol=1e-4)
        assert set(merged.state_dict()) == names


@pytest.mark.parametrize("kind", CLASSES)
def test_a_merged_copy_saves_as_a_plain_model(kind, checkpoints, tmp_path, monkeypatch):
    model = make(kind, checkpoints())
    names = set(model.state_dict())
    add_lora(model, rank=2, alpha=8, target_modules=["query", "value", "intermediate.dense"])
    randomise_adapters(model)
    kept, adapted = deepcopy(model.state_dict()), scores(model)
    merged = merged_copy(model)
    assert not has_lora(merged)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(scores(merged), adapted, rtol=1e-4, atol=1e-4)

    assert has_lora(model)
    assert model.state_dict().keys() == kept.keys()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert any("lora_B" in name and p.requires_grad for name, p in model.named_parameters())
    torch.testing.assert_close(scores(model), adapted, rtol=0, atol=0)

    merged.save_pretrained(str(tmp_path / "merged"))
    files = list((tmp_path / "merged").rglob("*.safetensors"))
    assert files
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert list(tensors.keys())
            assert not [name for name in tensors.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118
    assert not list((tmp_path / "merged").rglob("adapter_*"))
    monkeypatch.setitem(sys.modules, "peft", None)  # which is not needed from here on
    again = CLASSES[kind][0](str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(scores(again), scores(merged), rtol=0, atol=1e-6)


def test_layers_of_gpt2_s_kind_take_adapters_too():
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2)).eval()
    for names in ("all-linear", ["c_attn"]):
        adapted = deepcopy(model)
        add_lora(adapted, rank=1, target_modules=names)
        randomise_adapters(adapted)
        ids = torch.arange(5)[None]
        hidden = adapted(ids).last_hidden_state
        assert not torch.allclose(hidden, model(ids).last_hidden_state)
        torch.testing.assert_close(merged_copy(adapted)(ids).last_hidden_state, hidden)


def test_merging_leaves_the_trainer_alone(checkpoints, tmp_path, monkeypatch):
    """The model's card knows the trainer, and so the data and the optimizer: copying those would cost their size."""

    model = make("bi", checkpoints())
    add_lora(model, rank=2)
    trainer = trainer_of(model, tmp_path, bf16=True)
    trainer.train()
    monkeypatch.setattr(type(trainer), "__deepcopy__", lambda *_: pytest.fail("it was copied"), raising=False)
    merged = merged_copy(trainer.model)
    assert merged.model_card_data is not model.model_card_data
    assert merged.model_card_data.model is merged
    assert model.model_card_data.model is model
    randomise_adapters(model)  # what the copy computes is its own, also after mixed-precision training
    assert not torch.allclose(scores(merged), scores(model))


@pytest.mark.parametrize("kind", CLASSES)
def test_the_trainable_state_comes_back(kind, checkpoints, tmp_path):
    model = make(kind, checkpoints())
    add_lora(model, rank=2)
    randomise_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(tuple(NEW[kind]) or "none of them"):
                parameter.add_(0.1)
    state = trainable_state(model)
    save_file(state, tmp_path / "trainable.safetensors")
    held = {name: tensor.clone() for name, tensor in state.items()}
    randomise_adapters(model)
    assert all(torch.equal(tensor, held[name]) for name, tensor in state.items())  # copies, not views
    load_trainable_state(model, state)

    again = make(kind, checkpoints(), seed=1)
    add_lora(again, rank=2)
    load_trainable_state(again, load_file(tmp_path / "trainable.safetensors"))
    assert trainable_state(again).keys() == state.keys()
    torch.testing.assert_close(scores(again), scores(model), rtol=0, atol=1e-6)


def test_a_state_that_does_not_fit_is_refused(checkpoints):
    model = make("poly", checkpoints())
    add_lora(model, rank=2)
    state = trainable_state(model)
    changed = {name: tensor + 1 for name, tensor in state.items()}
    other = make("poly", checkpoints())
    add_lora(other, rank=3)
    for wrong, said in (
        ({name: tensor for name, tensor in changed.items() if not name.endswith("codes")}, r"1 .*\(0\.model\.codes"),
        ({**changed, "head": torch.ones(1)}, r"1 .*\(head"),
        (trainable_state(other), "48 .*another shape"),
    ):
        with pytest.raises(ValueError, match=said):
            load_trainable_state(model, wrong)
    assert all(torch.equal(tensor, state[name]) for name, tensor in trainable_state(model).items())


def test_only_the_named_layers_of_every_backbone(checkpoints):
    model = make("poly", checkpoints())
    add_lora(model, rank=1, target_modules=["query"], dropout=0.3)
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == 4  # two layers in each of two backbones
    assert all(name.endswith(".query") for name in adapted)
    assert {module.p for name, module in model.named_modules() if name.endswith("lora_dropout.default")} == {0.3}
    exact = make("bi", checkpoints())
    add_lora(exact, rank=1, target_modules="layer.1.attention.self.value")
    assert len([module for module in exact.modules() if hasattr(module, "lora_A")]) == 2


def test_alpha_scales_what_the_adapters_add(checkpoints):
    def change(alpha):
        model = make("bi", checkpoints())
        layer = model[0].sub_modules["query"][0].model.encoder.layer[0].attention.self
        inputs = torch.ones(1, tiny.WIDTH)
        plain = layer.query(inputs).detach()
        add_lora(model, rank=4, alpha=alpha)
        randomise_adapters(model)
        a, b = layer.query.lora_A.default.weight, layer.query.lora_B.default.weight
        return (layer.query(inputs) - plain).detach(), (inputs @ a.T @ b.T).detach()

    for alpha, factor in [(4, 1.0), (2, 0.5), (None, 2.0)]:
        found, product = change(alpha)
        torch.testing.assert_close(found, factor * product, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(checkpoints, monkeypatch):
    model = make("cross", checkpoints())
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="rank of LoRA must be at least 1, got 0"):
        add_lora(model, rank=0)
    with pytest.raises(ValueError, match="dropout of LoRA"):
        add_lora(model, rank=1, dropout=1.0)
    with pytest.raises(ValueError, match=r"no linear layers named \['q_proj'\]. Choose among .*'query'"):
        add_lora(model, rank=1, target_modules=["query", "q_proj"])
    with pytest.raises(ValueError, match="no linear layers named"):
        add_lora(model, rank=1, target_modules=["classifier"])  # the head learns whole
    with pytest.raises(ValueError, match="no linear layers named"):
        add_lora(model, rank=1, target_modules=[])
    with pytest.raises(ValueError, match="no transformers backbone"):
        add_lora(torch.nn.Linear(2, 2), rank=1)
    assert set(model.state_dict()) == names  # a refusal leaves the model whole
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, rank=1)
    with pytest.raises(ValueError, match="has LoRA layers already"):
        add_lora(model, rank=1)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'poly-encoders\[peft\]'"):
        add_lora(make("cross", checkpoints()), rank=1)


def test_a_plain_model_is_copied(checkpoints):
    model = make("poly", checkpoints())
    copied = merged_copy(model)
    assert copied is not model
    torch.testing.assert_close(scores(copied), scores(model), rtol=0, atol=0)
    assert trainable_state(model).keys() == dict(model.named_parameters()).keys()
