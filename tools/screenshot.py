"""Create docs/lab.png: the lab page after a cut. `python -m tools.screenshot`, with the extra `dev` and a Chromium."""

import asyncio
import base64
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from playwright.async_api import async_playwright, expect

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURE = REPOSITORY / "docs" / "lab.png"
WIDTH = 1280
CONFIG = "[scenarios.ticker]\ninterval = 0.2\nseed = 7\n"


PIXELS = """
    async png => {
        const picture = new Image();
        picture.src = `data:image/png;base64,${png}`;
        await picture.decode();
        const pen = new OffscreenCanvas(picture.width, picture.height).getContext("2d");
        pen.drawImage(picture, 0, 0);
        const { data } = pen.getImageData(0, 0, picture.width, picture.height);
        const parts = [];
        for (let at = 0; at < data.length; at += 8192) parts.push(String.fromCharCode(...data.subarray(at, at + 8192)));
        return btoa(parts.join(""));
    }
"""


# Indistinguishable shades become equal, which compresses better.
NEAR = bytes(min(255, (value + 1) // 3 * 3) for value in range(256))


def pack(rgba: bytearray, width: int) -> bytes:
    """Return a PNG of pixels, a fifth smaller than that of the browser. Source: PNG, section 5."""
    rgba = rgba.translate(NEAR)
    del rgba[3::4]
    row = 3 * width
    height = len(rgba) // row
    rows = b"".join(b"\0" + rgba[at : at + row] for at in range(0, len(rgba), row))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


async def photograph(url: str) -> None:
    """Run the ticker, cut it, resume it, and take a screenshot."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = await browser.new_page(viewport={"width": WIDTH, "height": 960})
        await page.goto(url)
        events = page.locator("#count")
        await page.get_by_role("button", name="Run", exact=True).click()
        await expect(events).to_have_text(re.compile(r"^1[5-9]\d$"), timeout=30_000)
        await page.get_by_role("button", name="Cut the connection").click()
        await expect(page.locator("#state")).to_have_text("Cut.")
        await page.wait_for_timeout(2500)  # the pause must be visible in the charts
        await page.get_by_role("button", name="Resume").click()
        await expect(page.locator("#verdict")).to_contain_text("Nothing was lost: ")
        await expect(events).to_have_text(re.compile(r"^[3-9]\d\d$"), timeout=30_000)
        await page.mouse.move(0, 0)
        taken = base64.b64encode(await page.screenshot()).decode()
        pixels = await (await browser.new_page()).evaluate(PIXELS, taken)
        PICTURE.write_bytes(pack(bytearray(base64.b64decode(pixels)), WIDTH))
        await browser.close()


def main() -> None:
    """Serve from an empty folder, and take the screenshot."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.toml"
        config.write_text(CONFIG)
        command = [sys.executable, "-m", "streamlab", "run", "--config", str(config), "--port", "8000"]
        with subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as server:
            assert server.stdout is not None
            url = next(line.rpartition(" ")[2].strip() for line in server.stdout if " serves http" in line)
            try:
                asyncio.run(photograph(url))
            finally:
                server.terminate()
    print(f"{PICTURE.relative_to(REPOSITORY)}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
