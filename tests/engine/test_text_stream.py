"""Text of a request as it comes: never more than is certain, never less, and never past a stop string."""

from typing import Any

import numpy as np

from dspark_jax.engine.request import TextStream


def test_text_is_shown_as_far_as_it_is_certain(byte_tokenizer: Any) -> None:
    """Against the definition: the text up to the earliest stop string, known at the first token that completes it.

    Characters end in later tokens, stop strings begin in one token and end in another, or in the middle of one.
    """
    tokenizer, rng = byte_tokenizer, np.random.default_rng(0)
    stopped = 0
    for trial in range(1500):
        stops = [["abc", "cab"], ["é"], ["bb\n", "b b"], ["aba", "ab"], []][trial % 5]
        ids = rng.integers(0, 12, 12).tolist()
        stream, shown, used = TextStream(tokenizer, stops), "", len(ids)
        for number, token in enumerate(ids):
            shown += stream.push(token)
            text = tokenizer.decode(ids[: number + 1])
            assert text.rstrip("\ufffd").startswith(shown.rstrip("\ufffd"))
            assert not any(stop in shown for stop in stops)
            if stream.stopped:
                used = number + 1
                break
        else:
            shown += stream.flush()
        text = tokenizer.decode(ids)
        ends = [text.find(stop) for stop in stops if stop in text]
        assert shown == (text[: min(ends)] if ends else text)
        if ends:
            stopped += 1
            before = tokenizer.decode(ids[: used - 1])
            assert not any(stop in before for stop in stops)
    assert stopped > 300


def test_held_back_text_is_the_shortest_possible(byte_tokenizer: Any) -> None:
    stream = TextStream(byte_tokenizer, ["abc"])
    ids = [byte_tokenizer.pieces.index(piece) for piece in (b"c", b"ab", b"ab", b"c")]
    assert [stream.push(token) for token in ids] == ["c", "", "ab", ""]
    assert stream.stopped
    stream = TextStream(byte_tokenizer, ["abc"])
    assert [stream.push(2), stream.flush()] == ["", "ab"]
