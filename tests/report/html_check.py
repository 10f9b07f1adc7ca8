"""What is wrong with a page that must stand alone: as a browser's parser would see it, which mends in silence."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

from PIL import Image

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
BLOCK = {"address", "article", "details", "div", "dl", "fieldset", "figure", "footer", "form", "h1", "h2", "h3", "h4"}
BLOCK |= {"header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "ul"}
INSIDE = {"tr": {"table", "tbody", "thead", "tfoot"}, "td": {"tr"}, "th": {"tr"}, "li": {"ul", "ol"}}
INSIDE |= {"summary": {"details"}, "figcaption": {"figure"}, "dt": {"dl", "div"}, "dd": {"dl", "div"}}
RUNS = {"script", "iframe", "object", "embed", "form", "base", "frame", "applet", "noscript"}
ONCE = ("html", "head", "body", "title", "main")
REFERENCE = re.compile(r"&(?!(?:[a-zA-Z][a-zA-Z0-9]*|#[0-9]+|#x[0-9a-fA-F]+);)")
PLACES = ("src", "href", "xlink:href", "action", "srcset", "poster", "data", "formaction", "background")


class Page(HTMLParser):
    """Reads a page strictly. `faults` says what is wrong with it, `tags` what it holds, `texts` what it says."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.faults, self.texts = list[str](), list[str]()
        self.tags = list[tuple[str, dict[str, Any]]]()
        self._open: list[str] = []
        self.feed(page)
        self.close()
        self._whole(page)

    def fault(self, what: str) -> None:
        self.faults.append(f"line {self.getpos()[0]}: {what}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._element(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID and "svg" not in (tag, *self._open):
            self.fault(f"<{tag}/> does not close itself")
        self._element(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self.fault(f"</{tag}> inside {'/'.join(self._open[-3:])}")
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.texts.append(data)
        if data.strip() and self._open[-1:] in ([], ["html"], ["head"], ["table"], ["tr"], ["ul"]):
            self.fault(f"text {data.strip()[:30]!r} in {self._open[-1:] or 'nothing'}")

    def handle_comment(self, data: str) -> None:
        self.fault(f"a comment: {data[:30]!r}")

    def unknown_decl(self, data: str) -> None:
        self.fault(f"a declaration: {data[:30]!r}")

    def handle_pi(self, data: str) -> None:
        self.fault(f"an instruction: {data[:30]!r}")

    def _element(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        found = dict(attrs)
        self.tags.append((tag if "svg" not in self._open else f"svg {tag}", found))
        if len(names) != len(found):
            self.fault(f"<{tag}> has an attribute twice: {names}")
        if tag in RUNS or any(name.startswith("on") for name in names):
            self.fault(f"<{tag} {names}> can run")
        if tag in BLOCK and "p" in self._open:
            self.fault(f"<{tag}> closes the <p> around it")
        if tag in INSIDE and self._open[-1] not in INSIDE[tag]:
            self.fault(f"<{tag}> in <{self._open[-1]}>")
        if tag in ("a", "button", "label") and tag in self._open:
            self.fault(f"<{tag}> in <{tag}>")
        if tag == "img" and "alt" not in found:
            self.fault("<img> without alt")
        for name in PLACES:
            if name in found and not (found[name] or "").startswith(("data:", "#")):
                self.fault(f"<{tag} {name}={str(found[name])[:40]!r}> is fetched")
        if re.search(r"url\(|@import|expression\(|javascript:", str(found.get("style"))):
            self.fault(f"<{tag} style={found['style']!r}>")
        if tag == "img":
            self._picture(str(found.get("src")))

    def _picture(self, source: str) -> None:
        kind, _, data = source.partition(",")
        try:
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=("PNG",)) as picture:
                picture.load()
        except (OSError, binascii.Error, ValueError) as error:
            self.fault(f"<img> is no picture: {error}")
        if kind != "data:image/png;base64":
            self.fault(f"<img src={kind[:40]!r}>")

    def _whole(self, page: str) -> None:
        count = Counter(tag for tag, _ in self.tags)
        self.faults += [f"{self._open} not closed"] if self._open else []
        self.faults += [f"{count[tag]} <{tag}>" for tag in ONCE if count[tag] != 1]
        self.faults += [] if page.startswith("<!doctype html>\n<html lang=") else ["no doctype or language in front"]
        ids = Counter(found["id"] for _, found in self.tags if "id" in found)
        self.faults += [f"id {name!r} {times} times" for name, times in ids.items() if times > 1]
        wanted = [str(found[name]) for _, found in self.tags for name in ("for", "aria-labelledby") if name in found]
        wanted += [f["href"][1:] for _, f in self.tags if str(f.get("href")).startswith("#")]
        self.faults += [f"no id {name!r}" for name in wanted if name not in ids]
        style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
        if style is not None and re.search(r"url\(|@import|expression\(|</?[a-z]", style[1]):
            self.faults.append("the style fetches something, or holds a tag")
        self.faults += [f"a bare &: {page[at.start() :][:20]!r}" for at in REFERENCE.finditer(page)]
        rule = next((f["content"] for _, f in self.tags if f.get("http-equiv") == "Content-Security-Policy"), "")
        if "default-src 'none'" not in rule or "http" in rule:
            self.faults.append(f"the page's rule lets something in: {rule!r}")
