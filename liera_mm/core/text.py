"""How names, shapes and tables are put into words."""
import difflib
from os.path import commonprefix
from typing import Any, Iterable, List, Sequence


def table_lines(rows: Sequence[Sequence[str]]) -> List[str]:
    """Rows of cells as lines of text, the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def sizes(shape: Sequence[int]) -> str:
    """A shape as text: ``6 x 4 x 3 x 3``."""
    return ' x '.join(map(str, shape))


def some(names: Iterable[str]) -> str:
    """The first three of some names, and how many more there are."""
    names = sorted(names)
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '') if names else 'nothing'


def check_choice(what: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a ValueError, with the nearest of the choices, if a value is none of them."""
    if value not in list(choices):
        raise ValueError(f'unknown {what} {value!r}{nearest(str(value), choices)}; known: {", ".join(choices)}')


def nearest(word: str, choices: Sequence[str]) -> str:
    known = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.4)
    return f'; did you mean {known[close[0]]!r}?' if close else ''


def is_slip(word: str, other: str) -> bool:
    """Whether two words differ by a letter that one has more, or by two that are swapped; not by a digit, which counts."""
    start = len(commonprefix([word, other]))
    rests = word[start:], other[start:]
    shorter, longer = sorted(rests, key=len)
    swapped = shorter[:2] == longer[1::-1] and shorter[2:] == longer[2:]
    return word != other and (swapped or shorter == longer[1:]) and not longer[0].isdigit()
