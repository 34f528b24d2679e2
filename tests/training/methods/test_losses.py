"""The losses against slow and obvious ones: masking, gradient caching, several processes, teachers."""

import json
from copy import deepcopy
from itertools import chain

import pytest
import torch
from torch.nn.functional import cross_entropy

import forks
from poly_encoders import BiEncoder, PolyEncoder
from poly_encoders.training.methods.losses import Distillation, InBatchNegativesLoss, SampledNegativesLoss, text_keys
from poly_encoders.training.runs.trainers import set_dropout

CONTEXTS = [["hello", f"what is {number}"] for number in "abcdefg"]
POSITIVES = ["a", "yes", "c", "yes", "eee", "yes", "g"]
NEGATIVES = ["q", "no", "yes", "no", "r", "yes", "tttt"]


@pytest.fixture(params=["poly", "bi", "shared"])
def model(request, checkpoints):
    torch.manual_seed(0)
    if request.param == "bi":
        return BiEncoder(checkpoints(), device="cpu")
    options = {"num_codes": 4, "config_kwargs": {"code_std": 1.0}, "share_encoders": request.param == "shared"}
    return PolyEncoder(checkpoints(), device="cpu", **options)


def features(model, *columns):
    sides = [model.preprocess(columns[0], task="query")]
    sides += [model.preprocess(column, task="document") for column in columns[1:]]
    return [{**side, "task": "query" if not position else "document"} for position, side in enumerate(sides)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any(gradient.abs().sum() > 0 for gradient in found.values())
    return found


def all_scores(model, *columns):
    contexts = model.encode_query(columns[0], convert_to_tensor=True)
    return model.similarity(contexts, model.encode_document(list(chain(*columns[1:])), convert_to_tensor=True))


def test_the_positive_s_text_is_no_negative(model):
    """Three rows are answered with "yes": none of them is punished for the others', nor for one among the negatives."""
    loss = InBatchNegativesLoss(model.eval())
    scores = all_scores(model, CONTEXTS, POSITIVES, NEGATIVES)
    texts, losses, masked = [*POSITIVES, *NEGATIVES], [], 0
    for row, positive in enumerate(POSITIVES):
        rivals = [column for column, text in enumerate(texts) if column != row and text != positive]
        masked += len(texts) - 1 - len(rivals)
        losses.append(scores[row, [row, *rivals]].log_softmax(0)[0].neg())
    found = loss(features(model, CONTEXTS, POSITIVES, NEGATIVES))
    torch.testing.assert_close(found, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    assert masked == 12
    assert loss.take_masked() == masked
    assert loss.take_masked() is None
    everything = InBatchNegativesLoss(model, mask_duplicates=False)(features(model, CONTEXTS, POSITIVES, NEGATIVES))
    torch.testing.assert_close(everything, cross_entropy(scores, torch.arange(7)), atol=1e-5, rtol=1e-5)
    assert everything > found


def test_another_positive_of_the_same_context_is_no_negative(model):
    contexts = [["hi"], ["hi"], ["and you"]]
    scores = all_scores(model.eval(), contexts, ["a", "b", "c"])
    expected = [scores[0, [0, 2]], scores[1, [1, 2]], scores[2, [2, 0, 1]]]
    expected = torch.stack([row.log_softmax(0)[0].neg() for row in expected]).mean()
    found = InBatchNegativesLoss(model)(features(model, contexts, ["a", "b", "c"]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_batch_of_one(model):
    """Nobody to learn from: a loss of zero and no gradient, not an error and not NaN."""
    loss = InBatchNegativesLoss(model.train())(features(model, CONTEXTS[:1], POSITIVES[:1]))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in model.parameters())


def test_keys_tell_texts_apart_and_not_padding():
    ids = torch.tensor([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7], [6, 5, 7, 1, 1], [5, 6, 7, 7, 1], [5, 6, 7, 1, 1]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]])
    keys = text_keys(ids, mask).tolist()
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    many = torch.arange(100_000).view(-1, 2)
    assert len(set(text_keys(many, torch.ones_like(many)).tolist())) == len(many)


@pytest.mark.parametrize(("mini_batch_size", "dropout"), [(1, 0.0), (3, 0.0), (7, 0.0), (7, 0.3)])
def test_caching_changes_no_gradient(model, mini_batch_size, dropout):
    """With dropout the two cannot draw alike, so there the cached loss is compared with itself in one mini-batch."""
    set_dropout(model.train(), dropout)
    columns = (CONTEXTS, POSITIVES, NEGATIVES)
    torch.manual_seed(5)
    whole = InBatchNegativesLoss(model, mini_batch_size=None if dropout == 0.0 else 50)
    expected_loss = whole(features(model, *columns))
    expected = gradients(model, expected_loss)
    torch.manual_seed(5)
    cached = InBatchNegativesLoss(model, mini_batch_size=mini_batch_size)
    loss = cached(features(model, *columns))
    torch.testing.assert_close(loss.detach(), expected_loss.detach())
    found = gradients(model, loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(cached(features(model.eval(), *columns)), whole(features(model, *columns)))


BATCH = [
    [["hello", f"what is {letter}"] for letter in "abcdefgh"],
    ["a", "yes", "c", "yes", "e", "yes", "g", "h"],
    ["q", "no", "yes", "no", *"ryut"],
]
TWO = """
import json, sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from poly_encoders import BiEncoder, PolyEncoder
from poly_encoders.training.methods.losses import InBatchNegativesLoss
from poly_encoders.training.runs.trainers import set_dropout

folder, out, batch = sys.argv[1:]
distributed.init_process_group("gloo")
mine, found = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4), {}
for kind, mini in (("poly", None), ("poly", 3), ("bi", None)):
    torch.manual_seed(0)
    model = BiEncoder(folder, device="cpu") if kind == "bi" else PolyEncoder(folder, num_codes=4, device="cpu")
    for parameter in model.parameters():
        distributed.broadcast(parameter.data, 0)
    loss = InBatchNegativesLoss(model, gather_across_devices=True, mini_batch_size=mini)
    set_dropout(model.train(), 0.0)
    for name, parameter in model.named_parameters():
        if "pooler" in name:
            parameter.requires_grad_(False)
    loss.model = DistributedDataParallel(model, find_unused_parameters=mini is not None)  # as InBatchTrainer sets it
    tasks = ("query", "document", "document")
    sides = [model.preprocess(texts[mine], task=task) for task, texts in zip(tasks, json.loads(batch))]
    value = loss([{**side, "task": task} for task, side in zip(tasks, sides)])
    value.backward()
    mean = value.detach().clone()
    distributed.all_reduce(mean)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    weights = {name: p.detach() for name, p in model.named_parameters()}
    found[f"{kind} {mini}"] = {"loss": mean / 2, "gradients": gradients, "weights": weights}
if distributed.get_rank() == 0:
    torch.save(found, out)
distributed.barrier()
distributed.destroy_process_group()
"""


def test_two_processes_are_one(checkpoints, tmp_path):
    """Two with half the batch each give the loss and the gradients of one with the whole, hard negatives included."""
    out = tmp_path / "found.pt"
    forks.run(["-c", TWO, checkpoints(), out, json.dumps(BATCH)], ranks=2)
    results = torch.load(out, weights_only=True)
    assert results.keys() == {"poly None", "poly 3", "bi None"}
    for kind, found in results.items():
        bi = kind == "bi None"
        model = BiEncoder(checkpoints(), device="cpu") if bi else PolyEncoder(checkpoints(), num_codes=4, device="cpu")
        set_dropout(model.train(), 0.0)
        model.load_state_dict(found["weights"])
        loss = InBatchNegativesLoss(model)(features(model, *BATCH))
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-6, rtol=1e-5)
        expected = gradients(model, loss)
        assert found["gradients"].keys() == expected.keys() - {name for name in expected if "pooler" in name}
        for name, gradient in found["gradients"].items():
            torch.testing.assert_close(gradient, expected[name], atol=1e-5, rtol=1e-4, msg=f"{kind} {name}")


@pytest.mark.parametrize(("rows", "candidates"), [(1, 2), (4, 2), (3, 5)])
def test_divergence_against_loops(rows, candidates):
    torch.manual_seed(0)
    student, teacher = torch.randn(rows, candidates), torch.randn(rows, candidates)
    found = Distillation("kl", temperature=2.0).divergence(student, teacher)
    expected = 0.0
    for row in range(rows):
        p, q = (teacher[row] / 2).softmax(0), (student[row] / 2).softmax(0)
        expected += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)) * 4 / rows
    assert found.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    margins = [
        float((student[row, 0] - student[row, j]) - (teacher[row, 0] - teacher[row, j])) ** 2
        for row in range(rows)
        for j in range(1, candidates)
    ]
    found = Distillation("margin_mse").divergence(student, teacher)
    assert found.item() == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert Distillation("kl").divergence(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    assert Distillation("margin_mse").divergence(teacher + 3.0, teacher).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_a_student_learns_from_its_own_candidates(model, kind, mini_batch_size):
    """The teacher's scores are of the row's own positive and negative, not of the batch's."""
    model.train()
    set_dropout(model, 0.0)
    teacher = torch.linspace(-1, 2, 14).view(7, 2)
    way = Distillation(kind, weight=0.25)
    loss = InBatchNegativesLoss(model, distillation=way, mini_batch_size=mini_batch_size)
    found = loss(features(model, CONTEXTS, POSITIVES, NEGATIVES), teacher)
    contrastive = InBatchNegativesLoss(model)(features(model, CONTEXTS, POSITIVES, NEGATIVES))
    scores = all_scores(model, CONTEXTS, POSITIVES, NEGATIVES)
    own = torch.stack([scores[row, [row, row + 7]] for row in range(7)])
    expected = 0.75 * contrastive + 0.25 * way.divergence(own, teacher)
    torch.testing.assert_close(found.detach(), expected.detach(), atol=1e-5, rtol=1e-4)
    model.eval()
    loss.model = torch.nn.Module().train()  # distributed training's wrapper stays in training while one evaluates
    loss.model.module, loss.model.forward = model, model.forward
    without = loss(features(model, CONTEXTS, POSITIVES, NEGATIVES))  # of the teacher
    torch.testing.assert_close(without.detach(), contrastive.detach(), atol=1e-5, rtol=1e-4)


def test_what_distillation_refuses(model):
    loss = InBatchNegativesLoss(model.train(), distillation=Distillation())
    with pytest.raises(ValueError, match=r"scores.*training/distill\.py"):
        loss(features(model, CONTEXTS, POSITIVES, NEGATIVES))
    with pytest.raises(ValueError, match="2 candidates"):
        loss(features(model, CONTEXTS, POSITIVES, NEGATIVES), torch.zeros(7, 3))
    with pytest.raises(ValueError, match="a negative"):
        loss(features(model, CONTEXTS, POSITIVES), torch.zeros(7, 1))
    for options, message in (
        ({"kind": "mse"}, "margin_mse"),
        ({"weight": 1.5}, "distillation_weight"),
        ({"temperature": 0.0}, "distillation_temperature"),
    ):
        with pytest.raises(ValueError, match=message):
            Distillation(**options)
    with pytest.raises(ValueError, match="mini_batch_size"):
        InBatchNegativesLoss(model, mini_batch_size=0)


def test_sampled_negatives_leave_the_positive_s_text_out():
    scores = torch.tensor([[1.0, 2.0, 0.5], [0.0, 3.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, False, True]])

    class Scorer(torch.nn.Module):
        def forward(self, features):
            return {"scores": scores.flatten()}

    loss = SampledNegativesLoss(Scorer().train())({"candidate_mask": mask})
    expected = torch.stack([scores[0].log_softmax(0)[0], scores[1, [0, 2]].log_softmax(0)[0]]).neg().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert scores.grad[1, 1] == 0.0
    assert scores.grad[1, 2] > 0.0


def test_losses_copy(model):
    """A trainer's loss is rebuilt around a wrapped model; its vectors must still be scored by the model's own way."""
    loss = InBatchNegativesLoss(model.eval())
    expected = loss(features(model, CONTEXTS, POSITIVES))
    loss.model = deepcopy(model)
    torch.testing.assert_close(loss(features(model, CONTEXTS, POSITIVES)), expected)
