"""JSON files that others wrote: an object, or one line about what is wrong."""

import json
from pathlib import Path
from typing import Any

from dspark_jax.errors import InputError


def read_object(path: Path, missing: str, damaged: str = "download it again") -> dict[str, Any]:
    """The content of a file that holds a JSON object.

    Args:
      path: the file.
      missing: what to do where there is no such file.
      damaged: what to do where it holds something else.

    Raises:
      InputError: it is missing, cannot be read, or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; {missing}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); {damaged}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid JSON (not UTF-8); {damaged}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {missing}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; {damaged}")
    return found
