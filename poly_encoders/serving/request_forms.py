"""What requests look like: text-embeddings-inference's, Cohere's, Jina's, vLLM's, Infinity's, OpenAI's and ours.

Fields that a client sends and this service has no use for (`model`, `user`, `priority`, ...) are let through. A null is
a field that was left out.
"""

import json
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from poly_encoders.serving.request_errors import InvalidRequestError
from poly_encoders.two_sided import is_single_context

Turns = str | list[str] | list[dict[str, Any]] | dict[str, Any]
Document = str | dict[str, Any]
CONTEXT = "A text, a list of turns, or a list of chat messages, oldest first."


class Form(BaseModel):
    """A request's body: `true` is no number, and `1` no text."""

    model_config = ConfigDict(strict=True, extra="ignore")


class TeiRerank(Form):
    """text-embeddings-inference's /rerank."""

    query: Turns = Field(description=CONTEXT)
    texts: list[str]
    truncate: bool | None = None
    raw_scores: bool | None = None
    return_text: bool | None = None
    top_n: int | None = Field(None, ge=0, description="Not the original's, but some of its clients send it.")


class Rerank(Form):
    """Cohere's, Jina's, vLLM's and Infinity's."""

    query: Turns = Field(description=CONTEXT)
    documents: list[Document] = Field(description="Texts, or objects with a `text`.")
    model: str | None = None
    top_n: int | None = Field(None, ge=0, description="All, where it is left out or 0.")
    return_documents: bool | None = None
    rank_fields: list[str] | None = Field(None, description="Of documents that are objects, in place of `text`.")
    max_tokens_per_doc: int | None = Field(None, description="The first so many are read.")
    raw_scores: bool | None = None
    use_activation: bool | None = Field(None, description="false: raw scores.")

    def texts(self) -> list[str]:
        """The documents' texts.

        Raises:
            InvalidRequestError: one has none.
        """
        found = []
        for place, document in enumerate(self.documents):
            if isinstance(document, str):
                found.append(document)
                continue
            parts = [document.get(name) for name in self.rank_fields or ["text"]]
            if not all(isinstance(part, str) for part in parts):
                expected = " and ".join(self.rank_fields or ["text"])
                raise InvalidRequestError(f"documents[{place}] is an object without a text in {expected!r:.80}.")
            found.append("\n".join(map(str, parts)))
        return found


class Score(Form):
    """vLLM's /score: one context with each candidate, or pairs. A list of texts is several contexts here."""

    model: str | None = None
    queries: Any = None
    documents: Any = None
    items: Any = None
    text_1: Any = None
    text_2: Any = None
    data_1: Any = None
    data_2: Any = None
    use_activation: bool | None = Field(None, description="true: scores between 0 and 1.")

    def sides(self) -> tuple[list[Any], list[Any]]:
        """Contexts and candidates, as many of each, or one context.

        Raises:
            InvalidRequestError: none or several of the pairs of fields, or other numbers.
        """
        named = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))
        given = [pair for pair in named if all(getattr(self, name) is not None for name in pair)]
        fields = {name for name, value in self if value is not None} - {"model", "use_activation"}
        if len(given) != 1 or len(fields) != 2:
            pairs = ", ".join(f"{one} and {other}" for one, other in named)
            raise InvalidRequestError(f"Give one pair of fields: {pairs}.")
        contexts, candidates = (getattr(self, name) for name in given[0])
        if is_single_context(contexts):
            contexts = [contexts]
        candidates = [candidates] if isinstance(candidates, str) else candidates
        if not isinstance(contexts, list) or not isinstance(candidates, list) or not contexts or not candidates:
            one, other = given[0]
            raise InvalidRequestError(f"{one} is a text or a list of contexts, {other} a text or a list of texts.")
        if len(contexts) not in (1, len(candidates)):
            raise InvalidRequestError(
                f"{len(contexts)} of {given[0][0]} and {len(candidates)} of {given[0][1]}: expected one, or as many."
            )
        return contexts, candidates


class SimilarityInputs(Form):
    """One text and those it is compared with."""

    source_sentence: Turns = Field(description=CONTEXT)
    sentences: list[str]


class SimilarityParameters(Form):
    """Of text-embeddings-inference."""

    truncate: bool | None = None
    prompt_name: str | None = None


class Similarity(Form):
    """text-embeddings-inference's, and the Hub's task sentence-similarity."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class Embed(Form):
    """text-embeddings-inference's, and the Hub's task feature-extraction."""

    inputs: str | list[Any]
    truncate: bool | None = None
    prompt_name: str | None = Field(None, description='"query" for contexts; candidates otherwise.')
    normalize: bool | None = None
    dimensions: int | None = None


class Embeddings(Form):
    """OpenAI's."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    input_type: str | None = Field(None, description='"query" for contexts; candidates otherwise.')


class Search(Form):
    """The best candidates of the index for a context."""

    context: Turns = Field(description=CONTEXT)
    top_k: int = Field(10, ge=1, le=10_000)
    filter: str | None = Field(None, description="A condition in SQL on the candidates' columns.")
    certify: bool = Field(False, description="An answer that is proven, at any rate.")
    engine: Literal["exact", "ann", "milvus"] | None = None


class Candidates(Form):
    """Candidates to add or change: objects with `id`, `text` and metadata."""

    candidates: list[dict[str, Any]] = Field(min_length=1)


class Deletion(Form):
    """Which to delete."""

    ids: list[str | int] | None = None
    filter: str | None = Field(None, description="A condition in SQL.")


AnyForm = TypeVar("AnyForm", bound=Form)


async def read_json(request: Request) -> dict[str, Any]:
    """A request's body.

    Raises:
        InvalidRequestError: it is no JSON object, or a field comes twice.
    """
    body = await request.body()
    try:
        found = json.loads(body, object_pairs_hook=_without_doubles, parse_constant=_no_number)
    except RecursionError:
        raise InvalidRequestError("The body's JSON is nested too deeply.") from None
    except ValueError as error:
        raise InvalidRequestError(f"The body is no valid JSON: {error}.") from None
    if not isinstance(found, dict):
        raise InvalidRequestError(f"The body is a JSON {type(found).__name__}; expected an object.")
    return found


def checked(body: dict[str, Any], form: type[AnyForm]) -> AnyForm:
    """A body as a form.

    Raises:
        InvalidRequestError: says which field is how, and what was expected.
    """
    try:
        return form.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        first = problems[0]
        names = [str(part) for part in first["loc"]]
        # Of a field of several forms, each has its own problem: what is said is what all of them are.
        field = names[0] if names else "the body"
        rest = [p for p in problems if p["loc"][:1] == first["loc"][:1]]
        what = first["msg"] if len(rest) == 1 else " or ".join(dict.fromkeys(p["msg"] for p in rest[:3]))
        where = ".".join(names) if len(rest) == 1 else field
        raise InvalidRequestError(f"{where}: {what}.") from None


async def read_form(request: Request, form: type[AnyForm]) -> AnyForm:
    """A request's body as a form."""
    return checked(await read_json(request), form)


def described(*forms: type[Form]) -> dict[str, Any]:
    """For the OpenAPI pages: what a route's body is."""
    schemas = [form.model_json_schema() for form in forms]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise InvalidRequestError(f"The field {double!r:.60} comes twice.")
    return found


def _no_number(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is no JSON number.")
