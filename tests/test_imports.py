"""Lower files never import upper ones, and the core knows only torch."""
import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / 'liera_mm'
# From low to high: each imports only those before it
CORE = ['errors', 'text', 'factors', 'perturbation', 'group', 'wrappers', 'kernels', 'algebra', 'reading', 'layers',
        'targets', 'adapted', 'summary', 'merging', 'adapt', 'adapters', 'card', 'checkpoint', 'report', 'extract']
PACKAGES = ['version', 'core', 'compat', 'models', 'engine']


def imports(path):
    """Dotted names of all that a file imports, relative ones resolved, imports inside functions too."""
    package = path.relative_to(PACKAGE.parent).with_suffix('').parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = '.'.join(package[:len(package) - node.level + 1]) if node.level else ''
            module = '.'.join(filter(None, [prefix, node.module]))
            yield from [module] if node.module else (f'{module}.{alias.name}' for alias in node.names)


def imported_layers(path, package):
    """Which children of a package, as 'liera_mm.core', a file imports."""
    return {name[len(package) + 1:].split('.')[0] for name in imports(path) if name.startswith(package + '.')}


@pytest.mark.parametrize('path', sorted((PACKAGE / 'core').rglob('*.py')), ids=lambda path: path.stem)
def test_the_core_knows_only_torch(path):
    known = {'liera_mm', 'torch', 'numpy', 'safetensors', 'triton', *sys.stdlib_module_names}
    assert {name.split('.')[0] for name in imports(path)} <= known
    assert imported_layers(path, 'liera_mm') <= {'core', 'version'}
    layer = path.relative_to(PACKAGE / 'core').parts[0].removesuffix('.py')
    if layer != '__init__':
        assert imported_layers(path, 'liera_mm.core') <= set(CORE[:CORE.index(layer) + 1])


@pytest.mark.parametrize('package', PACKAGES[1:])
def test_packages_import_lower_ones(package):
    for path in (PACKAGE / package).rglob('*.py'):
        assert imported_layers(path, 'liera_mm') <= set(PACKAGES[:PACKAGES.index(package) + 1]), path
