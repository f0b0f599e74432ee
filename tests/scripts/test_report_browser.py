"""The page of report.py in a headless Chromium: three widths, light and dark, every control."""

import html
import json
import re
import shutil
import subprocess

import pytest
from commands import ROOT
from report_run import write_speedrun

import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
# Told to the page around it, which would not hear of it.
LISTEN = """<script>
for (const name of ["error", "unhandledrejection"])
  addEventListener(name, (event) => parent.errors.push(String(event.message || event.reason)));
for (const name of ["error", "warn"])
  console[name] = (...words) => parent.errors.push(words.join(" "));
</script>"""
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *(
        "--window-size=1500,1000",
        "--virtual-time-budget=60000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    ),
]


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    """Return a file that shows the page in three widths, and looks at it."""
    folder = tmp_path_factory.mktemp("browser")
    run = write_speedrun(folder / "run")
    report.main(report.Config((str(run),)))
    page = (run / "report.html").read_text().replace("<head>", f"<head>{LISTEN}", 1)
    frames = ""
    for width in (1400, 800, 390):
        source = html.escape(page, quote=True)
        frames += (
            f'<iframe id="w{width}" width="{width}" height="900" srcdoc="{source}"></iframe>\n'
        )
    script = (ROOT / "tests" / "support" / "in_browser.js").read_text()
    # Errors are kept from the first frame on.
    head, _, rest = script.partition("const errors = [];")
    file = folder / "around.html"
    file.write_text(
        f"<!doctype html><meta charset=utf-8><script>var errors = [];</script>{frames}"
        f'<pre id="seen"></pre><script>{head}{rest}</script>'
    )
    return file


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(around, scheme, tmp_path):
    setting = f"--blink-settings=preferredColorScheme={['dark', 'light'].index(scheme)}"
    done = subprocess.run(
        [BROWSER, *FLAGS, setting, f"--user-data-dir={tmp_path}", "--dump-dom", around.as_uri()],
        capture_output=True,
        text=True,
        timeout=400,
    )
    (text,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    seen = json.loads(html.unescape(text))
    assert "failed" not in seen, seen
    assert seen["errors"] == [] and seen["dark"] == (scheme == "dark")
    assert seen["overflow"] == {"390": 0, "800": 0, "1400": 0}
    too_faint = {place: ratio for place, ratio in seen["contrast"].items() if ratio < 4.5}
    assert not too_faint
    assert seen["about"].startswith("accuracy ")
    check_gallery(seen["gallery"])
    check_scene(seen["scene"])
    assert seen["room"]["turned"]
    check_rollouts(seen["rollouts"])


def check_gallery(seen: dict) -> None:
    """After RL one question is wrong on both paths; before it, the odd images' on LOR as well."""
    assert len(seen["first"]) == 12 and seen["first"][0] == "s5-order"
    assert seen["states"]["wrong"]["words"] == "✗ wrong"
    assert seen["states"]["right"]["words"] == "✓ right"
    assert seen["states"]["wrong"]["edge"] != seen["states"]["right"]["edge"]
    assert seen["wrong"]["ids"] == ["s5-order"]
    assert seen["wrong"]["count"].startswith("1 of 12 questions; after RL: 1 with a wrong answer")
    mended = {"s1-distance", "s1-order", "s3-distance", "s3-order", "s5-distance"}
    assert set(seen["changed"]["ids"]) == mended and seen["broken"]["ids"] == []
    assert len(seen["task"]["ids"]) == 6 and seen["search"]["ids"] == ["s3-distance"]
    assert seen["path"]["headings"] == ["DTR after SFT", "DTR after RL"]


def check_scene(seen: dict) -> None:
    """The answer before RL is 0.15 m beside the first object, the one after it hits."""
    assert len(seen["after"]) == len(seen["before"]) == 6 and seen["after"] != seen["before"]
    assert seen["told"].endswith("the answer says (0.15, 0.00, 2.00) m, 0.15 m off")
    assert re.fullmatch(r"M[\d. ]+L[\d. ]+", seen["line"])
    assert seen["open"] and seen["closed"]
    whole, zoomed = (list(map(float, seen[name].split())) for name in ("whole", "zoomed"))
    assert whole == [0, 0, 40, 30] and zoomed[2:] == [28, 21]


def check_rollouts(seen: dict) -> None:
    assert [text.split(" · ")[:2] for text in seen["last"]] == [
        ["step 8", "DTR"],
        ["step 8", "LOR"],
    ]
    assert [text.split(" · ")[0] for text in seen["first"]] == ["step 2", "step 2"]
    assert [text.split(" · ")[1] for text in seen["lor"]] == ["LOR"]
    assert [text.split(" · ")[0] for text in seen["followed"]] == ["step 2", "step 8"]
    assert "mean reward 0.60 · trained on" in seen["last"][0]
    assert seen["bars"] == ["100%", "100%", "30%"]
    assert seen["text"].endswith("<answer>2.0</answer>") and "<script>" in seen["text"]
    assert seen["advantage"] != seen["probability"]
