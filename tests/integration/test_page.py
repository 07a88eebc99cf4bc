"""The page in a real browser, opened from the disk: sorting, filtering, details, and that nothing is refused or fails."""

import json
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import made_records as made
from cpet_leaderboard import build

webdriver = pytest.importorskip("selenium.webdriver")
wait = pytest.importorskip("selenium.webdriver.support.wait")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with its chromedriver here"),
    pytest.mark.timeout(120),
]


def start(profile: Path, *more: str, script: bool = True):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    words += ["--disable-sync", "--no-first-run", f"--user-data-dir={profile}", "--window-size=1440,1000", *more]
    for word in words:
        options.add_argument(word)
    if not script:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = start(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    """The page of twelve cells, freshly opened; afterwards nothing may have been logged, refused or asked for elsewhere."""
    path = build([made.twelve(tmp_path / "made")], tmp_path / "page.html")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.as_uri())
    yield browser
    assert browser.get_log("browser") == []
    events = [json.loads(row["message"])["message"] for row in browser.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = [e["request"]["url"] for e in asked if not e["documentURL"].startswith("chrome:")]  # the browser's own first tab
    assert asked and all(url.startswith((path.as_uri(), "data:")) for url in asked)


def all_of(page, css: str):
    return page.find_elements("css selector", css)


def one(page, css: str):
    return page.find_element("css selector", css)


def shown(page) -> list[str]:
    """Ids of the rows on show, from the top."""
    return [row.get_attribute("id") for row in all_of(page, "tbody tr[id]") if row.is_displayed()]


def heading(page, name: str):
    return next(th for th in all_of(page, "thead tr:last-child th") if th.text.split("\n")[0] == name)


def press(page, element, key: str) -> None:
    page.execute_script("arguments[0].focus()", element)
    webdriver.ActionChains(page).send_keys(key).perform()


def test_sorts_by_click_and_key(page):
    start_order = shown(page)
    assert start_order == [f"r{i}" for i in range(12)]
    accuracy = [found[0] for found in made.LADDER.values()]
    best = [f"r{i}" for i in sorted((i for i in range(12) if accuracy[i]), key=lambda i: -accuracy[i])]
    th = heading(page, "acc")
    assert th.get_attribute("aria-sort") == "none"
    th.find_element("css selector", "button").click()
    assert th.get_attribute("aria-sort") == "descending" and shown(page) == [*best, "r11"]
    press(page, th.find_element("css selector", "button"), "\ue007")  # Enter
    assert th.get_attribute("aria-sort") == "ascending" and shown(page) == [*best[::-1], "r11"]  # the failed cell stays last
    press(page, th.find_element("css selector", "button"), " ")
    assert th.get_attribute("aria-sort") == "none" and shown(page) == start_order
    heading(page, "restoring").find_element("css selector", "button").click()
    names = [page.find_element("css selector", f"#{row} td:nth-child(3)").text for row in shown(page)]
    assert names == sorted(names) and th.get_attribute("aria-sort") == "none"


def test_filters_by_text_and_axis(page):
    count = one(page, "#count")
    assert count.text == "12 of 12 cells"
    one(page, "#text").send_keys("wanda24 CPET")
    wait.WebDriverWait(page, 5).until(lambda _: count.text == "2 of 12 cells")
    assert shown(page) == ["r9", "r10"]
    assert len(all_of(page, ".scatter:first-of-type g:not(.off)")) == 6  # three charts
    one(page, "#clear").click()
    assert len(shown(page)) == 12 and one(page, "#text").get_attribute("value") == ""
    pick = one(page, ".pick[data-axis=restoring]")
    pick.find_element("css selector", "summary").click()
    for name in ("cpet", "matched"):
        pick.find_element("css selector", f"input[value={name}]").click()
    assert shown(page) == ["r4", "r6", "r9", "r11"] and pick.find_element("css selector", "b").text == "2 chosen"
    press(page, pick.find_element("css selector", "input"), "\ue00c")  # Escape closes the list
    assert pick.get_attribute("open") is None
    one(page, "#text").send_keys("loss is not finite")  # the reason of the failed cell
    wait.WebDriverWait(page, 5).until(lambda _: shown(page) == ["r11"])
    one(page, "#text").send_keys("nowhere")
    wait.WebDriverWait(page, 5).until(lambda _: one(page, "#nothing").is_displayed())
    assert not one(page, "section.group").is_displayed()


def test_details(page):
    button = one(page, "#r9 th button")
    press(page, button, "\ue007")
    panel = one(page, "#r9 + tr.detail .panel")
    assert button.get_attribute("aria-expanded") == "true"
    for words in ("0.822", "auroc ↑", "9,805,824", "0123456789abcdef", "2.13.0", "wanda24", "recover.act", "inherited.steps"):
        assert words in panel.text, words
    lines = panel.find_elements("css selector", ".curve polyline")
    assert [len(line.get_attribute("points").split()) for line in lines] == [40, 40, 40]  # loss, task, distill
    press(page, button, "\ue007")
    assert not all_of(page, "tr.detail") and button.get_attribute("aria-expanded") == "false"
    one(page, "#r11 th button").click()
    failed = one(page, "#r11 + tr.detail").text
    assert "tune smollm2--wanda24--lora--matched" in failed and "StepFailed: the loss is not finite at step 12" in failed
    assert "step 9 loss nan" in failed  # of the log
    one(page, "#r11 + tr.detail a[href='#r1']").click()  # D, compared with
    assert one(page, "#r1 + tr.detail").is_displayed() and page.switch_to.active_element.text == "none"
    heading(page, "decode").find_element("css selector", "button").click()  # details go with their row
    assert one(page, "#r11 + tr.detail").is_displayed() and one(page, "#r1 + tr.detail").is_displayed()


def test_a_curve_shows_each_term_and_the_held_out_documents(browser, tmp_path):
    axes = {"model": "m", "compression": "nf4", "pet": "lora", "restoring": "cpet", "task": "t", "seed": 0}
    record = made.record(axes, acc=0.8)
    for i, row in enumerate(record["training"]["losses"]):  # as early stop and an encoder-decoder model have them
        row |= {"distill_encoder": 0.1, "distill_decoder": row["task"] / 3}
        row["validation"] = 0.7 - i / 100 if i % 5 == 4 else None
    plain = made.record({**axes, "restoring": "vanilla"}, acc=0.7)
    plain["training"].pop("losses")  # a record of before
    browser.get(build([made.write(tmp_path / "made", [record, plain])], tmp_path / "page.html").as_uri())
    for row in ("r0", "r1"):
        browser.execute_script("arguments[0].click()", one(browser, f"#{row} th button"))
    curve = one(browser, "#r0 + tr.detail .curve")
    lines = [len(line.get_attribute("points").split()) for line in curve.find_elements("css selector", "polyline")]
    assert lines == [40, 40, 40, 40, 40, 8]
    places = {(m.get_attribute("cx"), m.get_attribute("cy")) for m in curve.find_elements("css selector", "circle")}
    last = curve.find_elements("css selector", "polyline")[-1].get_attribute("points").split()
    assert places == {tuple(point.split(",")) for point in last} and len(places) == 8
    keys = one(browser, "#r0 + tr.detail .keys").text.split("\n")
    assert keys == ["loss", "task", "distill", "distill, encoder", "distill, decoder", "validation"]
    assert one(browser, "#r1 + tr.detail").is_displayed() and not all_of(browser, "#r1 + tr.detail .curve")
    assert browser.get_log("browser") == []


def test_a_mark_in_a_chart_opens_its_cell(page):
    mark = one(page, ".scatter g[data-row='8']")
    assert "smollm2--wanda24--lora--vanilla" in mark.find_element("css selector", "title").get_attribute("textContent")
    webdriver.ActionChains(page).move_to_element(mark).click().perform()
    assert "smollm2--wanda24--lora--vanilla" in one(page, "#r8 + tr.detail").text


@pytest.mark.parametrize("width", [320, 390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_and_can_be_read(page, width, scheme):
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    try:
        page.execute_script("arguments[0].click()", one(page, "#r11 th button"))
        assert page.execute_script("return document.documentElement.scrollWidth") <= width  # tables scroll in themselves
        low = page.execute_script(CONTRAST)
        assert low == [], low
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


# Texts whose contrast with what is behind them is below 4.5 (WCAG 2.2, 1.4.3); disabled controls do not count.
CONTRAST = """
const light = (c) => { const f = c.map((v) => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
const dot = Object.assign(document.createElement('canvas'), {width: 1, height: 1});
const canvas = dot.getContext('2d', {willReadFrequently: true});
const rgba = (text) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data]; };
const behind = (e) => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
  if (c[3] === 255) return c.slice(0, 3); } return [255, 255, 255]; };
const bad = [];
for (const e of document.querySelectorAll('body *')) {
  if (['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(e.tagName) || e.disabled || !e.checkVisibility()) continue;
  if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
  const style = getComputedStyle(e);
  const ink = light(rgba(e instanceof SVGElement ? style.fill : style.color).slice(0, 3)), ground = light(behind(e));
  const ratio = (Math.max(ink, ground) + .05) / (Math.min(ink, ground) + .05);
  if (ratio < 4.5) bad.push([e.tagName, e.className.toString(), e.textContent.slice(0, 30), ratio.toFixed(2)]);
}
return bad;
"""


def test_without_javascript(tmp_path):
    """Every cell, column and chart is there; what would do nothing is not."""
    path = build([made.twelve(tmp_path / "made")], tmp_path / "page.html")
    driver = start(tmp_path / "profile", script=False)
    try:
        driver.get(path.as_uri())
        assert shown(driver) == [f"r{i}" for i in range(12)] and not all_of(driver, "th button")
        assert "0.902" in one(driver, "#r1").text and "not finite" in one(driver, "#r11").text
        assert not one(driver, "#filters").is_displayed() and one(driver, "noscript p").rect["height"] > 0
        assert len([g for g in all_of(driver, ".scatter g") if g.is_displayed()]) == 30
    finally:
        driver.quit()


def test_many_cells(browser, tmp_path):
    axes = {"model": "m", "compression": "c", "pet": "lora", "restoring": "cpet", "task": "t"}
    records = [made.record({**axes, "seed": i}, acc=0.3 + i / 2000) for i in range(700)]
    browser.get(build([made.write(tmp_path / "made", records)], tmp_path / "page.html").as_uri())
    count = "return [...document.querySelectorAll('tbody tr')].filter((r) => r.checkVisibility()).length"
    assert browser.execute_script(count) == 300 and "300 of 700" in one(browser, ".rest").text
    heading(browser, "acc").find_element("css selector", "button").click()
    assert one(browser, "tbody tr").get_attribute("id") == "r699"
    assert browser.execute_script(count) == 300
    one(browser, ".rest button").click()
    assert browser.execute_script(count) == 700 and not one(browser, ".rest").is_displayed()
    assert browser.get_log("browser") == []
