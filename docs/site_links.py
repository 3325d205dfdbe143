"""A hook of mkdocs.yml: the site has what docs/ links to elsewhere in the repository, and the links lead there.

README.md becomes the first page, and a config or script that a page links to becomes a page that shows it. So the Markdown
has the links that work in the repository, and ``mkdocs build --strict`` finds those that lead nowhere.
"""
import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'(?<=\]\()(?![a-z]+:|#)([^)\s#]+)')
PAGES = {'README.md': 'index.md', 'CONTRIBUTING.md': 'contributing.md'}


def in_site(path):
    """Where the site has a file of the repository; both from their roots."""
    return PAGES.get(path) or (path[len('docs/'):] if path.startswith('docs/') else f'repository/{path}.md')


def in_repository(uri):
    """Where the repository has a page of the site, other than those that show a file."""
    return {uri: path for path, uri in PAGES.items()}.get(uri, f'docs/{uri}')


def resolve(link, page):
    """The file that a page of the repository links to, from the root."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def on_files(files, config):
    for path, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text()))
    pages = [in_repository(file.src_uri) for file in files.documentation_pages()]
    shown = {resolve(link, page) for page in pages for link in LINK.findall((ROOT / page).read_text())}
    for path in sorted(shown - PAGES.keys()):
        if not path.startswith('docs/') and (ROOT / path).is_file():
            code = f'# {path}\n\n```{Path(path).suffix[1:]}\n{(ROOT / path).read_text()}```\n'
            files.append(File.generated(config, in_site(path), content=code))


def on_page_markdown(markdown, page, **_):
    here = page.file.src_uri

    def rewrite(match):
        path = resolve(match[0], in_repository(here))
        return posixpath.relpath(in_site(path), posixpath.dirname(here) or '.') if (ROOT / path).is_file() else match[0]

    return markdown if here.startswith('repository/') else LINK.sub(rewrite, markdown)


def on_page_content(html, **_):
    return re.sub(':(?:func|meth|class|mod):(?=<code)', '', html)  # Sphinx's roles, which docstrings have
