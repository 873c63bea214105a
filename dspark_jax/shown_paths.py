"""What lines on the terminal call a place: a local folder that stands for one in a bucket has the bucket's address."""

_PLACES: dict[str, str] = {}


def name_place(folder: str, url: str) -> None:
    """From now on lines say `url` for `folder`."""
    _PLACES[folder] = url


def as_given(line: str) -> str:
    """A line with the places as the user knows them."""
    for folder in sorted(_PLACES, key=len, reverse=True):
        line = line.replace(folder, _PLACES[folder])
    return line
