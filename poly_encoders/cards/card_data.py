"""What goes into the three kinds of card: sentence-transformers' card data, with our metadata and texts."""

import json
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import torch
from huggingface_hub.repocard_data import eval_results_to_model_index
from sentence_transformers.base.model_card import BaseModelCardData, format_duration
from sentence_transformers.cross_encoder.model_card import CrossEncoderModelCardData as UpstreamCrossEncoderCardData
from sentence_transformers.sentence_transformer.model_card import SentenceTransformerModelCardData

from poly_encoders.cards.card_text import PLACEHOLDER, is_generated, metadata_of, section_of, snippet_id
from poly_encoders.cards.examples import widget_examples
from poly_encoders.cards.results import evaluations, shown_options, training_table
from poly_encoders.evaluation import CandidateRankingEvaluator

CURVE = "evaluation.png"  # the curve of a run's evaluations, as training writes it

_TEMPLATES = Path(str(files("poly_encoders.hub_cards")))
_TAGS = ["poly-encoder", "arxiv:1905.01969"]
_BI_TAGS = ["bi-encoder", "sentence-transformers", "sentence-similarity", "feature-extraction", "dense"]
_TASK = "ranking replies, passages or labels for a context"
_NAMES = {"PolyEncoder": "Poly-encoder", "BiEncoder": "Bi-encoder", "CrossEncoder": "Cross-encoder"}
# Metadata and tags that tell of one training run and its figures; the next one brings its own.
_OF_A_RUN = ("datasets", "metrics", "widget", "model-index", "co2_eq_emissions")
_UNTRAINED = ("Not trained yet", "As the encoder comes")  # headings of the card's section about that
_RUN_TAGS = ("generated_from_trainer", "dataset_size:", "loss:")

# What the snippets of every card rank.
_TURNS = ["Hi! Have you been here before?", "No, it's my first time. Is the coffee any good?"]
_CANDIDATES = ["The best in town, try the espresso.", "My brother works as a plumber.", "It opens at nine on Sundays."]


@dataclass
class RankingCardData(BaseModelCardData):
    """What the three kinds of card data share; goes before upstream's class of the kind."""

    # Upstream's fields, declared for their types.
    language: Any = field(default_factory=list)
    license: str | None = None
    model_name: str | None = None
    #: Whether the model was built on an encoder and not trained since: the card says what it is worth then.
    is_untrained: bool = field(default=False, init=False, repr=False)
    #: The plot of the training's evaluations, a file to save beside the card; `None` where there is none.
    curve: Path | None = field(default=None, init=False, repr=False)
    #: The trainer's log, of which the card makes its table.
    log_history: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    # Of the model that was loaded: its Hub id, its card's metadata, and sections that stay true until training.
    _loaded_id: str | None = field(default=None, init=False, repr=False)
    _loaded: dict[str, Any] | None = field(default=None, init=False, repr=False)
    _sections: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_upstream(cls, data: Any) -> Any:
        """Card data of ours with what a user filled into upstream's; ours as they are."""
        if isinstance(data, cls):
            return data
        plain = type(data)()
        told = {item.name: getattr(data, item.name) for item in fields(data) if item.init and item.name != "tags"}
        ours = cls(**{name: value for name, value in told.items() if value != getattr(plain, name)})
        ours.add_tags([tag for tag in data.tags if tag not in plain.tags])
        return ours

    def adopt(self, card: str, loaded_id: str | None) -> None:
        """Take over what is still true from the card that the model was loaded with."""
        self._loaded, self._loaded_id = metadata_of(card), loaded_id
        if is_generated(card):
            self._loaded_id = loaded_id or snippet_id(card)
            self._sections = {name: section_of(card, name) for name in ("Its index", "Evaluation", "Training")}
            self.is_untrained = any(section_of(card, heading) for heading in _UNTRAINED)
            if "model-index" in self._loaded and "widget" not in self._loaded:
                self.generate_widget_examples = False  # as somebody decided: a no is one for good
        self.language = self.language or _texts(self._loaded.get("language"))
        self.license = self.license or next(iter(_texts(self._loaded.get("license"))), None)
        self.add_tags([tag for tag in _texts(self._loaded.get("tags")) if not tag.startswith(_RUN_TAGS)])

    def set_examples(self, samples: Any) -> None:
        """Make the widget's examples of ranking sets, unless there are some or the user wants none."""
        if self.generate_widget_examples and not self.widget and self.pipeline_tag == "sentence-similarity":
            self.widget += widget_examples(samples, lambda context: self.model.context_texts([context])[0])

    def set_widget_examples(self, dataset: Any) -> None:
        """Nothing: upstream would take training data too. Examples are of the evaluation's sets; see `set_examples`."""

    def set_evaluation_metrics(self, evaluator: Any, metrics: dict[str, Any], epoch: int = 0, step: int = 0) -> None:
        """As upstream's; the evaluator's ranking sets make the widget's examples."""
        super().set_evaluation_metrics(evaluator, metrics, epoch, step)
        if isinstance(evaluator, CandidateRankingEvaluator):  # upstream's have samples of other forms
            self.set_examples(evaluator.samples)

    def set_base_model(self, model_id: str, revision: Any = None) -> bool:
        """As upstream's, but a folder is never looked up on the Hub, whatever it is called."""
        return not Path(model_id).exists() and super().set_base_model(model_id, revision)

    def try_to_set_base_model(self) -> None:
        """Nothing: what the model was built from was set on loading, and upstream guesses ids from folders' names."""

    @property
    def trained(self) -> bool:
        """Whether the model was trained since it was loaded or made."""
        return "generated_from_trainer" in self.tags

    def run_usage_snippet(self) -> None:
        """Rank the snippets' example, which is of no data set, so that the card shows what they print."""
        self.similarities = None  # should it fail, the snippets go without
        ranking = self.model.rank(_TURNS, _CANDIDATES, return_documents=True, show_progress_bar=False)
        self.similarities = "\n".join(f"# {entry['score']:.2f}  {entry['text']}" for entry in ranking)

    def get_default_model_name(self) -> str:
        name, base = type(self.model).__name__, self._made_from()
        return _NAMES.get(name, name) + (f" based on {base}" if isinstance(base, str) else "")

    def _made_from(self) -> Any:
        """The Hub's id, or ids, of what this was made from. Upstream takes a loaded model to be based on itself."""
        before = (self._loaded or {}).get("base_model")
        return before if self._loaded is not None and not self.trained else self.base_model or before

    def format_eval_metrics(self) -> dict[str, Any]:
        """The evaluators' figures: for the card's tables, and as `metrics` and `model-index` of the metadata."""
        found = evaluations(self.eval_results_dict, self.pipeline_tag)
        results = [result for entry in found for result in entry["results"]]
        return {
            "evaluations": found,
            "metrics": list(dict.fromkeys(result.metric_type for result in results)),
            "model-index": eval_results_to_model_index(self.model_name or "", results) if results else None,
        }

    def to_dict(self) -> dict[str, Any]:
        """All that the templates and the metadata are made of."""
        name = self.model_name
        data = super().to_dict()  # changed in place: upstream keeps the same dictionary to make YAML of
        self.model_name = name  # upstream would hold on to a default that training may change
        loaded = {} if self.trained or self._loaded is None else self._loaded
        for key in _OF_A_RUN:
            if loaded.get(key) and not data.get(key) and (key != "widget" or self.generate_widget_examples):
                data[key] = loaded[key]
        seconds = [entry["train_runtime"] for entry in self.log_history if "train_runtime" in entry]
        data.update(
            tags=list(dict.fromkeys([*self.tags, *_texts(loaded.get("tags"))])),
            base_model=self._made_from(),
            evaluations=data.get("evaluations", []),
            co2_eq_emissions=data.get("co2_eq_emissions"),
            sections={} if self.trained else self._sections,
            snippet_id=self.model_id or (None if self.trained else self._loaded_id) or PLACEHOLDER,
            turns=_TURNS,
            candidates=_CANDIDATES,
            printed=self.similarities or "",
            trained=self.trained,
            is_untrained=self.is_untrained and not self.trained,
            curve=CURVE if self.trained and self.curve is not None and self.curve.is_file() else None,
            options=shown_options(data["all_hyperparameters"], data["non_default_hyperparameters"]),
            rows=training_table(self.log_history, self.best_model_step),
            duration=format_duration(seconds[-1]) if seconds else None,
            versions={"poly-encoders": _own_version(), **data["version"]},
            literal=partial(json.dumps, ensure_ascii=False),
            cell=lambda value: str(value).replace("|", "\\|").replace("\n", " "),
        )
        shared = (_TEMPLATES / "shared.md").read_text(encoding="utf-8")
        data["shared"] = jinja2.Template(shared, undefined=jinja2.StrictUndefined).render(data)
        return data

    def get_model_specific_metadata(self) -> dict[str, Any]:
        """Facts about the model: its size, lengths and turns."""
        context_tokens, candidate_tokens = self.model.length_limits()
        return {
            "millions": sum(parameter.numel() for parameter in self.model.parameters()) / 1e6,
            "context_tokens": context_tokens,
            "candidate_tokens": candidate_tokens,
            "candidate_end": "first",  # which of its tokens are kept of a candidate that is too long
            "turn_separator": self.model.turn_separator,
            "max_turns": self.model.max_turns,
            "parlai": "parlai" in self.tags,
            "cosines": getattr(self.model, "scores_are_cosines", False),
        }


def _own_version() -> str:
    try:
        return version("poly-encoders")
    except PackageNotFoundError:  # a copy of the sources that was never installed
        return "(not installed)"


def _texts(value: Any) -> list[str]:
    """A text or a list of them, as YAML may have either, as a list."""
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


@dataclass
class PolyEncoderModelCardData(RankingCardData, SentenceTransformerModelCardData):
    """Card data of a `PolyEncoder`; parameters as for `SentenceTransformerModelCardData`."""

    task_name: str = _TASK
    tags: list[str] = field(default_factory=lambda: [*_TAGS, "retrieval", "reranking"])
    library_name: str = field(default="transformers", init=False)  # plain sentence-transformers cannot score with it
    template_path: Path = field(default=_TEMPLATES / "poly_encoder.md", init=False, repr=False)

    def get_model_specific_metadata(self) -> dict[str, Any]:
        model, config = self.model[0].model, self.model[0].config
        with torch.no_grad():
            temperature, share = model.final_temperature, model.last_turn_share
        return super().get_model_specific_metadata() | {
            "config": config,
            "backbone": type(model.context_encoder).__name__,
            "temperature": float(temperature),
            "last_turn_share": float(share),
            # Whether turns can be told by token ids alone, as the snippet without a pipeline does it.
            "ids_tell_turns": config.turn_boundary_ids is not None and not self.model.prompt_of("query"),
            # transformers' pipeline does not read them from the folder.
            "context_prompt": self.model.prompt_of("query") or "",
            "candidate_prompt": self.model.prompt_of("document") or "",
        }


@dataclass
class BiEncoderModelCardData(RankingCardData, SentenceTransformerModelCardData):
    """Card data of a `BiEncoder`; parameters as for `SentenceTransformerModelCardData`."""

    task_name: str = _TASK
    tags: list[str] = field(default_factory=lambda: [*_TAGS, *_BI_TAGS])
    template_path: Path = field(default=_TEMPLATES / "bi_encoder.md", init=False, repr=False)

    def get_model_specific_metadata(self) -> dict[str, Any]:
        return super().get_model_specific_metadata() | {
            "reduction": {"reduction": None, "num_codes": None} | self.model.reduction_options(),
            "share_encoders": self.model.share_encoders,
            "candidate_end": "last" if self.model.share_encoders else "first",  # one tokenizer cuts on one side
            "width": self.model.get_embedding_dimension(),
            "similarity": self.model.similarity_fn_name,
            "candidate_prompt": self.model.prompt_of("document") or "",
        }


@dataclass
class CrossEncoderModelCardData(RankingCardData, UpstreamCrossEncoderCardData):
    """Card data of a `CrossEncoder`, which has no widget; parameters as for upstream's class of this name."""

    task_name: str | None = _TASK
    tags: list[str] = field(default_factory=lambda: [*_TAGS, "cross-encoder", "reranker", "sentence-transformers"])
    pipeline_tag: str = field(default="text-ranking", init=False)
    template_path: Path = field(default=_TEMPLATES / "cross_encoder.md", init=False, repr=False)

    def get_model_specific_metadata(self) -> dict[str, Any]:
        return super().get_model_specific_metadata() | {"backbone": type(self.model[0].model).__name__}
