"""The report's page in a real browser: no script error, all pictures there, nothing wider than the window."""

import json
import os
import re
import shutil
from pathlib import Path

import processes
import pytest
from rich.progress import Progress

from bsam_fused.report import learning, make, sweep, write
from bsam_fused.report.clock import HostClock
from bsam_fused.report.training import runner
from bsam_fused.report.training.runs import train

CHROMIUM = shutil.which("chromium")
KEPT = Path(__file__).parents[1] / "build" / "screenshots"
LOOKS = {"light": (1200, 3400, 1), "dark": (1200, 3400, 0), "phone": (390, 6400, 1)}
"""Width and height of the page, and the colour scheme that it is told is preferred."""
FRAME = """<body style="margin: 0"><iframe src="{0}" style="width: {1}px; height: {2}px; border: 0"></iframe><script>
onmessage = message => document.documentElement.dataset.found = message.data</script>"""
"""Around the page: no window is as narrow as a phone, and a page in it cannot write into this one's DOM."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "BSAM_FUSED_BROWSER" not in os.environ, reason="needs chromium: apt-get install chromium"
)

# What the page looks like, told to the frame, whose DOM --dump-dom prints.
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [Math.round(r.width), Math.round(r.height)] };
const found = {
  page: [document.documentElement.scrollWidth, innerWidth],
  pictures: [...document.querySelectorAll("figure svg")].map(box),
  small: Math.min(...[...document.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height)),
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor,
  cut: [...document.querySelectorAll("td.key, .card b")].filter(e => e.getBoundingClientRect().right > innerWidth),
  scrolls: [...document.querySelectorAll(".wide")].filter(e => e.scrollWidth > e.clientWidth).length,
  keys: document.querySelectorAll("td.key").length,
};
parent.postMessage(JSON.stringify(found), "*");
</script>"""


def browse(look, *arguments):
    """Run the browser as a user with no history would; return what it says."""
    width, height, scheme = LOOKS[look]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-sync", "--virtual-time-budget=3000", "--timeout=20000"]
    command += [f"--window-size={max(width, 500)},{height}", f"--blink-settings=preferredColorScheme={scheme}"]
    command += ["--enable-logging=stderr", *map(str, arguments)]
    return processes.run(command, timeout=90, check=True)


def framed(look, page):
    """Return the address of a frame as wide as the look around a page."""
    frame = page.with_name(f"{look}-{page.name}")
    frame.write_text(FRAME.format(page.as_uri(), *LOOKS[look]))
    return frame.as_uri()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of little work on real digits, and the same with the probe."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch, Progress(disable=True) as progress:
        patch.setattr(runner, "run", lambda wanted: map(train, wanted))
        patch.setattr(sweep, "SECONDS", 0.0)
        patch.setattr(HostClock, "copied", 1 << 20)
        draft = make.Draft(make.Options(steps=2, epochs=1, seeds=2))
        draft.run(progress)
    write.files(draft.report(), folder)
    html = (folder / "index.html").read_text()
    (folder / "probed.html").write_text(html.replace("</body>", f"{PROBE}</body>"))
    assert draft.learning is not None
    assert draft.learning.rtol == learning.RTOL
    return folder


@pytest.mark.parametrize("look", LOOKS)
def test_page(page, tmp_path, look):
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = browse(look, profile, "--dump-dom", framed(look, page / "probed.html"))
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    scroll, width = found["page"]
    assert scroll <= width == LOOKS[look][0]
    assert len(found["pictures"]) == 6
    assert all(300 < wide <= width and high > 150 for wide, high in found["pictures"])
    assert found["small"] >= 8
    assert found["keys"] == 10
    assert found["cut"] == []
    assert not (look == "phone" and found["scrolls"])
    assert found["dark"] is (look == "dark")
    assert (found["paper"] == "rgb(20, 24, 31)") is (look == "dark")

    KEPT.mkdir(parents=True, exist_ok=True)
    picture = KEPT / f"{look}.png"
    picture.unlink(missing_ok=True)
    browse(look, profile, f"--screenshot={picture}", framed(look, page / "index.html"))
    assert picture.stat().st_size > 50_000


def test_a_script_error_would_be_seen(page, tmp_path):
    (tmp_path / "broken.html").write_text("<script>nothing.here()</script>")
    done = browse("light", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "broken.html").as_uri())
    assert "CONSOLE" in done.stderr
