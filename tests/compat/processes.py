"""Fresh interpreters."""
import os
import subprocess
import sys

from liera_mm import compat


def run_python(code, *path):
    """Run code in a fresh interpreter that can ``import compat``, with more folders in front of its path."""
    code = ('import importlib.util as u, sys; spec = u.spec_from_file_location("compat", sys.argv[1]); '
            'sys.modules["compat"] = compat = u.module_from_spec(spec); spec.loader.exec_module(compat)\n' + code)
    paths = os.pathsep.join([*map(str, path), os.environ.get('PYTHONPATH', '')])
    return subprocess.run([sys.executable, '-c', code, compat.__file__], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': paths})


def check_python(code, *path):
    result = run_python(code, *path)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fake_transformers(folder, version):
    (folder / f'transformers-{version}.dist-info').mkdir()
    (folder / f'transformers-{version}.dist-info/METADATA').write_text(
        f'Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n')
    (folder / 'transformers.py').touch()
