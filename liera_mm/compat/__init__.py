"""The one place that knows about other packages' version trouble.

:func:`install` has to run before ``mmcv.ops``, ``mmdet.models`` or ``mmpretrain.models`` is imported;
``import liera_mm`` does that. This package imports none of them.
"""
from . import extension, versions


def install() -> None:
    """Make MMCV's operators and mmpretrain's models importable; calling it again changes nothing.

    - Where mmcv has no compiled ``mmcv._ext``, the operators of :mod:`ops` take its place; see :mod:`extension`.
    - With transformers 5 or later, mmpretrain's optional multimodal part is kept off; see :mod:`versions`.
    """
    extension.install()
    versions.install()
