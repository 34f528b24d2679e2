"""The losses: Humeau et al., arXiv:1905.01969, sections 4 and 5.2, and what came after them.

`InBatchNegativesLoss` trains the two-sided encoders, `SampledNegativesLoss` the Cross-encoder. Both are the
cross-entropy of the positive's score among those of negatives, and both can learn from a teacher as well.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.util import all_gather, all_gather_with_grad, get_rank
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss, normalize

from poly_encoders.modeling.text_poly_encoder import checked_count

COSINE_LOGIT_SCALE = 20.0  # sentence-transformers'
MAX_LOGIT_SCALE = 100.0  # of one that is learnt (CLIP: Radford et al., arXiv:2103.00020, section 2.5)

# Odd 64-bit constants of splitmix64 (Steele et al., OOPSLA 2014), as signed numbers.
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


@dataclass(frozen=True)
class Distillation:
    """How a student learns from a teacher's scores of a row's own candidates.

    Args:
        kind: `"kl"`, the divergence of the student's distribution from the teacher's (Hinton et al., arXiv:1503.02531);
            or `"margin_mse"`, the squared error of the positive's lead over each negative (Hofstätter et al.,
            arXiv:2010.02666).
        weight: Share of the loss that is the teacher's, from 0 to 1; the rest is the contrastive one.
        temperature: Of both distributions in `"kl"`, whose loss is scaled by its square.
    """

    kind: Literal["kl", "margin_mse"] = "kl"
    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("kl", "margin_mse"):
            raise ValueError(f"distillation is 'kl' or 'margin_mse', not {self.kind!r}.")
        if not 0.0 <= self.weight <= 1.0:
            raise ValueError(f"distillation_weight must be from 0 to 1, got {self.weight}.")
        if not self.temperature > 0.0:
            raise ValueError(f"distillation_temperature must be above 0, got {self.temperature}.")

    def mix(self, contrastive: Tensor, scores: Tensor, teacher: Tensor | None) -> Tensor:
        """The whole loss, a scalar: of the contrastive one and both models' `(batch, 1 + n)` scores, positives first.

        Raises:
            ValueError: the teacher's scores are missing, or are of other candidates.
        """
        if teacher is None or teacher.shape != scores.shape:
            raise ValueError(
                f"Distillation needs a teacher's score of each of a row's {scores.shape[1]} candidates; got "
                f"{'none' if teacher is None else tuple(teacher.shape)}. Add `scores` with training/distill.py."
            )
        if scores.shape[1] < 2:
            raise ValueError("Distillation compares candidates, so each row needs a negative beside its positive.")
        return (1.0 - self.weight) * contrastive + self.weight * self.divergence(scores, teacher)

    def divergence(self, scores: Tensor, teacher: Tensor) -> Tensor:
        """How far the student is from the teacher: scalar, of `(batch, 1 + n)` scores of both."""
        teacher = teacher.to(scores)
        if self.kind == "margin_mse":
            return mse_loss(scores[:, :1] - scores[:, 1:], teacher[:, :1] - teacher[:, 1:])
        log_student = (scores / self.temperature).log_softmax(dim=1)
        log_teacher = (teacher / self.temperature).log_softmax(dim=1)
        return kl_div(log_student, log_teacher, reduction="batchmean", log_target=True) * self.temperature**2


class InBatchNegativesLoss(CachedLossMixin, nn.Module):
    """Cross-entropy of the positive's score among those of the whole batch, with scores times a scale as logits.

    Another row's candidate that is the positive's text, or a positive of the same context, is no negative and is left
    out of the sum.

    Args:
        model: A `PolyEncoder` or a `BiEncoder`, whose own `similarity` scores.
        gather_across_devices: Count the candidates of all processes, with gradients to each; their batches must be
            equally large.
        mini_batch_size: Encode so many texts at a time and keep no activations but theirs: the gradients of the whole
            batch in the memory of this one, for a second forward pass (Gao et al., arXiv:2101.06983). `None` keeps all.
        mask_duplicates: Leave positives out of the negatives, as said.
        distillation: Learn from a teacher's scores too. The student's are the logits.
        logit_scale: Factor on the scores. When left out, 20 where they are cosines and 1 where they are dot products.
        learn_logit_scale: Train it, as `log_logit_scale`; it stays at or below 100.
        disagreement_weight: Factor of the mean cosine between two of a context's vectors, which is added to the loss
            in training, so that the vectors of a Poly-encoder part (MINER: Li et al., Findings of ACL 2022).

    Raises:
        ValueError: an option out of its range, or a disagreement of a model with one vector a context.

    Inputs: `(context, positive)` or `(context, positive, negative, ...)` columns; as labels, where there is a teacher,
        its `(batch, 1 + n)` scores of each row's own candidates.
    """

    log_logit_scale: nn.Parameter | None

    def __init__(
        self,
        model: Any,
        gather_across_devices: bool = False,
        mini_batch_size: int | None = None,
        mask_duplicates: bool = True,
        distillation: Distillation | None = None,
        logit_scale: float | None = None,
        learn_logit_scale: bool = False,
        disagreement_weight: float = 0.0,
    ) -> None:
        super().__init__()
        checked_count(mini_batch_size, "mini_batch_size")
        check_scales(logit_scale, learn_logit_scale, disagreement_weight)
        if disagreement_weight and len(model.vector_shape("query")) < 2:
            raise ValueError(f"disagreement_weight is of several vectors a context; a {type(model).__name__} has one.")
        self.model = model
        self.similarity: Callable[[Tensor, Tensor], Tensor] = model.similarity
        self.gather_across_devices = gather_across_devices
        self.mini_batch_size: Any = mini_batch_size
        self.uses_gradient_cache = mini_batch_size is not None
        self.mask_duplicates = mask_duplicates
        self.distillation = distillation
        self.disagreement_weight = disagreement_weight
        self._logit_scale = default_logit_scale(model) if logit_scale is None else float(logit_scale)
        learnt = nn.Parameter(torch.tensor(math.log(self._logit_scale))) if learn_logit_scale else None
        self.register_parameter("log_logit_scale", learnt)
        self.num_masked: int | Tensor = 0  # of the batches since someone took the count
        self.num_batches = 0
        self._cosines: Tensor | None = None  # as `summed_cosines` has them, likewise
        self._keys: list[Tensor] = []
        self._beside: list[tuple[nn.Parameter, Tensor]] = []  # gradients that no vector passes on

    @property
    def logit_scale(self) -> float | Tensor:
        """Factor on the scores: a number, or a tensor with its gradient where it is learnt."""
        return self._logit_scale if self.log_logit_scale is None else self.log_logit_scale.exp()

    def scoring_parameters(self) -> list[nn.Parameter]:
        """What trains but is in no encoder's forward pass: the logit scale, and the final attention's temperature."""
        named = ((name.rpartition(".")[2], parameter) for name, parameter in self.named_parameters())
        return [p for name, p in named if name in ("log_logit_scale", "log_temperature") and p.requires_grad]

    def own_state(self) -> dict[str, Tensor]:
        """What the loss has learnt by itself, as copies on the CPU; empty where there is nothing."""
        if self.log_logit_scale is None:
            return {}
        return {"log_logit_scale": self.log_logit_scale.detach().clamp(max=math.log(MAX_LOGIT_SCALE)).cpu()}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `own_state` gave."""
        if self.log_logit_scale is not None:
            with torch.no_grad():
                self.log_logit_scale.copy_(state["log_logit_scale"])

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        features = list(sentence_features)
        if len(features) < 2:
            raise ValueError(f"Training needs a context and a candidate column, but got {len(features)} column(s).")
        self._keys = [text_keys(side["input_ids"], side["attention_mask"]) for side in features]
        return self._loss_of(features, labels)

    def _loss_of(self, features: list[dict[str, Any]], labels: Tensor | None) -> Tensor:
        if self.log_logit_scale is not None:
            with torch.no_grad():
                self.log_logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))
        if not self.uses_gradient_cache:
            return self._loss(embed_columns(self.model, features), labels)
        self._beside = []
        loss = CachedLossMixin.forward_cached(self, features, labels)
        for parameter, gradient in self._beside:  # adds 0, and the gradient times the one that comes back here
            loss = loss + ((parameter - parameter.detach()) * gradient).sum()
        return loss

    def calculate_loss(self, reps: Any, labels: Tensor | None = None, *, with_backward: bool = False) -> Tensor:
        """The loss of each column's vectors in mini-batches, which upstream's gradient caching calls."""
        loss = self._loss([torch.cat(column) for column in reps], labels)
        if with_backward:
            leaves, beside = [part for column in reps for part in column], self.scoring_parameters()
            found = torch.autograd.grad(loss, [*leaves, *beside], allow_unused=True)
            for leaf, gradient in zip(leaves, found, strict=False):
                leaf.grad = gradient
            pairs = zip(beside, found[len(leaves) :], strict=True)
            self._beside = [(parameter, gradient) for parameter, gradient in pairs if gradient is not None]
            loss = loss.detach()
        return loss

    def _loss(
        self, vectors: list[Tensor], teacher: Tensor | None, further: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Of `(batch, ...)` context vectors and then each column's `(batch, dim)` candidate vectors.

        `further` are `(n, dim)` vectors of more candidates, and `(batch, n)` which of them are masked.
        """
        contexts, *columns = vectors
        context_keys, *column_keys = self._keys
        batch, first = len(contexts), 0
        own_context_keys, own_keys = context_keys, column_keys[0]
        if self.gather_across_devices:
            columns = [all_gather_with_grad(column) for column in columns]
            context_keys, *column_keys = [all_gather(keys) for keys in self._keys]
            first = get_rank() * batch
        world_batch = len(context_keys)
        positives = torch.arange(first, first + batch, device=contexts.device)
        same = own_keys[:, None] == torch.cat(column_keys)  # (batch, columns * world batch)
        same[:, :world_batch] |= own_context_keys[:, None] == context_keys
        if further is not None:
            columns, same = [*columns, further[0]], torch.cat([same, further[1]], dim=1)
        own = positives[:, None] + world_batch * torch.arange(len(column_keys), device=contexts.device)
        return self._loss_of_scores(contexts, self.similarity(contexts, torch.cat(columns)), same, own, teacher)

    def _loss_of_scores(
        self, contexts: Tensor, scores: Tensor, same: Tensor, own: Tensor, teacher: Tensor | None
    ) -> Tensor:
        """Of `(batch, n)` scores; which are masked; `(batch, 1 + k)` places of each row's own, the positive first."""
        logits = scores = scores * self.logit_scale
        if self.mask_duplicates:
            same = same.scatter(1, own[:, :1], False)
            self.num_masked = self.num_masked + same.sum()
            self.num_batches += 1
            logits = scores.masked_fill(same, -torch.inf)
        loss = cross_entropy(logits, own[:, 0])
        if not is_training(self.model):  # validation is without teacher and disagreement
            return loss
        if self.distillation is not None:
            loss = self.distillation.mix(loss, scores.gather(1, own), teacher)
        if contexts.dim() == 3:
            sums = summed_cosines(contexts)
            self._cosines = sums.detach() if self._cosines is None else self._cosines + sums.detach()
            if self.disagreement_weight:
                loss = loss + self.disagreement_weight * sums[0] / sums[1].clamp(min=1.0)
        return loss

    def take_masked(self) -> float | None:
        """Mean number of candidates masked in a batch since the last call; `None` where there was no batch."""
        mean = float(self.num_masked) / self.num_batches if self.num_batches else None
        self.num_masked = self.num_batches = 0
        return mean

    def take_figures(self) -> dict[str, float]:
        """What is worth logging of the batches since the last call; see docs/training.md."""
        figures: dict[str, float] = {}
        if (masked := self.take_masked()) is not None:
            figures["masked_duplicates"] = round(masked, 3)
        total, number = (0.0, 0.0) if self._cosines is None else self._cosines.tolist()
        self._cosines = None
        if number:
            figures["context_vector_cosine"] = round(total / number, 4)
        if self.log_logit_scale is not None:
            figures["logit_scale"] = round(self.log_logit_scale.exp().item(), 4)
        return figures

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = ("gather_across_devices", "mini_batch_size", "mask_duplicates", "disagreement_weight")
        learnt = {"learn_logit_scale": self.log_logit_scale is not None, "logit_scale": self._logit_scale}
        distillation = self.distillation and vars(self.distillation)
        return {**{name: getattr(self, name) for name in names}, **learnt, "distillation": distillation}


class SampledNegativesLoss(nn.Module):
    """Cross-entropy of the positive's raw score among those of its row, for the Cross-encoder.

    Inputs: token features of `batch * candidates` pairs, row after row and the positive first, as `PairCollator` makes
        them, with `candidate_mask`, `(batch, candidates)`: false for what takes no part; as labels, where there is a
        teacher, its `(batch, 1 + n)` scores of each row's own candidates.
    """

    def __init__(self, model: Any, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.model = model
        self.distillation = distillation

    def forward(
        self,
        features: dict[str, Any],
        labels: Tensor | None = None,
        **in_the_tokens: Any,  # the prompt and the task, which upstream's trainer passes
    ) -> Tensor:
        features = dict(features)
        mask: Tensor = features.pop("candidate_mask")
        scores = self.model(features)["scores"].float().view(mask.shape)
        loss = cross_entropy(scores.masked_fill(~mask, -torch.inf), mask.new_zeros(len(mask), dtype=torch.long))
        if self.distillation is None or not is_training(self.model):
            return loss
        own = scores if labels is None else scores[:, : labels.shape[1]]
        return self.distillation.mix(loss, own, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {"distillation": self.distillation and vars(self.distillation)}


def check_scales(logit_scale: float | None, learn_logit_scale: bool, disagreement_weight: float) -> None:
    """Raise a ValueError that names the one of these options of `InBatchNegativesLoss` that is out of its range."""
    if logit_scale is not None and not (math.isfinite(logit_scale) and logit_scale > 0):
        raise ValueError(f"logit_scale must be a positive finite number, got {logit_scale}.")
    if learn_logit_scale and logit_scale is not None and logit_scale > MAX_LOGIT_SCALE:
        raise ValueError(f"A logit_scale that is learnt stays at or below {MAX_LOGIT_SCALE:g}, but got {logit_scale}.")
    if not (math.isfinite(disagreement_weight) and disagreement_weight >= 0):
        raise ValueError(f"disagreement_weight must be a finite number of at least 0, got {disagreement_weight}.")


def default_logit_scale(model: Any) -> float:
    """What makes logits of a model's scores: 20 for cosines, else 1."""
    return COSINE_LOGIT_SCALE if getattr(model, "scores_are_cosines", False) else 1.0


def summed_cosines(contexts: Tensor) -> Tensor:
    """How alike a context's vectors are: `(2,)` float32 of `(batch, m, dim)` context vectors, all-zero ones padding.

    The sum over the contexts of the mean cosine between two of their vectors, and how many contexts have two.
    """
    real = (contexts != 0).any(dim=-1, keepdim=True)
    # The padding's norm would have no gradient.
    units = normalize(contexts.float().masked_fill(~real, 1.0), dim=-1) * real
    number = real.sum(dim=1).squeeze(-1).float()  # (batch,)
    pairs = number * (number - 1)
    means = (units.sum(dim=1).square().sum(dim=-1) - number) / pairs.clamp(min=1.0)
    return torch.stack([(means * (pairs > 0)).sum(), (pairs > 0).sum().float()])


def is_training(model: nn.Module) -> bool:
    """Of the model itself: distributed training's wrapper stays in training while what it wraps is evaluated."""
    return getattr(model, "module", model).training


def text_keys(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """A 64-bit hash, `(batch,)` int64, of each row of `(batch, length)` tokens, whatever the padding and the device.

    Two different texts share one with a probability of 2^-64: a number to compare and gather in place of a text.
    """
    mask = attention_mask.long()
    tokens = _mixed(input_ids.long() + mask.cumsum(dim=1) * _STEP) * mask
    return _mixed(tokens.sum(dim=1))


def _mixed(numbers: Tensor) -> Tensor:
    """splitmix64's finaliser, with arithmetic shifts; products wrap around."""
    numbers = (numbers ^ (numbers >> 30)) * _FIRST
    numbers = (numbers ^ (numbers >> 27)) * _SECOND
    return numbers ^ (numbers >> 31)
