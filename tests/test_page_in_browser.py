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

CHROMIUM = shutil.which("chromium")
KEPT = Path(__file__).parents[1] / "build" / "screenshots"
LOOKS = {"light": (1200, 2600, 1), "dark": (1200, 2600, 0), "phone": (500, 4600, 1)}
"""Width and height of the window, and the colour scheme that the page is told is preferred."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "BSAM_FUSED_BROWSER" not in os.environ, reason="needs chromium: apt-get install chromium"
)

# What the page looks like, written into its own DOM, which --dump-dom prints.
PROBE = """<script>
const box = e => { const r = e.getBoundingClientRect(); return [Math.round(r.width), Math.round(r.height)] };
const found = {
  page: [document.documentElement.scrollWidth, innerWidth],
  pictures: [...document.querySelectorAll("figure svg")].map(box),
  small: Math.min(...[...document.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height)),
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor,
};
document.documentElement.dataset.found = JSON.stringify(found);
</script>"""


def browse(look, *arguments):
    """Run the browser as a user with no history would; return what it says."""
    width, height, scheme = LOOKS[look]
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-sync", "--virtual-time-budget=3000", "--timeout=20000"]
    command += [f"--window-size={width},{height}", f"--blink-settings=preferredColorScheme={scheme}"]
    command += ["--enable-logging=stderr", *map(str, arguments)]
    return processes.run(command, timeout=90, check=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report of little work on real digits, and the same with the probe."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch, Progress(disable=True) as progress:
        patch.setattr(sweep, "SECONDS", 0.0)
        patch.setattr(HostClock, "copied", 1 << 20)
        draft = make.Draft(make.Options(steps=2, epochs=2))
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
    done = browse(look, profile, "--dump-dom", (page / "probed.html").as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(re.search(r'data-found="([^"]*)"', done.stdout)[1].replace("&quot;", '"'))
    scroll, width = found["page"]
    assert scroll <= width == LOOKS[look][0]
    assert len(found["pictures"]) == 5
    assert all(300 < wide <= width and high > 200 for wide, high in found["pictures"])
    assert found["small"] >= 8
    assert found["dark"] is (look == "dark")
    assert (found["paper"] == "rgb(20, 24, 31)") is (look == "dark")

    KEPT.mkdir(parents=True, exist_ok=True)
    picture = KEPT / f"{look}.png"
    picture.unlink(missing_ok=True)
    browse(look, profile, f"--screenshot={picture}", (page / "index.html").as_uri())
    assert picture.stat().st_size > 50_000


def test_a_script_error_would_be_seen(page, tmp_path):
    (tmp_path / "broken.html").write_text("<script>nothing.here()</script>")
    done = browse("light", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "broken.html").as_uri())
    assert "CONSOLE" in done.stderr
