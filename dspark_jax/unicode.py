"""Text that comes from outside: bytes that are not UTF-8 arrive as lone surrogates, which no tokenizer can encode."""

from dspark_jax.errors import InputError


def check_unicode(name: str, text: str) -> str:
    """The text, if UTF-8 can encode it.

    Raises:
      InputError: it has a lone surrogate; `name` says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python turns the byte b of a command line or a stream that is not UTF-8 into U+DC00 + b.
        what = f"the byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"the lone surrogate U+{code:04X}"
        raise InputError(
            f"{name} is not UTF-8: it has {what} as its character {error.start}; convert it to UTF-8"
        ) from None
    return text
