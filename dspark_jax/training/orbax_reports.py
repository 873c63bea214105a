"""One report of a failure of Orbax: the exception that is raised.

Orbax works in several threads and reports a failure in each of them: as log records with tracebacks, as asyncio
complaints, as exceptions that nobody can catch of file callbacks and coroutines, and at last as the exception that we
handle. Only that one is of use, so the others are dropped here, and nothing but them.
"""

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

_LOGGERS = ("absl", "asyncio")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops Orbax's other reports of a failure inside. After one they stay dropped: the last ones come late.

    They come when Python collects what was left unfinished: after this block, and after one around it that ends well.
    """
    dropping_before = _Dropping.hook is not None
    if not dropping_before:
        _Dropping.start()
    try:
        yield
    except BaseException:
        _Dropping.stays = True
        raise
    if not dropping_before and not _Dropping.stays:
        _Dropping.stop()


class _Dropping:
    """What this process does now.

    Attributes:
      hook: what takes the other exceptions that nobody can catch; None while nothing is dropped.
      stays: whether something has failed.
    """

    hook: Callable[[Any], Any] | None = None
    stays = False

    @classmethod
    def start(cls) -> None:
        cls.hook = sys.unraisablehook
        sys.unraisablehook = _without_orbax
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_is_not_orbax_error)

    @classmethod
    def stop(cls) -> None:
        if cls.hook is not None:
            sys.unraisablehook, cls.hook = cls.hook, None
        cls.stays = False
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(_is_not_orbax_error)


def _without_orbax(unraisable: Any) -> None:
    code = getattr(unraisable.object, "cr_code", None)  # of a coroutine that nobody waited for
    ours = str(unraisable.exc_value) != "Event loop is closed" and "orbax" not in getattr(code, "co_filename", "")
    if ours and _Dropping.hook is not None:
        _Dropping.hook(unraisable)


def _is_not_orbax_error(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR:
        return True
    raised_in = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
    texts = (record.pathname, record.getMessage(), *(at.filename for at in raised_in))
    return not any(word in text for word in ("orbax", "tensorstore", "OCDBT") for text in texts)
