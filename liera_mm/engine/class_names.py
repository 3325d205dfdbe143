"""Names of classes: those that a config cannot mean, and those that annotations have instead of them."""
import difflib
from typing import Any, Dict, Optional, Sequence

from ..core.errors import SetupError


def check_class_list(classes: Any) -> None:
    """Raise a SetupError if the classes of a config are a text, as ``('balloon')`` is, or none of them."""
    if isinstance(classes, str):
        raise SetupError(f'classes={classes!r} of metainfo is one text, of which each letter would be a class',
                         f'Write classes=({classes!r}, ), with the comma: a list of names')
    other = [name for name in classes if not isinstance(name, str)]
    if other:
        raise SetupError(f'classes of metainfo has {other[0]!r}, which is no text, and so the name of no category',
                         f'Write {str(other[0])!r}, with quotes')


def spelling(name: str) -> str:
    """A name without what is easily mistaken: capitals, spaces, and signs between words."""
    return ''.join(filter(str.isalnum, name)).casefold()


def check_spaces(path: str, classes: Sequence[str], counts: Dict[str, int]) -> None:
    """Raise a SetupError if objects would be lost because their name has other spaces than that of a class.

    Args:
        path: The file, for messages.
        classes: Names of the classes.
        counts: How many objects the file has of each name.
    """
    known = {tuple(name.split()): name for name in classes}
    for name, count in counts.items():
        meant = known.get(tuple(name.split()))
        if count and meant and name not in classes:
            raise SetupError(f'{path} has {count} objects of {name!r}, which is the class {meant!r} but for its spaces: '
                             'they would be lost', f'Call them {meant!r} in the annotations')


def nearest(name: str, names: Sequence[str]) -> Optional[str]:
    """That of the names which may be meant by one that is not among them."""
    same = [other for other in names if spelling(other) == spelling(name)]
    return next(iter(same + difflib.get_close_matches(name, names, n=1, cutoff=.7)), None)
