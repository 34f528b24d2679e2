"""The losses against slow and obvious ones: masking, gradient caching, several processes, teachers."""

import json
from copy import deepcopy
from itertools import chain

import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import forks
from poly_encoders import BiEncoder, PolyEncoder
from poly_encoders.training.methods.losses import (
    Distillation,
    InBatchNegativesLoss,
    SampledNegativesLoss,
    summed_cosines,
    text_keys,
)
from poly_encoders.training.runs.preparing import set_dropout
from training_runs import gradients

CONTEXTS = [["hello", f"what is {number}"] for number in "abcdefg"]
POSITIVES = ["a", "yes", "c", "yes", "eee", "yes", "g"]
NEGATIVES = ["q", "no", "yes", "no", "r", "yes", "tttt"]


@pytest.fixture(params=["poly", "bi", "shared", "turns", "bi-cosine"])
def model(request, checkpoints, sentence_transformer_folder):
    """The paper's two, codes with one encoder, and cosines: the new Poly-encoder and a SentenceTransformer's."""
    torch.manual_seed(0)
    if request.param.startswith("bi"):
        return BiEncoder(checkpoints() if request.param == "bi" else sentence_transformer_folder, device="cpu")
    if request.param == "turns":
        return PolyEncoder(checkpoints(), num_codes=4, device="cpu")
    options = {"num_codes": 4, "config_kwargs": {"code_std": 1.0}, "share_encoders": request.param == "shared"}
    return PolyEncoder(checkpoints(), device="cpu", context_vectors="learnt_codes", normalize=False, **options)


@pytest.fixture
def turns(checkpoints):
    """A Poly-encoder of turns with a learnt temperature."""
    options = {"learn_final_temperature": True, "learn_last_turn_share": True}
    return PolyEncoder(checkpoints(), num_codes=4, share_encoders=False, device="cpu", config_kwargs=options)


def features(model, *columns):
    sides = [model.preprocess(columns[0], task="query")]
    sides += [model.preprocess(column, task="document") for column in columns[1:]]
    return [{**side, "task": "query" if not position else "document"} for position, side in enumerate(sides)]


def all_scores(model, *columns, scale=None):
    """As logits: cosines times 20, unless told otherwise."""
    contexts = model.encode_query(columns[0], convert_to_tensor=True)
    scores = model.similarity(contexts, model.encode_document(list(chain(*columns[1:])), convert_to_tensor=True))
    return scores * ((20.0 if model.scores_are_cosines else 1.0) if scale is None else scale)


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
from poly_encoders.training.runs.preparing import set_dropout

folder, out, batch = sys.argv[1:]
distributed.init_process_group("gloo")
mine, found = slice(4 * distributed.get_rank(), 4 * distributed.get_rank() + 4), {}
for kind, mini in (("poly", None), ("poly", 3), ("turns", None), ("turns", 3), ("bi", None)):
    torch.manual_seed(0)
    turns = {"share_encoders": False, "config_kwargs": {"learn_final_temperature": True}}
    options = turns if kind == "turns" else {"context_vectors": "learnt_codes", "normalize": False}
    bi, learnt = kind == "bi", kind == "turns"
    model = BiEncoder(folder, device="cpu") if bi else PolyEncoder(folder, num_codes=4, device="cpu", **options)
    for parameter in model.parameters():
        distributed.broadcast(parameter.data, 0)
    loss = InBatchNegativesLoss(model, gather_across_devices=True, mini_batch_size=mini, learn_logit_scale=learnt)
    set_dropout(model.train(), 0.0)
    for name, parameter in model.named_parameters():
        if "pooler" in name:
            parameter.requires_grad_(False)
    loss.model = DistributedDataParallel(model, find_unused_parameters=mini is not None)  # as InBatchTrainer sets it
    tasks = ("query", "document", "document")
    sides = [model.preprocess(texts[mine], task=task) for task, texts in zip(tasks, json.loads(batch))]
    value = loss([{**side, "task": task} for task, side in zip(tasks, sides)])
    value.backward()
    for parameter in loss.scoring_parameters():  # as the trainer does
        distributed.all_reduce(parameter.grad)
        parameter.grad /= 2
    mean = value.detach().clone()
    distributed.all_reduce(mean)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients |= {"of the loss": loss.log_logit_scale.grad} if learnt else {}
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
    assert results.keys() == {"poly None", "poly 3", "turns None", "turns 3", "bi None"}
    for kind, found in results.items():
        bi, learnt = kind == "bi None", kind.startswith("turns")
        turns = {"share_encoders": False, "config_kwargs": {"learn_final_temperature": True}}
        options = turns if learnt else {"context_vectors": "learnt_codes", "normalize": False}
        folder = checkpoints()
        model = BiEncoder(folder, device="cpu") if bi else PolyEncoder(folder, num_codes=4, device="cpu", **options)
        set_dropout(model.train(), 0.0)
        model.load_state_dict(found["weights"])
        whole = InBatchNegativesLoss(model, learn_logit_scale=learnt)
        loss = whole(features(model, *BATCH))
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-6, rtol=1e-5)
        expected = gradients(model, loss) | ({"of the loss": whole.log_logit_scale.grad} if learnt else {})
        assert not learnt or expected["0.model.log_temperature"].abs() > 0
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


# --- scale, temperature, disagreement --------------------------------------------------------------------------------


def test_logits_are_scores_times_a_scale(model):
    scores = all_scores(model.eval(), CONTEXTS, POSITIVES, NEGATIVES, scale=1.0)
    columns = (CONTEXTS, POSITIVES, NEGATIVES)
    for scale in (None, 1.0, 7.5):
        loss = InBatchNegativesLoss(model, mask_duplicates=False, logit_scale=scale)
        factor = (20.0 if model.scores_are_cosines else 1.0) if scale is None else scale
        assert loss.get_config_dict()["logit_scale"] == factor
        expected = cross_entropy(factor * scores, torch.arange(7))
        torch.testing.assert_close(loss(features(model, *columns)), expected, atol=1e-4, rtol=1e-4)


def test_a_learnt_scale_has_its_gradient_and_stays_below_100(model):
    loss = InBatchNegativesLoss(model.eval(), mask_duplicates=False, logit_scale=3.0, learn_logit_scale=True)
    loss(features(model, CONTEXTS, POSITIVES, NEGATIVES)).backward()
    scores = all_scores(model, CONTEXTS, POSITIVES, NEGATIVES, scale=3.0)
    expected = (scores.softmax(dim=1) * scores).sum(dim=1) - scores.diagonal()
    torch.testing.assert_close(loss.log_logit_scale.grad, expected.mean(), atol=1e-4, rtol=1e-3)
    assert "log_logit_scale" in dict(loss.named_parameters())
    with torch.no_grad():
        loss.log_logit_scale.fill_(9.0)
    assert loss.own_state()["log_logit_scale"].exp().item() == pytest.approx(100.0)
    loss(features(model, CONTEXTS, POSITIVES))
    assert loss.logit_scale.item() == pytest.approx(100.0)
    other = InBatchNegativesLoss(model, learn_logit_scale=True)
    other.load_own_state(loss.own_state())
    assert other.logit_scale.item() == pytest.approx(100.0)
    assert InBatchNegativesLoss(model).own_state() == {}


@pytest.mark.parametrize("mini_batch_size", [1, 3, 7])
def test_caching_changes_no_gradient_of_what_is_beside_the_encoders(turns, mini_batch_size):
    """They are of the whole batch's loss, and get what comes back: half of it here, as in gradient accumulation."""
    set_dropout(turns.train(), 0.0)
    found = []
    options = {"learn_logit_scale": True, "disagreement_weight": 0.3}
    for size in (None, mini_batch_size):
        loss = InBatchNegativesLoss(turns, mini_batch_size=size, **options)
        turns.zero_grad()
        for _ in range(2):
            (0.5 * loss(features(turns, CONTEXTS, POSITIVES, NEGATIVES))).backward()
        found.append({name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name in ("log_logit_scale", "model.0.model.log_temperature", "model.0.model.last_turn_logit"):
        assert found[0][name].abs() > 1e-4
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


def test_the_mean_cosine_between_vectors_of_one_context():
    torch.manual_seed(0)
    vectors = torch.randn(4, 5, 8)
    vectors[1, 3:] = vectors[2, 1:] = vectors[3] = 0.0  # 5 vectors, 3, 1 and none
    vectors.requires_grad_()
    total, number = summed_cosines(vectors)
    expected = torch.zeros(())
    for row, real in ((0, 5), (1, 3)):
        pairs = [(i, j) for i in range(real) for j in range(real) if i != j]
        expected += torch.stack([cosine_similarity(vectors[row, i], vectors[row, j], dim=0) for i, j in pairs]).mean()
    torch.testing.assert_close(total, expected)
    assert number == 2.0
    total.backward()
    assert vectors.grad.isfinite().all()
    assert (vectors.grad[2:] == 0).all()


def test_disagreement_is_added_in_training_alone(turns):
    set_dropout(turns.train(), 0.0)
    side = features(turns, CONTEXTS, POSITIVES)
    plain, with_it = InBatchNegativesLoss(turns), InBatchNegativesLoss(turns, disagreement_weight=0.5)
    total, number = summed_cosines(turns(dict(side[0]))["sentence_embedding"])
    torch.testing.assert_close(with_it(side) - plain(side), 0.5 * total / number)
    assert plain.take_figures()["context_vector_cosine"] == pytest.approx(float(total / number), abs=1e-4)
    assert plain.take_figures() == {}
    turns.eval()
    torch.testing.assert_close(with_it(side), plain(side))
    assert "context_vector_cosine" not in plain.take_figures()
    single = features(turns.train(), ["one", "two"], ["a", "b"])
    torch.testing.assert_close(with_it(single), plain(single))
    assert "context_vector_cosine" not in plain.take_figures()


def test_scales_that_make_no_sense(model, checkpoints):
    for options, message in (
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"logit_scale": float("inf")}, "logit_scale"),
        ({"logit_scale": 101.0, "learn_logit_scale": True}, "100"),
        ({"disagreement_weight": -1.0}, "disagreement_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            InBatchNegativesLoss(model, **options)
    with pytest.raises(ValueError, match="BiEncoder has one"):
        InBatchNegativesLoss(BiEncoder(checkpoints(), device="cpu"), disagreement_weight=0.1)


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
