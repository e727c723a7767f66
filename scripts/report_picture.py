"""Draws the README's picture of a head's page: python scripts/report_picture.py RUN docs/report.png

The picture in the repository was made from the run of
`attncap scan builtin:minilm builtin:docstrings --limit 60 --keep sequences,rows -o RUN`. Needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from attncap.report import write_report

HEAD = "#head-0-2-9"
WORD = "offset"
CLIP = {"x": 0, "y": 56, "width": 1100, "height": 1150}


def main() -> None:
    """Read the arguments, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as drive:
        report = write_report(arguments.run, Path(folder) / "report.html")
        browser = drive.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1300})
        page.goto(report.as_uri() + HEAD)
        tokens = page.locator(".example").first.locator(".token")
        second = [place for place, text in enumerate(tokens.all_inner_texts()) if text == WORD][1]
        tokens.nth(second).hover()
        picture = page.screenshot(clip=CLIP)
        browser.close()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(96, dither=0).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
