"""Text with holes: the evaluation report and the model card, as Jinja templates in this folder."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

NOT_DEFINED = "–"


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values; an unknown one is an error, and HTML is escaped.

    Args:
      template: e.g. report.html.
      values: what the template reads.
    """
    return _environment().get_template(template).render(values)


@cache
def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dspark_jax", "templates"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": number, "range": number_range}
    return environment


def number(value: float | None, form: str, scale: float = 1) -> str:
    """`scale * value` in a format of Python; a dash for None and NaN."""
    return NOT_DEFINED if value is None or math.isnan(value) else format(scale * value, form)


def number_range(bounds: Sequence[float | None], form: str) -> str:
    """`LOW to HIGH`."""
    return " to ".join(number(bound, form) for bound in bounds)
