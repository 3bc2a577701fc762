"""The page of a comparison, in a real browser without a network, at the width of a phone and of a desktop."""

import base64
import io
import wave

import numpy as np
import pytest
from helpers.browser import needs_browser, opened
from PIL import Image

from trl_diffusion_pref.evaluation.comparison import Comparison
from trl_diffusion_pref.evaluation.comparison_page import comparison_page


PROMPTS = ["a red circle", "</script><b id='injected'>x</b><!-- <script>", "третий, 第三"] + [
    f"prompt {index}" for index in range(27)
]


def png(colour: tuple[int, int, int]) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def wav() -> str:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(1600))
    return "data:audio/wav;base64," + base64.b64encode(buffer.getvalue()).decode()


def compared(modality: str = "image") -> Comparison:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(len(PROMPTS), 1))
    change = np.linspace(-2, 4, len(PROMPTS))[:, None]
    tuned = base + change
    tuned[5] = np.nan
    scores = {name: {"score": values, "other": values * 100} for name, values in (("base", base), ("tuned", tuned))}
    return Comparison(["base", "tuned"], PROMPTS, [[7]] * len(PROMPTS), modality, scores, blank={"tuned": 1})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    media = {"base": [[png((200, 0, 0))]] * len(PROMPTS), "tuned": [[png((0, 0, 200))]] * len(PROMPTS)}
    media["tuned"][5] = [""]
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(comparison_page(compared(), media, "A title"), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[390, 1280], ids=["phone", "desktop"])
def browser(page, request):
    with opened(page, width=request.param) as driver:
        yield driver


def texts(driver, selector: str) -> list[str]:
    return [element.text for element in driver.find_elements("css selector", selector)]


def choose(driver, identifier: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(driver.find_element("id", identifier)).select_by_value(value)


@needs_browser
def test_the_page_fits_its_width_and_reports_no_error(browser):
    width = browser.execute_script("return window.innerWidth")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert texts(browser, "h1") == ["A title"]
    decode = "Promise.all([...document.images].map((image) => { image.loading = 'eager'; return image.decode(); }))"
    assert browser.execute_async_script(
        f"const done = arguments[0]; {decode}.then(() => done(true), () => done(false))"
    )
    assert browser.get_log("browser") == []


@needs_browser
def test_cards_are_sorted_and_filtered_by_the_difference(browser):
    choose(browser, "order", "loss")
    # The linear change of each prompt: losses come first, the largest of all at the top.
    assert texts(browser, ".card > p:first-child")[:3] == [" ".join(prompt.split()) for prompt in PROMPTS[:3]]
    choose(browser, "order", "gain")
    assert texts(browser, ".card > p:first-child")[0] == PROMPTS[-1]
    losses = browser.find_element("id", "losses")
    losses.click()
    changes = np.linspace(-2, 4, len(PROMPTS))
    assert len(texts(browser, ".card")) == (np.delete(changes, 5) < 0).sum()
    losses.click()
    assert "prompt 2" not in texts(browser, "#injected")
    assert not browser.find_elements("id", "injected")


@needs_browser
def test_every_control_is_reached_and_used_by_keyboard(browser):
    from selenium.webdriver import ActionChains, Keys

    choose(browser, "order", "gain")
    choose(browser, "view", "flip")
    browser.execute_script("const top = document.querySelector('h1'); top.tabIndex = -1; top.focus()")
    reached = []
    for _ in range(9):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        reached.append(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))
    assert ["model", "reward", "order", "view", "losses"] == [name for name in reached if name.islower()]
    # The first button of a card is next: it shows the base's sample and back.
    button = browser.find_element("css selector", ".card button")
    assert button.text == "Show base"
    browser.execute_script("arguments[0].focus()", button)
    ActionChains(browser).send_keys(Keys.SPACE).perform()
    assert button.text == "Show tuned"
    assert texts(browser, ".card figcaption")[0].startswith("base:")
    choose(browser, "view", "slider")
    browser.execute_script("arguments[0].focus()", browser.find_element("css selector", ".card input[type=range]"))
    ActionChains(browser).send_keys(Keys.HOME).perform()
    overlay = browser.find_element("css selector", ".overlay")
    assert overlay.get_attribute("style") == "--at: 0%;"
    choose(browser, "view", "pair")


@needs_browser
def test_more_cards_come_by_a_button_and_blank_ones_say_so(browser):
    choose(browser, "order", "prompt")
    choose(browser, "order", "loss")
    assert texts(browser, "#count") == ["24 of 30 shown"]
    browser.find_element("id", "more").click()
    assert texts(browser, "#count") == ["30 of 30 shown"]
    assert texts(browser, ".blank") == ["left out: blank"]
    assert texts(browser, ".card")[-1].count("not compared") == 1


@needs_browser
def test_audio_has_players(tmp_path):
    media = {name: [[wav()]] * len(PROMPTS) for name in ("base", "tuned")}
    path = tmp_path / "audio.html"
    path.write_text(comparison_page(compared("audio"), media, "Audio"), encoding="utf-8")
    with opened(path, width=1280) as driver:
        assert len(driver.find_elements("css selector", "audio[controls]")) == 48
        seconds = "const done = arguments[0], a = document.querySelector('audio'); a.load(); a.onloadedmetadata = "
        assert driver.execute_async_script(seconds + "() => done(a.duration)") == pytest.approx(0.1)
        assert driver.get_log("browser") == []


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_images_that_were_edited_stand_left_of_both_samples(tmp_path, width):
    media = {"base": [[png((200, 0, 0))]] * len(PROMPTS), "tuned": [[png((0, 0, 200))]] * len(PROMPTS)}
    sources = [[png((0, 200, 0))]] * (len(PROMPTS) - 1) + [[png((0, 200, 0)), png((0, 90, 0))]]
    path = tmp_path / "edits.html"
    path.write_text(comparison_page(compared(), media, "Edits", sources), encoding="utf-8")
    with opened(path, width=width) as driver:
        # The last prompt gains most.
        choose(driver, "order", "gain")
        names = [text.partition(":")[0] for text in texts(driver, ".card:first-child figcaption")]
        assert names == ["source 1", "source 2", "base", "tuned"]
        assert texts(driver, ".card:nth-child(2) figcaption")[0] == "source"
        for view, count in (("pair", 4), ("flip", 3), ("slider", 4)):
            choose(driver, "view", view)
            card = driver.find_element("css selector", ".card")
            edges = [image.rect["x"] for image in card.find_elements("css selector", "img")]
            assert len(edges) == count and edges[0] == edges[1] < min(edges[2:])
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert driver.get_log("browser") == []


def test_a_page_takes_no_sample_from_elsewhere():
    media = {name: [["https://example.org/x.png"]] * len(PROMPTS) for name in ("base", "tuned")}
    with pytest.raises(ValueError, match="is no data: URL"):
        comparison_page(compared(), media, "A title")
    own = {name: [[png((1, 2, 3))]] * len(PROMPTS) for name in ("base", "tuned")}
    with pytest.raises(ValueError, match="is no data: URL"):
        comparison_page(compared(), own, "A title", [["sources/1.png"]] * len(PROMPTS))
