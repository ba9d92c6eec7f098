"""The built site: complete, the same as GitHub shows, nothing from the network, nothing wider than a telephone."""

import ast
import functools
import html
import http.server
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import threading
from collections import Counter
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import formulas
import markdown
import pytest
from markdown_it import MarkdownIt
from mkdocs.config import load_config

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
HTML = sorted(SITE.glob("**/*.html"))
PAGES = [
    page for name in ("README", "CHANGELOG", "CONTRIBUTING", "docs/**/*") for page in sorted(ROOT.glob(f"{name}.md"))
]
MODULES = [
    "batchnorm",
    "graphs",
    "losses",
    "schedules",
    "sharpness",
    "integrations.lightning",
    "integrations.transformers",
]
CHROMIUM = shutil.which("chromium")
WIDTH = 390
"""Of a telephone, in CSS pixels."""
SECONDS = 300
"""More than a browser takes for all pages, on a busy machine."""


# ---- the reference


def public(module):
    """The names of ``__all__``, or what is written in the module and has no underscore."""
    path = ROOT / "bsam_fused" / Path(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    defined = (node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    return [name for name in defined if not name.startswith("_")]


def test_every_public_name_is_in_the_reference_once():
    """`Sharpness`, which two modules have, is in the page of one."""
    expected = [f"bsam_fused.{name}" for name in public(".") if name != "Sharpness"]
    expected += [f"bsam_fused.{module}" for module in MODULES if "." in module]
    expected += [f"bsam_fused.{module}.{name}" for module in MODULES for name in public(module)]
    text = "".join(page.read_text() for page in HTML)
    there = Counter(re.findall(r'<h\d id="(bsam_fused\.[^"]+)"', text))
    assert {name: there[name] for name in expected} == dict.fromkeys(expected, 1)


def test_options_in_common_are_said_in_full():
    """And the exceptions; what differs follows."""
    text = words(SITE / "api" / "optimizers.html")
    optimizers = {name for name in public(".") if name.endswith("SAM")}
    assert len(optimizers) == 8
    for said in (
        "whether dropout, drop-path and augmentation draw the same in all passes of a step, and go on",
        "a backend asked for by name that cannot be had, with the reason.",
    ):
        assert text.count(said) == len(optimizers)
    assert "not with a GradScaler. None: ρ alone. Here: ρ_min is cut in the same ratio as ρ." in text
    assert not [page for page in SITE.glob("api/*.html") if re.search(r"– as \w+ has it", words(page))]


def words(page):
    return " ".join(re.sub(r"<[^>]+>", "", html.unescape(page.read_text())).split())


# ---- the pages


class Seen(HTMLParser):
    """Elements and words of a page, in their order; not those in which one renderer wraps what another does not."""

    WRAPPERS = frozenset({"p", "span", "div", "thead", "tbody"})

    def __init__(self, page):
        super().__init__()
        self.seen, self.in_permalink = [], False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.in_permalink = ("class", "headerlink") in attrs
        if tag not in self.WRAPPERS and not self.in_permalink:
            self.seen.append(f"<{tag}>")

    def handle_data(self, data):
        if not self.in_permalink:
            self.seen.append(re.sub(r"\s", "", data))

    def handle_endtag(self, tag):
        self.in_permalink = False


@pytest.fixture(scope="module")
def render():
    config = load_config(str(ROOT / "mkdocs.yml"))
    extensions = {"extensions": config.markdown_extensions, "extension_configs": config.mdx_configs}
    return lambda text: markdown.Markdown(**extensions).convert(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_is_what_github_shows(page, render):
    """Python-Markdown wants lists indented by four, and a blank line before them; GitHub does not."""
    text = re.sub(r"(\${1,2})[^$`]+\1", "formula", page.read_text())
    there = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert "".join(Seen(render(text)).seen) == "".join(Seen(there).seen)


def test_formulas_are_rendered(render):
    text = r"""| step | formula |
| --- | --- |
| ascent | $w_{\max} = \{\rho\} \tfrac{1}{2}$ for $5 < \lVert g\rVert^2$, $\min(a, b)$ |
"""
    page = formulas.on_page_content(render(text))
    assert page.count("<math") == page.count("</math>") == 3
    assert "<msub><mi>w</mi><mrow><mi>max</mi></mrow></msub>" in page
    assert "<mi>&#x003C1;</mi>" in page
    assert "<mo>&#x0003C;</mo>" in page
    assert '<msup><mo stretchy="false" lspace="0" rspace="0">&#x02016;</mo><mn>2</mn></msup>' in page
    assert "$" not in page
    assert "\\" not in page


@pytest.mark.parametrize("page", HTML, ids=lambda page: str(page.relative_to(SITE)))
def test_no_formula_is_left(page):
    assert "arithmatex" not in page.read_text()


# ---- in a browser

# A frame as wide as a telephone for each page, one after the other.
VISIT = """<body><script>
const visit = page => new Promise(done => {
  const frame = document.createElement("iframe");
  frame.style = "width: %(width)dpx; height: 800px";
  frame.onload = () => setTimeout(() => {
    const inside = frame.contentWindow, root = inside.document.documentElement;
    const loaded = inside.performance.getEntriesByType("resource").map(each => each.name);
    done({page, width: inside.innerWidth, scroll: root.scrollWidth, loaded});
    frame.remove();
  }, 50);
  frame.src = page;
  document.body.append(frame);
});
(async () => {
  const found = [];
  for (const page of %(pages)s) found.push(await visit(page));
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Site(http.server.SimpleHTTPRequestHandler):
    """The site, a page that visits all others, and a place to tell what it found."""

    visit, found = b"", queue.Queue()

    def do_GET(self):
        if self.path != "/visit":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.visit)

    def do_POST(self):
        self.found.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_):
        pass


@contextmanager
def browser(address, profile):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", f"--user-data-dir={profile}", address]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, start_new_session=True, **quiet) as process:
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.skipif(
    CHROMIUM is None and "BSAM_FUSED_BROWSER" not in os.environ, reason="needs chromium: apt-get install chromium"
)
def test_no_page_scrolls_sideways_or_loads_from_elsewhere(tmp_path, monkeypatch):
    """Of those that are not in the folders of the design, which are many, and text."""
    pages = [page.relative_to(SITE).as_posix() for folder in (SITE, SITE / "api") for page in folder.glob("*.html")]
    pages.remove("404.html")
    monkeypatch.setattr(Site, "visit", (VISIT % {"width": WIDTH, "pages": json.dumps(pages)}).encode())
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Site, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        with browser(f"{address}/visit", tmp_path / "profile"):
            found = Site.found.get(timeout=SECONDS)
        server.shutdown()
    assert [(each["page"], each["width"]) for each in found] == [(page, WIDTH) for page in pages]
    assert [each["page"] for each in found if each["scroll"] > WIDTH] == []
    loaded = {name for each in found for name in each["loaded"]}
    assert any(name.endswith(".css") for name in loaded)
    assert {name for name in loaded if not name.startswith(address)} == set()
