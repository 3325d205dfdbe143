"""Parameter-efficient fine-tuning of convolutional detectors: LieRA, an extension of MMDetection.

Importing the package registers ``LieRAConvNeXt``, ``LieRABackbone`` and ``LieRAHook`` in MMEngine's root registries.
"""
from . import compat

compat.versions.check()
compat.install()

from .core.adapt import adapt  # noqa: E402
from .core.adapters import adapter_state_dict, adapters_off, combine, set_adapter  # noqa: E402
from .core.checkpoint import load_adapter, save_adapter  # noqa: E402
from .core.merging import export, merge, merge_and_unload, unmerge  # noqa: E402
from .core.report import layer_reports, range_report  # noqa: E402
from .core.summary import summary  # noqa: E402
from .engine import LieRAHook  # noqa: E402
from .models import LieRABackbone, LieRAConvNeXt  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    '__version__', 'LieRABackbone', 'LieRAConvNeXt', 'LieRAHook', 'adapt', 'adapter_state_dict', 'adapters_off',
    'combine', 'export', 'layer_reports', 'load_adapter', 'merge', 'merge_and_unload', 'range_report', 'save_adapter',
    'set_adapter', 'summary', 'unmerge'
]
