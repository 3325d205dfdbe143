"""Checks of images: before a training, of their files, and as they are read."""
import functools
import os
import os.path as osp
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from mmcv.transforms import LoadImageFromFile
from PIL import Image
from torch.utils.data import Dataset

from ..core.errors import SetupError
from .datasets import parts_of, some_of

ORIENTATION = 0x0112  # the tag in EXIF


def check_files(ann_file: str, folder: str, names: Sequence[str], what: str, remedy: str) -> None:
    """Raise a SetupError if files that an annotation file names, such as images, are not in their folder."""
    if '://' in folder:
        return
    listing = functools.cache(lambda path: set(os.listdir(path)) if osp.isdir(path) else set())
    missing = [name for name in names
               if osp.basename(name) not in listing(osp.dirname(osp.join(folder, name)))]
    if missing:
        raise SetupError(f'{len(missing)} of {len(names)} {what} of {ann_file} are missing, the first is '
                         f'{osp.join(folder, missing[0]):.300}', remedy)


def check_sizes(folder: str, images: Sequence[Dict[str, Any]], loader: Dict[str, Any]) -> None:
    """Compare the size of some images with the annotated one; :class:`CheckedLoading` does it for all as they are read."""
    turns = _turns(loader.get('color_type', 'color'), loader.get('imdecode_backend', 'cv2'))
    for image in some_of(images):
        path = osp.join(folder, image['file_name'])
        stored = _stored_size(path)
        if stored and turns is not None:
            (width, height), orientation = stored
            read = (height, width) if turns and orientation in range(5, 9) else (width, height)
            _check_size(path, (image['width'], image['height']), read)


def check_images(dataset: Dataset) -> None:
    """Have every image checked as it is loaded, by a :class:`CheckedLoading` around the first step of the pipelines."""
    for part in parts_of(dataset):
        steps = getattr(getattr(part, 'pipeline', None), 'transforms', [])
        steps[:] = [CheckedLoading(step) if isinstance(step, LoadImageFromFile) else step for step in steps]


class CheckedLoading:
    """Loads an image, and refuses one that cannot be read, or whose size is not the annotated one, by its name."""

    def __init__(self, load: Callable[[Dict[str, Any]], Optional[Dict[str, Any]]]):
        self.load = load

    def __call__(self, results: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        path = results['img_path']
        try:
            loaded = self.load(results)
        except Exception as error:  # each decoder has its own
            empty = osp.isfile(path) and not osp.getsize(path)
            reason = 'it is empty' if empty else ' '.join(str(error).replace(f': {path}', '').split())
            raise SetupError(f'{path} cannot be read as an image: {reason:.200}',
                             'Put an intact one there, or take it out of the annotations') from None
        annotated = results.get('width'), results.get('height')
        if loaded is not None and None not in annotated:
            _check_size(path, annotated, tuple(loaded['ori_shape'][::-1]))
        return loaded


def _turns(color_type: str, backend: Optional[str]) -> Optional[bool]:
    """Whether images are turned as their EXIF data say when they are read; None if that is not known."""
    known = (backend or 'cv2') in ('cv2', 'pillow')
    return not (color_type == 'unchanged' or color_type.endswith('ignore_orientation')) if known else None


def _stored_size(path: str) -> Optional[Tuple[Tuple[int, int], int]]:
    """Width and height of an image file, and its orientation; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size, image.getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError):
        return None


def _check_size(path: str, annotated: Tuple[int, int], read: Tuple[int, int]) -> None:
    """Raise a SetupError if an image that was read is not as large as annotated; say if EXIF is why."""
    if annotated == read:
        return
    stored = _stored_size(path)
    is_large = f'{path} is {read[0]}x{read[1]} pixels large, but annotated as {annotated[0]}x{annotated[1]}'
    if stored and stored[1] in range(5, 9) and annotated == read[::-1]:
        if read == stored[0]:
            raise SetupError(f'{is_large}: as if turned as its EXIF orientation, {stored[1]}, says',
                             "Have it turned: color_type='color' of LoadImageFromFile in the pipelines")
        raise SetupError(
            f'{is_large}: as it is stored, before it is turned as its EXIF orientation, {stored[1]}, says',
            "Have it read as stored: color_type='color_ignore_orientation' of LoadImageFromFile in the pipelines; or "
            'correct the annotations')
    raise SetupError(is_large, 'Put the image there that was annotated, or correct its annotations')
