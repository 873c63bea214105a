"""What is asked of a target's tokenizer: a part of what those of transformers have."""

from collections.abc import Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A fast tokenizer of transformers, or something that does the same."""

    def __call__(self, text: str, **options: Any) -> Any:
        """{"input_ids": [...], ...} of a text."""
        ...

    def decode(self, ids: Sequence[int], **options: Any) -> Any:
        """The text of token ids."""
        ...


class ChatTokenizer(Tokenizer, Protocol):
    """One with a chat template."""

    @property
    def eos_token_id(self) -> Any:
        """Token that ends an answer, or None."""
        ...

    @property
    def chat_template(self) -> Any:
        """Its text, or several by name."""
        ...

    @property
    def all_special_ids(self) -> list[int]:
        """Tokens that are no text."""
        ...

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """Tokens beside the model of the vocabulary, by id."""
        ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """A conversation as text."""
        ...

    def convert_ids_to_tokens(self, ids: Any, **options: Any) -> Any:
        """Names of tokens."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Ids by name."""
        ...

    def __len__(self) -> int:
        """Number of ids."""
        ...
