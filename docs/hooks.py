"""Makes a site of pages that are read beside the code as well; mkdocs.yml names this file.

README, CONTRIBUTING and LOG become pages. Their links, and those of the other pages to files outside docs/, are
rewritten: to a page where the file is one, to a copy of a picture, else to the file at REPO_URL, or to no link where
that is not set. A link to a file that does not exist is a warning, which ends a strict build.
"""

import logging
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "LOG.md": "log.md"}
"""Pages that do not lie in docs/: file and its place in the site"""
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^\]\n]+)\]\((?P<to>(?!\w+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks.links")  # below "mkdocs", where a strict build counts warnings


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Adds the pages from outside docs/ and the pictures that any page shows."""
    for source, page in PAGES.items():
        # From here on every page counts as one of docs/, as far as its links go.
        text = LINK.sub(lambda link: link[0].replace(f"({link['to']}", f"(../{link['to']}"), _read(ROOT / source))
        files.append(File.generated(config, page, content=text.replace("](../docs/", "](")))
    for file in list(files.documentation_pages()):
        for link in LINK.finditer(file.content_string):
            target = _outside(link["to"])
            if link["picture"] and target and (ROOT / target).is_file() and not files.get_file_from_path(target):
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links that leave docs/."""

    def rewritten(link: re.Match[str]) -> str:
        target, anchor = _outside(link["to"]), link["anchor"] or ""
        if target is None:
            return link[0]
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, target)
        if target in PAGES:
            return f"[{link['text']}]({PAGES[target]}{anchor})"
        if link["picture"]:
            return f"![{link['text']}]({target})"
        return f"[{link['text']}]({config.repo_url}/blob/main/{target}{anchor})" if config.repo_url else link["text"]

    return LINK.sub(rewritten, markdown)


def _outside(link: str) -> str | None:
    """The path from the root of the repository, for a link out of docs/; None for any other."""
    return str(PurePosixPath(link[3:])) if link.startswith("../") else None


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
