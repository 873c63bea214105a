"""The token that fills a block after its anchor should be one that no text has."""

from dspark_jax.tokenizer import ChatTokenizer


def mask_warning(tokenizer: ChatTokenizer, mask: int, rows: int) -> str:
    """What is wrong with a mask token, in one line; empty if nothing is.

    The drafter learns its embedding as "to be drafted here". Where the same token is a part of texts, one embedding
    means two things.

    Args:
      tokenizer: of the target.
      mask: id of the mask token.
      rows: of the target's embedding, which may have more than the tokenizer has ids.
    """
    why = _in_texts(tokenizer, mask)
    if not why:
        return ""
    ids, special = tokenizer.get_vocab().values(), tokenizer.all_special_ids
    unused = [max(ids) + 1] if max(ids) + 1 < rows else [i for i in special if not _in_texts(tokenizer, i)]
    example = f", e.g. {unused[0]}" if unused else ""
    token = tokenizer.convert_ids_to_tokens(mask)
    return f"drafter.mask_token_id={mask} ({token!r}) is {why}; better is one that no text has{example}"


def _in_texts(tokenizer: ChatTokenizer, token_id: int) -> str:
    """Why texts have a token; empty if they have not."""
    if token_id not in tokenizer.get_vocab().values():
        return ""
    if token_id not in tokenizer.added_tokens_decoder:
        return "an ordinary token of the tokenizer"
    token = tokenizer.convert_ids_to_tokens(token_id)
    marker = token_id == tokenizer.eos_token_id or token in str(tokenizer.chat_template)
    return "a token that the chat template puts into conversations" if marker else ""
