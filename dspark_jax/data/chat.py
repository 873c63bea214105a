"""Chat template: messages -> text -> tokens and loss mask. Pure functions of a tokenizer and messages.

Which characters of a rendered conversation an assistant wrote is found by rendering it a second time with that answer
replaced by a probe: what is equal before and after the probe belongs to the template. Nothing is searched for in the
token ids, and templates that treat the last turn differently from earlier ones (Qwen3 puts an empty thinking block
before the last answer only) need no special case. Token offsets then carry the spans over to tokens.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.config import InputError
from dspark_jax.data.messages import REASONING, THINK_END, Message
from dspark_jax.hub import local_directory
from dspark_jax.json_file import read_object
from dspark_jax.paths import bucket_url
from dspark_jax.tokenizer import ChatTokenizer
from dspark_jax.unicode import check_unicode

PROBE = "\u2400answer\u2400"
"""Replaces an answer; no template rewrites it and it must not occur in a conversation."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a chat template is told beside the messages.

    Attributes:
      thinking: the target is asked to think before it answers.
      tools: definitions of the functions that it may call.
    """

    thinking: bool = False
    tools: tuple[Mapping[str, Any], ...] = ()

    def arguments(self) -> dict[str, Any]:
        """Arguments of the template; families call thinking differently, and ignore each other's names."""
        named: dict[str, Any] = {"enable_thinking": self.thinking}
        if self.thinking:
            named["thinking"] = True
        if self.tools:
            named["tools"] = [dict(tool) for tool in self.tools]
        return named


PLAIN = Options()
"""Without thinking, as drafters are trained by default (paper, section 4), and without tools."""


class ChatError(InputError):
    """A conversation that this chat template cannot render so that its answers can be told from the rest."""

    reason = "template"
    """Under which it is counted."""


class ReasoningError(ChatError):
    """The same for an answer with a think block."""

    reason = "reasoning"


_EXPRESSIONS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What expressions of a template may raise, as those of Python do."""


def load_tokenizer(path: str | os.PathLike[str]) -> ChatTokenizer:
    """The tokenizer of a Hugging Face model directory.

    Raises:
      InputError: none is there, it gives no token offsets, or it has no chat template that is used by default.
    """
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        place = local_directory(path) if bucket_url(path) else path
        tokenizer = AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        tokenizer.decode(encode(tokenizer, "a")["input_ids"])  # some fields are not looked at before
    except Exception as error:
        # Of files with another structure transformers raises what their use happens to raise, and the tokenizers
        # library `Exception` itself; nothing of ours runs here.
        why = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
        raise InputError(f"{path}: no usable tokenizer ({why}); put tokenizer.json and its config there") from None
    if not tokenizer.is_fast:
        raise InputError(f"{path}: the tokenizer gives no character offsets; add its tokenizer.json")
    template = tokenizer.chat_template
    if not template:
        raise InputError(f"{path}: the tokenizer has no chat template; add `chat_template` to tokenizer_config.json")
    if isinstance(template, dict) and "default" not in template:
        names = ", ".join(map(repr, template))
        raise InputError(
            f"{path}: the tokenizer has the chat templates {names} and none for default; "
            "name the one for conversations 'default' in tokenizer_config.json, or put it into chat_template.jinja"
        )
    if not isinstance(template, str | dict):
        raise InputError(f"{path}: the tokenizer's chat_template is {template!r}; text in Jinja's language is needed")
    return tokenizer


def stop_tokens(path: str | os.PathLike[str], tokenizer: ChatTokenizer) -> tuple[int, ...]:
    """Ids that end an answer: those of `generation_config.json`, and the tokenizer's end-of-sequence token.

    Raises:
      InputError: `generation_config.json` cannot be read, or no such id is known.
    """
    file = local_directory(path) / "generation_config.json"
    found = read_object(file, "").get("eos_token_id") if file.exists() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for one in ids:
        if type(one) is not int or not 0 <= one < 2**31:
            raise InputError(f"{file}: eos_token_id {found!r}; a token id or a list of them is needed, correct it")
    if tokenizer.eos_token_id is not None:
        ids = [*ids, tokenizer.eos_token_id]
    if not ids:
        raise InputError(f"{path}: neither generation_config.json nor the tokenizer names an end-of-sequence token")
    return tuple(sorted(set(ids)))


def with_system(messages: Sequence[Message], system_prompt: str) -> tuple[Message, ...]:
    """`messages` with a system message in front, unless there is one or `system_prompt` is empty."""
    if not system_prompt or messages[0]["role"] == "system":
        return tuple(messages)
    return ({"role": "system", "content": system_prompt}, *messages)


def render(
    tokenizer: ChatTokenizer, messages: Sequence[Message], generation_prompt: bool = False, options: Options = PLAIN
) -> str:
    """Text of a conversation as the target sees it; with `generation_prompt`, up to where its next answer begins.

    Raises:
      ChatError: the template refuses the conversation (roles that it does not know, for instance), or fails on it.
      InputError: it is no template.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return tokenizer.apply_chat_template(
            [_of_template(message) for message in messages],
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **options.arguments(),
        )
    except TemplateSyntaxError as error:
        raise InputError(f"the chat template is not valid: line {error.lineno}: {error.message}; correct it") from None
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ChatError(f"the chat template refuses the roles {roles} ({error}); change the conversation") from None
    except _EXPRESSIONS as error:
        roles = ", ".join(message["role"] for message in messages)
        why = f"{type(error).__name__}: {error}"
        raise ChatError(f"the chat template fails on the roles {roles} ({why}); correct the template") from None


def _of_template(message: Message) -> dict[str, Any]:
    """A message with its thoughts under every name that templates look for."""
    thoughts = message.get("reasoning_content")
    return dict(message) if thoughts is None else {**message, **dict.fromkeys(REASONING, thoughts)}


def encode(tokenizer: ChatTokenizer, text: str, **options: Any) -> Any:
    """The tokenizer's encoding of rendered text: its special tokens are those in the text, of any length.

    Raises:
      InputError: the text is not Unicode (a system prompt in another encoding, for instance).
    """
    return tokenizer(check_unicode("the conversation", text), add_special_tokens=False, verbose=False, **options)


def prompt_tokens(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options = PLAIN) -> list[int]:
    """Ids after which the target writes its next answer. Special tokens come from the template only."""
    return encode(tokenizer, render(tokenizer, messages, generation_prompt=True, options=options))["input_ids"]


def answer_spans(
    tokenizer: ChatTokenizer, messages: Sequence[Message], generation_prompt: bool = False, options: Options = PLAIN
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered text, and per assistant message its [start, end) in characters.

    A span begins with the answer's first character (after `<|im_start|>assistant\\n` and whatever else the template
    writes there) and includes what closes the turn: `<|im_end|>` and the line break after it (trap 32).

    Raises:
      ChatError: the template does not keep what surrounds an answer (it rewrites or drops turns).
    """
    messages = list(messages)
    text = render(tokenizer, messages, generation_prompt, options)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        probed = [*messages[:i], {**message, "content": PROBE}, *messages[i + 1 :]]
        before, found, after = render(tokenizer, probed, generation_prompt, options).partition(PROBE)
        closing = turn_end(tokenizer, messages[:i], options)
        start, end = len(before), len(text) - len(after)
        kept = text.startswith(before) and text.endswith(after) and after.startswith(closing)
        if not found or PROBE in text or start > end or not kept:
            if THINK_END in message["content"]:
                raise ReasoningError(
                    f"message {i + 1}: has a think block, and the chat template, which is asked for answers without "
                    "thinking, shows it separately; set data.thinking=given, or take the block out (with "
                    "data.regenerate=True the target answers itself, without thinking)"
                )
            raise ChatError(
                f"message {i + 1}: the chat template does not show this assistant turn as it is in the conversation; "
                "use data.regenerate=True, or a template that leaves earlier turns alone"
            )
        spans.append((start, end + len(closing)))
    return text, spans


def thoughts_cut(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> bool:
    """Whether the template leaves out a think block that is part of the text of an answer."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    thoughts = [answer.partition(THINK_END)[0].strip() for answer in answers if THINK_END in answer]
    return bool(thoughts) and any(one not in render(tokenizer, messages) for one in thoughts)


def turn_end(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options = PLAIN) -> str:
    """What the template writes after an answer to `messages`, e.g. `<|im_end|>\\n`."""
    answered = [*messages, {"role": "assistant", "content": PROBE}]
    return render(tokenizer, answered, options=options).partition(PROBE)[2]


def tokens_and_mask(
    tokenizer: ChatTokenizer, messages: Sequence[Message], generation_prompt: bool = False, options: Options = PLAIN
) -> tuple[list[int], list[int]]:
    """Ids of a rendered conversation, and 1 for every token that an assistant wrote, in all of its turns.

    A token belongs to the text that its first character belongs to: one that spans the end of the template's text and
    the beginning of an answer was not the assistant's to write, and is not supervised.

    Returns:
      (ids, mask), equally long; the mask has the spans of `answer_spans`.

    Raises:
      ChatError: see `answer_spans`.
    """
    text, spans = answer_spans(tokenizer, messages, generation_prompt, options)
    return masked_tokens(tokenizer, text, spans)


def masked_tokens(tokenizer: ChatTokenizer, text: str, spans: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Ids of a text, and 1 for those whose first character is in one of the ascending `spans`."""
    encoded = encode(tokenizer, text, return_offsets_mapping=True)
    mask, span = [], 0
    for start, _ in encoded["offset_mapping"]:
        while span < len(spans) and start >= spans[span][1]:
            span += 1
        mask.append(int(span < len(spans) and start >= spans[span][0]))
    return encoded["input_ids"], mask


def answered_tokens(
    tokenizer: ChatTokenizer, messages: Sequence[Message], answer: Sequence[int], options: Options = PLAIN
) -> tuple[list[int], list[int]]:
    """Ids and loss mask of a conversation whose newest answer the target has just generated.

    The newest answer keeps the very ids that were generated: prompt ids + answer ids + what the template writes after
    the end-of-turn token. Tokenising the answer's text again can split it differently; the target, asked for its
    distribution at those ids, would then be taken to places where it never was while generating, and the drafter would
    learn to follow it there. Earlier answers are in the prompt as text, tokenised as the target read them when it
    wrote the newest one, so for them the offsets of the rendered prompt decide.

    An answer that ran into its length limit (its last token is not the one that ends a turn) is left open.

    Args:
      tokenizer: of the target.
      messages: up to and including the user message that is answered.
      answer: generated ids, with the stop token if there is one.
    """
    ids, mask = tokens_and_mask(tokenizer, messages, generation_prompt=True, options=options)
    written = [*answer, *after_stop(tokenizer, messages, answer, options)]
    return [*ids, *written], [*mask, *([1] * len(written))]


def after_stop(
    tokenizer: ChatTokenizer, messages: Sequence[Message], answer: Sequence[int], options: Options = PLAIN
) -> list[int]:
    """Ids that the template writes after a generated answer to `messages`; none if the answer does not end its turn."""
    closing = encode(tokenizer, turn_end(tokenizer, messages, options))["input_ids"]
    return closing[1:] if answer and closing[:1] == [answer[-1]] else []


def answer_text(tokenizer: ChatTokenizer, answer: Sequence[int]) -> str:
    """Text of generated ids, as it enters the history of the next turn: without special tokens."""
    return tokenizer.decode(list(answer), skip_special_tokens=True, clean_up_tokenization_spaces=False)
