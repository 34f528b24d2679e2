"""How a service is set up."""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from poly_encoders.modeling.text_poly_encoder import checked_count

VARIABLE = "POLY_ENCODERS_SERVE"  # in the environment of worker processes: these options, without the key
KEY_VARIABLE = "POLY_ENCODERS_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """What a service serves, and its bounds.

    Attributes:
        model: A saved model of any of the three kinds, a folder or a Hub id.
        index: The folder of an index of candidates, for /search and /candidates.
        milvus: The address of a Milvus that the index is searched in.
        device: Where the model runs.
        api_key: What clients must send as `Authorization: Bearer ...`.
        max_documents: Of a request.
        max_characters: Of one text. What the model does not read of it is cut off.
        max_body_bytes: Of a request.
        max_batch_tokens: Encoded together.
        max_waiting: Requests in the queue; more are told to come again.
        max_waiting_tokens: Of these together.
        cache_bytes: For candidates' vectors.
        timeout: Seconds for a request, its wait included.
    """

    model: str
    index: str | None = None
    milvus: str | None = None
    device: str | None = None
    api_key: str | None = field(default=None, repr=False)
    max_documents: int = 10_000
    max_characters: int = 200_000
    max_body_bytes: int = 64 * 2**20
    max_batch_tokens: int = 16_384
    max_waiting: int = 512
    max_waiting_tokens: int = 2_000_000
    cache_bytes: int = 128 * 2**20
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.startswith("max_"):
                checked_count(value, name)
        checked_count(self.cache_bytes, "cache_bytes", least=0)
        if not self.timeout > 0:
            raise ValueError(f"timeout is a number of seconds above 0, not {self.timeout!r}.")
        if self.milvus is not None and self.index is None:
            raise ValueError("milvus is where an index is searched: give --index as well.")
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("The API key is empty. Leave it out for a service without one.")

    def environment(self) -> dict[str, str]:
        """What a worker process needs to make the same."""
        options: dict[str, Any] = asdict(self)
        key = options.pop("api_key")
        return {VARIABLE: json.dumps(options), **({KEY_VARIABLE: key} if key else {})}

    @classmethod
    def from_environment(cls) -> "ServeOptions":
        return cls(**json.loads(os.environ[VARIABLE]), api_key=os.environ.get(KEY_VARIABLE))
