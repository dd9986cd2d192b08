# SPDX-License-Identifier: Apache-2.0
"""What mkdocs does not do by itself for this repository: hooks of the site, and a reader of docstrings.

Pages link to files by their place in the repository, so that they can be read there. Of those files the site gets
copies: documents become pages like those of docs/, sources become pages with the code. Formulas become MathML, which
browsers draw without a script.
"""

from __future__ import annotations

import html
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
    "bench/README.md": "bench/README.md",
    "bench/results/README.md": "bench/results/README.md",
    "examples/README.md": "examples/README.md",
}
PICTURES = (".png", ".svg")

FENCE = re.compile(r"^(```+)[^\n]*\n.*?^\1$", re.DOTALL | re.MULTILINE)
CODE = re.compile(rf"{FENCE.pattern}|(`+)[^`]+\2", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!\w+:|#)(?P<path>[^)\s#]+)(?P<fragment>#[^)\s]*)?\)")
FORMULA = re.compile(r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL)
SESSION = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent).*\S.*)*", re.MULTILINE)
FUNCTION = r"\\(?:cos|exp|ln|log|sin|tanh)\b(?:_\w)?"  # set apart from letters around it, as TeX does
DISPLAY = re.compile(r"^(?P<indent> *)\.\. math::(?P<tex>.*\n?(?:(?P=indent) +\S.*\n?)*)", re.MULTILINE)


def path_of(page: str) -> str:
    """The place in the repository of a page of the site."""
    return next((path for path, uri in DOCUMENTS.items() if uri == page), f"docs/{page}")


def uri_of(path: str) -> str:
    """The place on the site of a file of the repository."""
    if path in DOCUMENTS:
        return DOCUMENTS[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return path if path.endswith(PICTURES) else f"source/{path}.md"


def target(page: str, link: str) -> str:
    """The place in the repository that a link on a page leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path_of(page)), link))


def source_page(path: str) -> str:
    try:
        language = get_lexer_for_filename(path).aliases[0]
    except ClassNotFound:
        language = "text"
    code = (ROOT / path).read_text(encoding="utf-8")
    return f"---\nsearch: {{exclude: true}}\nhide: [toc]\n---\n\n# {path}\n\n``````{language}\n{code}\n``````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path, uri in DOCUMENTS.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    for page in [file for file in files if file.is_documentation_page()]:
        for match in LINK.finditer(CODE.sub("", page.content_string)):
            path = target(page.src_uri, match["path"])
            if files.get_file_from_path(uri_of(path)) or not (ROOT / path).is_file():
                continue
            if path.endswith(PICTURES):
                files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
            else:
                files.append(File.generated(config, uri_of(path), content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    here = page.file.src_uri
    if here.startswith("source/"):
        return markdown

    def link(match: re.Match[str]) -> str:
        uri = posixpath.relpath(uri_of(target(here, match["path"])), posixpath.dirname(here) or ".")
        return f"]({uri}{match['fragment'] or ''})"

    pieces, end = [], 0
    for code in CODE.finditer(markdown):  # all but code
        pieces += [LINK.sub(link, markdown[end : code.start()]), code[0]]
        end = code.end()
    markdown = "".join([*pieces, LINK.sub(link, markdown[end:])])
    return re.sub(r"^```python .*$", "```python", markdown, flags=re.MULTILINE)  # what a block needs is for the tests


def on_page_content(html_text: str, **_: Any) -> str:
    def formula(match: re.Match[str]) -> str:
        tex = re.sub(rf"(?<=[\w}}])\s*(?={FUNCTION})", r"\\,", html.unescape(match["tex"]))
        tex = re.sub(rf"({FUNCTION})\s+(?=[\w\\])", r"\1\\,", tex)
        mathml = convert(tex, display="block" if match["tag"] == "div" else "inline")
        return re.sub(r"<mo>(min|max|&#x0221E;)</mo>", r"<mi>\1</mi>", mathml)  # no operators: they take no space

    return FORMULA.sub(formula, html_text)


class PlainMarkdown(griffe.Extension):
    """Docstrings have formulas and references in Sphinx's notation, as torch's do; the site is made from Markdown."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        objects = sorted(_objects(pkg), key=lambda obj: obj.path.count("."))
        paths: dict[str, str] = {}
        for obj in objects:  # the shortest path of a name is the public one
            if obj.is_module:
                continue
            paths.setdefault(obj.name, obj.path)
            paths.setdefault(f"{obj.parent.name}.{obj.name}" if obj.parent else obj.name, obj.path)

        def reference(match: re.Match[str]) -> str:
            name = re.sub(r"^torch_kernels\.(nn\.)?", "", match[1])
            return f"[`{match[1]}`][{paths[name]}]" if name in paths else f"`{match[1]}`"

        for obj in objects:
            if obj.docstring is not None:
                text = DISPLAY.sub(_display, obj.docstring.value)
                text = SESSION.sub(_session, text)
                text = re.sub(r":math:`([^`]+)`", r"$\1$", text)
                obj.docstring.value = re.sub(r":(?:func|class|meth):`([\w.]+)`", reference, text)


def _objects(parent: griffe.Object) -> Iterator[griffe.Object]:
    for obj in parent.members.values():
        if isinstance(obj, griffe.Object):
            yield obj
            yield from _objects(obj)


def _display(match: re.Match[str]) -> str:
    tex = " ".join(match["tex"].split())
    if r"\\" in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    return f"\n{match['indent']}$${tex}$$\n"


def _session(match: re.Match[str]) -> str:
    lines = re.sub(r" *# doctest: .*", "", match[0])
    return f"{match['indent']}```pycon\n{lines}\n{match['indent']}```"
