"""The loss of the two-sided encoders: Humeau et al., arXiv:1905.01969, sections 4.2 and 4.4."""

from typing import Any

from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss


class InBatchNegativesLoss(MultipleNegativesRankingLoss):
    """Cross-entropy of the right candidate's score among those of the whole batch, with raw scores as logits.

    Args:
        model: A `PolyEncoder` or a `BiEncoder`, whose own `similarity` scores.
        **kwargs: Further options of `MultipleNegativesRankingLoss`, such as `gather_across_devices`.

    Inputs: `(context, right candidate)` or `(context, right candidate, wrong candidate, ...)` columns.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(model, scale=1.0, similarity_fct=model.similarity, **kwargs)

    def get_config_dict(self) -> dict[str, Any]:
        return {"gather_across_devices": self.gather_across_devices}
