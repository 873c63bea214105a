"""A traced request as plain values, round by round: what the live page shows and what a recording of it holds.

    for event in events(engine.submit(prompt, max_new_tokens=100, trace=True), token_text):
        print(json.dumps(event))

The first event is round 0, the first token, which comes with the prompt. One event per round follows, then the end.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

from dspark_jax.engine.request import Piece, Request
from dspark_jax.tokenizer import Tokenizer

Event = dict[str, Any]

TokenText = Callable[[int], str]


def token_text(tokenizer: Tokenizer) -> TokenText:
    """Makes the text of one token; that of a token which is only a part of a character has a replacement character."""
    return lambda token: tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)


def events(request: Request, text_of: TokenText) -> Iterator[Event]:
    """The events of a request, as they come; leaving the iteration early does not cancel it.

    Args:
      request: submitted with `trace=True`.
      text_of: the text of a token.

    Yields:
      One event per round:
        round: 0 for the first token, which comes with the prompt; then 1, 2, ...
        seconds: since the event before; of round 0, since the request was submitted.
        drafted: [{id, text, confidence}], confidence in 0..1 that it is accepted if all before it are, or None; empty
          in a round without drafts.
        admitted: drafts that the target verified.
        accepted: drafts that were committed.
        next: {id, text} of the correction or the bonus token, or None after an accepted stop token.
        committed: tokens that became part of the answer; fewer than accepted + 1 where it ended.
        text: what the answer grew by; bytes that are no whole character yet come with a later round.
        rows: rows that the target computed in this round, for all requests.
        running: requests in this round.
        budget: verified tokens per request in this round, the anchors included.
      and in the end:
        done: True.
        finish_reason, error: as `RequestResult`.
        text: what was held back.
        rounds, accepted, admitted: totals.
        tau: accepted length, tokens per round, or None without a round.
        tokens: all committed tokens, the first one included.
        seconds: since the request was submitted.
        first_token_seconds: likewise, or None.
    """
    number, before, rest = 0, 0.0, ""
    for piece in request:
        if piece.round is None and not piece.tokens:  # what was held back by a request that was ended from outside
            rest += piece.text
            continue
        yield _round(piece, number, piece.seconds - before, text_of)
        number, before = number + 1, piece.seconds
    yield _end(request, rest)


def _round(piece: Piece, number: int, seconds: float, text_of: TokenText) -> Event:
    about: Event = {"round": number, "seconds": seconds, "committed": len(piece.tokens), "text": piece.text}
    entry = piece.round
    if entry is None:
        (first,) = piece.tokens
        none = {"drafted": [], "admitted": 0, "accepted": 0, "rows": 0, "running": 0, "budget": 0.0}
        return about | none | {"next": {"id": first, "text": text_of(first)}}
    confidence = [None] * len(entry.drafted) if entry.confidence is None else [*map(_chance, entry.confidence)]
    drafted = [
        {"id": token, "text": text_of(token), "confidence": chance}
        for token, chance in zip(entry.drafted, confidence, strict=True)
    ]
    follows = None if entry.next_token is None else {"id": entry.next_token, "text": text_of(entry.next_token)}
    return about | {
        "drafted": drafted,
        "admitted": entry.admitted,
        "accepted": entry.accepted,
        "next": follows,
        "rows": entry.rows,
        "running": entry.running,
        "budget": entry.scheduled / max(entry.running, 1),
    }


def _chance(logit: float) -> float:
    """A confidence logit as a probability."""
    return 1 / (1 + math.exp(-min(max(logit, -30.0), 30.0)))


def _end(request: Request, rest: str) -> Event:
    result = request.result()
    metrics = result.metrics
    return {
        "done": True,
        "finish_reason": result.finish_reason,
        "error": result.error,
        "text": rest,
        "rounds": metrics.rounds,
        "accepted": metrics.accepted,
        "admitted": metrics.admitted,
        "tau": metrics.emitted / metrics.rounds if metrics.rounds else None,
        "tokens": len(result.tokens),
        "seconds": metrics.total_seconds,
        "first_token_seconds": metrics.first_token_seconds,
    }
