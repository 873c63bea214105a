"""Does llama.cpp's converter know a target's tokenizer?

It tells a byte-level BPE by the ids of one sentence, and knows those of many models; one with a vocabulary of its own
is refused ("BPE pre-tokenizer was not recognized"), even if it splits text as Qwen's does. Then it can be told so.
"""

import hashlib
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from dspark_jax.json_file import read_object

_REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)" + _REST
"""How Qwen's tokenizers split text."""
EMBEDDED_SPLIT = r"'(?i:[sdmt]|ll|ve|re)" + _REST
"""The same in other words, those of the embedded target's tokenizer."""
SENTENCE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ "
    "🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, "
    "'D you like some tea? We'Ve a'lL"
)
"""What the converter has a tokenizer encode."""
KNOWN = (
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c",  # Qwen3
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea",  # Qwen1.5 and Qwen2
)
"""SHA-256 of the ids of tokenizers that split like Qwen's and are known to it."""


def split_to_tell(target: Path) -> str:
    """By which name the converter has to be told how a target's tokenizer splits; empty if it knows, or it is not known
    here.

    Args:
      target: the directory of the target.
    """
    file = target / "tokenizer.json"
    if not file.exists() or _pattern(read_object(file, "", "download it again")) not in (QWEN2_SPLIT, EMBEDDED_SPLIT):
        return ""
    ids = Tokenizer.from_file(str(file)).encode(SENTENCE).ids
    return "" if hashlib.sha256(str(ids).encode()).hexdigest() in KNOWN else "qwen2"


def _pattern(raw: Any) -> str:
    """The regular expression by which a byte-level BPE splits text; empty for other tokenizers."""
    parts = (raw.get("pre_tokenizer") or {}).get("pretokenizers") or [{}]
    return (parts[0].get("pattern") or {}).get("Regex", "")
