"""The page in a real browser: Debian's Chromium without a window, driven by selenium."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from PIL import Image
from served_page import Site, until

from ditc.runtime.pipeline import Pipeline

CONTROL, TAB, ENTER, ESCAPE = "\ue009", "\ue004", "\ue007", "\ue00c"  # keys, as WebDriver writes them


def find(browser: Any, selector: str) -> Any:
    found = browser.find_elements("css selector", selector)
    return found[0] if found else None


def text(browser: Any) -> str:
    """What the page says about the request."""
    script = "return document.querySelector('#ditc-result')?.innerText ?? ''"
    return str(browser.execute_script(script))


def look(browser: Any, selector: str, attribute: str) -> Any:
    """An attribute of an element of the result; "" if there is none at this moment."""
    script = "return document.querySelector('#ditc-result ' + arguments[0])?.[arguments[1]] ?? ''"
    return browser.execute_script(script, selector, attribute)


def ask(browser: Any, prompt: str) -> None:
    box = find(browser, "#ditc-prompt textarea")
    box.clear()
    box.send_keys(prompt)
    until(lambda: find(browser, "#ditc-draw").is_enabled())
    find(browser, "#ditc-draw").click()


def test_a_visitor_sees_a_preview_cancels_draws_again_and_downloads_the_picture(
    site: Site, page: Any, downloads: Path
) -> None:
    steps = find(page, "#ditc-steps input[type=number]")
    steps.send_keys(CONTROL, "a")
    steps.send_keys("12", TAB)
    ask(page, "red cat")
    until(lambda: "Waiting for its turn" in text(page))
    site.denoiser.allowed.release(8)
    until(lambda: "Step 8 of 12" in text(page))
    # The page is drawn anew at every view, so elements that were found may be gone.
    until(lambda: look(page, ".ditc-preview img", "src").startswith("data:image/png"))
    until(lambda: look(page, "progress", "value") == 8)

    find(page, "#ditc-cancel").click()
    site.denoiser.allowed.release(1)  # the step in which it is cancelled
    until(lambda: "Cancelled" in text(page))
    assert site.scheduler.idle

    site.denoiser.allowed.release(100)
    ask(page, "blue <b>dog</b>")
    until(lambda: find(page, "#ditc-result .ditc-picture a"))
    page.execute_script("document.querySelector('#ditc-result .ditc-picture a').click()")
    (file,) = until(lambda: [file for file in downloads.glob("*.png") if file.stat().st_size])
    drawn = Image.open(file)
    seed = int(drawn.info["seed"])
    assert file.name == f"ditc-{seed}.png" and f"The seed was {seed}" in text(page)
    assert drawn.info["prompt"] == "blue <b>dog</b>"
    assert json.loads(drawn.info["settings"])["num_inference_steps"] == 12
    with Pipeline.load(site.models.bundles["tiny"]) as pipeline:
        assert (
            drawn.tobytes()
            == pipeline("blue <b>dog</b>", seed=seed, num_inference_steps=12).images[0].tobytes()
        )


def test_the_page_asks_no_other_site_for_anything(site: Site, page: Any) -> None:
    time.sleep(0.3)  # late requests
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    elsewhere = [url for url in sent if not url.startswith((site.url, "data:", "blob:", "chrome:"))]
    assert len(sent) > 5 and elsewhere == []


def test_a_refused_request_says_why_and_the_next_one_is_drawn(site: Site, page: Any) -> None:
    site.denoiser.allowed.release(100)
    ask(page, "x" * 33)
    until(lambda: "at most 32 bytes" in text(page))
    ask(page, "green tree")
    until(lambda: find(page, "#ditc-result .ditc-picture"))


def test_a_picture_is_enlarged_and_saved_with_the_keyboard(site: Site, page: Any, downloads: Path) -> None:
    site.denoiser.allowed.release(100)
    ask(page, "red cat")
    until(lambda: find(page, "#ditc-result .ditc-picture"))
    focused = "return document.activeElement === document.querySelector(arguments[0])"
    find(page, "#ditc-result .ditc-picture img").send_keys(ENTER)
    assert page.execute_script(focused, ".ditc-large[role=dialog]")
    find(page, ".ditc-large").send_keys(TAB)
    assert page.execute_script(focused, ".ditc-large")
    find(page, ".ditc-large").send_keys(ESCAPE)
    assert not find(page, ".ditc-large")
    assert page.execute_script(focused, "#ditc-result .ditc-picture img")
    before = len(list(downloads.glob("*.png")))
    find(page, "#ditc-result .ditc-picture a").send_keys(" ")
    until(lambda: len(list(downloads.glob("*.png"))) == before + 1)


def test_nothing_is_drawn_for_a_tab_that_was_closed(site: Site, page: Any) -> None:
    until(lambda: site.scheduler.idle)
    while site.denoiser.allowed.acquire(blocking=False):  # what earlier tests have left
        pass
    ask(page, "red cat")
    until(lambda: "Waiting for its turn" in text(page))
    page.get("about:blank")
    site.denoiser.allowed.release(1)
    until(lambda: site.scheduler.idle)


def test_a_page_whose_connection_was_lost_draws_again(site: Site, page: Any) -> None:
    """It could not ask whether the server is there again, and did nothing any more."""
    while site.denoiser.allowed.acquire(blocking=False):
        pass
    ask(page, "red cat")
    until(lambda: "Waiting for its turn" in text(page))
    site.break_connections()
    site.denoiser.allowed.release(100)
    until(lambda: site.scheduler.idle)
    until(lambda: find(page, "#ditc-draw") and "Waiting" not in text(page))  # it loads itself again
    ask(page, "green tree")
    until(lambda: find(page, "#ditc-result .ditc-picture"))


def test_a_visitor_with_a_key_may_draw_and_one_without_sees_nothing(
    tiny_bundle: Path, tmp_path: Path, browser: Any
) -> None:
    key = "a-key-of-this-test"
    limits = {"concurrent_requests": 1, "requests_per_minute": 6}  # the page's files do not count
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"keys": [{"name": "alice", "key": key, **limits}]}))
    keys.chmod(0o600)
    site = Site(tiny_bundle, keys)
    try:
        site.denoiser.allowed.release(100)
        browser.get(f"{site.url}/ui/")
        assert not find(browser, "#ditc-prompt")  # the browser asks for a password
        # As if it were typed: the browser remembers it for this site.
        browser.get(site.url.replace("//", f"//me:{key}@") + "/ui/theme.css")
        browser.get(f"{site.url}/ui/")
        until(lambda: find(browser, "#ditc-prompt textarea"))
        ask(browser, "red cat")
        until(lambda: find(browser, "#ditc-result .ditc-picture"))
    finally:
        site.close()
