"""What README, docs/, comments and docstrings name is there: files, names of Python, targets of links."""
import pkgutil
import re
from pathlib import Path

import mmengine.registry
import pytest

import liera_mm

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')]
# Not those that an f-string goes on with, nor those of the past
PATH = re.compile(
    r'(?<![\w/.-])(?:liera_mm|tools|tests|configs|docs)/[\w*](?:[\w/*.-]*[\w/*])?(?![\w/*-]|\.\w|{|`? of commit)')
FILES = [*PAGES, ROOT / 'Makefile', *ROOT.glob('*.t*'), *(
    path for folder in ('liera_mm', 'tools', 'configs') for pattern in ('*.py', '*.sh')
    for path in (ROOT / folder).rglob(pattern))]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize('path', FILES, ids=name_of)
def test_what_a_file_names_exists(path):
    text = path.read_text()
    for name in PATH.findall(text):
        assert next(ROOT.glob(name), None), name
    for name in re.findall(r'\bliera_mm(?:\.[A-Za-z_]\w*)+\b(?!/)', text):
        pkgutil.resolve_name(name)


def test_contributing_says_what_to_touch():
    """Every name in a section's list is defined in a file that the section names."""
    for section in (ROOT / 'CONTRIBUTING.md').read_text().split('\n## ')[1:]:
        paths = [path for name in PATH.findall(section) for path in ROOT.glob(name) if path.is_file()]
        code = '\n'.join(path.read_text() for path in paths)
        names = re.findall(r'`(\w+)`', section)
        assert paths and names
        for name in names:
            assert re.search(rf'^ *(?:(?:def|class) {name}\b|{name}\b.* = )', code, re.M), (section, name)


def anchors(page):
    """What forges and the site call the headings of a page."""
    text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
    return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in re.findall('^#+ (.*)', text, re.M)}


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
        if not re.match('[a-z]+:', target):
            name, _, anchor = target.partition('#')
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in anchors(path), target


def test_pages_have_a_place_on_the_site():
    site = (ROOT / 'mkdocs.yml').read_text()
    for page in (ROOT / 'docs').rglob('*.md'):
        assert f' - {page.relative_to(ROOT / "docs").as_posix()}\n' in site, page


def test_the_api_has_what_is_public_or_registered():
    described = {line.split('.')[-1] for page in (ROOT / 'docs/api').glob('*.md') for line in page.read_text().splitlines()
                 if line.startswith('::: ')}
    registries = [value for value in vars(mmengine.registry).values() if isinstance(value, mmengine.registry.Registry)]
    registered = {name for registry in registries for name, cls in registry.module_dict.items()
                  if cls.__module__.startswith('liera_mm.')}
    assert len(registered) > 5 and registered | {*liera_mm.__all__} - {'__version__'} <= described
