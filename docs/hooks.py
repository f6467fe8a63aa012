"""The site's navigation, and the pages that lie outside this folder; read by mkdocs."""

import json
import re
from pathlib import Path
from typing import Any

import notebook
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"README.md": "overview.md", "CONTRIBUTING.md": "contributing.md"}
OUTSIDE |= {"CHANGELOG.md": "changelog.md", "records/README.md": "records.md"}
SECTIONS = {
    "Start": ["index", "overview", "quickstart"],
    "How to": ["shipping", "integrations", "compare", "restore", "notebook", "coming-from"],
    "Explanation": ["method", "quantization", "reproduction", "records"],
    "Deployment": ["deployment", "mobile", "benchmarking", "performance", "scaling"],
    "Reference": ["recipes", "reference/recipe", "reference/api", "data", "ecosystem"],
    "Project": ["contributing", "changelog"],
}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Every page that exists, in this order; what is not named here goes to the end."""
    docs = Path(config.docs_dir)
    there = {str(p.relative_to(docs).with_suffix("")) for p in docs.rglob("*.md")}
    there |= {name.removesuffix(".md") for name in OUTSIDE.values()} | {"notebook"}
    named = {page for pages in SECTIONS.values() for page in pages}
    sections = SECTIONS | {"More": sorted(there - named)}
    nav: list[Any] = [
        {title: [f"{page}.md" for page in pages if page in there]}
        for title, pages in sections.items()
    ]
    config.nav = [section for section in nav if next(iter(section.values()))]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Bring the pages from outside in, under names of their own, and the notebook as a page."""
    for source, name in OUTSIDE.items():
        text = (ROOT / source).read_text("utf-8")
        files.append(File.generated(config, name, content=_moved(text, source)))
    page, pictures = notebook.page_of(json.loads(notebook.PATH.read_text("utf-8")))
    for path, content in {"notebook.md": page, **pictures}.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Links out of this folder lead to the page that was brought in, or lose their link."""
    if page.file.src_uri != "notebook.md":
        markdown = markdown.replace("(notebook.ipynb)", "(notebook.md)")
    if page.file.src_uri in OUTSIDE.values():
        return markdown
    for source, name in OUTSIDE.items():
        markdown = markdown.replace(f"(../{source}", f"({name}")
    return re.sub(r"\[([^\]]+)\]\(\.\./(?!reference|recipe)[^)]*\)", r"\1", markdown)


def _moved(text: str, source: str) -> str:
    """What `source` says, with its links as seen from this folder."""
    text = text.replace("(docs/", "(").replace('src="docs/', 'src="')
    for other, name in OUTSIDE.items():
        text = text.replace(f"({other})", f"({name})")

    def kept(match: re.Match[str]) -> str:
        label, link = match.groups()
        inside = link.startswith(("http", "#")) or (ROOT / "docs" / link.partition("#")[0]).exists()
        return match[0] if inside or link in OUTSIDE.values() else label

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)]+)\)", kept, text)
