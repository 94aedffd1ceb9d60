"""The page at ``/``, in a real browser."""

import re
import shutil
import threading
import time

import httpx
import pytest

from builders import random_byte_lm
from bytelm.checkpoint import CheckpointConfig
from bytelm.config import TransformerConfig
from bytelm.inference import Choice, Engine, Event, Generated, Sampling
from bytelm.inference import generate as alone
from bytelm.language_model import LanguageModel
from serving_clients import ScriptedEngine, running, tiny_lm
from test_tokens import token_model

sync_api = pytest.importorskip("playwright.sync_api", reason="the browser needs playwright")
CHROMIUM = shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("the page is tested in chromium: apt-get install chromium", allow_module_level=True)
expect = sync_api.expect
expect.set_options(timeout=10_000)


class TextEngine(ScriptedEngine):
    """Engine that continues every prompt with the same bytes, a patch for each ``size`` of them."""

    def __init__(self, data, size=3, seconds=0.0, most=1 << 30):
        super().__init__(seconds, size)
        self.data, self.most = data, most
        self.pause_at = None
        """Byte before which the engine waits for ``resume``."""
        self.resume = threading.Event()

    def step(self):
        time.sleep(self.seconds)
        if any(done == self.pause_at for _, done in self.open.values()):
            self.resume.wait(20)
        return [self._advance(ticket) for ticket in list(self.open)]

    def _advance(self, ticket):
        request, done = self.open[ticket]
        byte = bytes([self.data[done % len(self.data)]])
        is_last = done + 1 >= min(request.max_bytes, self.most)
        if is_last:
            del self.open[ticket]
        else:
            self.open[ticket][1] += 1
        choice = Choice(byte, -1.0, (), 0.5 + done % 4, done % self.size == 0)
        return Event(ticket, Generated(byte, "length" if is_last else None, (choice,)))


class SlowEngine(Engine):
    """Engine whose steps take a while."""

    def step(self):
        time.sleep(0.02)
        return super().step()


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


class Visit:
    """A page, what its console said, and where it sent requests."""

    def __init__(self, context):
        self.page = context.new_page()
        self.problems = []
        self.addresses = set()
        self.page.on("console", lambda said: said.type == "error" and self._note(said.text))
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("dialog", lambda dialog: self._note("dialog") or dialog.dismiss())
        self.page.on("request", lambda request: self.addresses.add(request.url))

    def _note(self, text):
        # The browser itself says so of every response that is an error.
        if not text.startswith("Failed to load resource"):
            self.problems.append(text)


@pytest.fixture
def visit(browser):
    """Open the page of a server; it must not complain, nor ask anyone else for anything."""
    context = browser.new_context()
    visits = []

    def visit(server):
        found = Visit(context)
        visits.append((found, server.url))
        found.page.goto(server.url)
        expect(found.page.locator("#model:not(:empty), #key-form:visible")).to_have_count(1)
        return found.page

    yield visit
    context.close()
    for found, url in visits:
        assert found.problems == []
        assert all(address.startswith(f"{url}/") for address in found.addresses)


def generate(page, prompt="", max_bytes=None, **sampling):
    page.locator("#prompt").fill(prompt)
    if max_bytes is not None:
        sampling["max_tokens"] = max_bytes
    if sampling and not page.locator("#temperature").is_visible():
        page.get_by_text("Sampling", exact=True).click()
    for name, value in sampling.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Generate").click()


def is_done(page):
    expect(page.locator("#status")).to_contain_text("Done")
    # The costs of the text are asked for at the end.
    expect(page.locator("#stats dd").last).not_to_have_text("—")


def numbers(page):
    names = page.locator("#stats dt").all_text_contents()
    return dict(zip(names, page.locator("#stats dd").all_text_contents(), strict=True))


def patch_texts(page):
    return page.locator("#text .patch").all_text_contents()


@pytest.fixture(scope="module")
def tiny(lm):
    with running(lm, max_document_bytes=400) as server:
        yield server


def test_streams_in_the_colours_of_patches(lm, visit):
    engine = TextEngine(b"0123456789")
    engine.pause_at = 30
    with running(lm, engine) as server:
        page = visit(server)
        generate(page, "ab", 90)
        text = page.locator("#text")
        expect(text).to_have_text("ab" + "0123456789" * 3)
        expect(page.get_by_role("button", name="Stop")).to_be_enabled()
        expect(page.locator("#status")).to_have_text("Generating…")
        # While it streams, patches are those of the trace.
        generated = page.locator("#text .patch", has_text=re.compile("^(012|345|678)$"))
        colours = {
            generated.nth(i).evaluate("e => getComputedStyle(e).backgroundColor") for i in range(3)
        }
        assert len(colours) == 3
        assert "inset" in generated.first.evaluate("e => getComputedStyle(e).boxShadow")
        engine.resume.set()
        is_done(page)
        assert text.text_content() == "ab" + "0123456789" * 9
        assert page.locator("#strip .bar").count() > 20
        expect(page.locator("#strip .line")).to_have_count(1)


def test_shows_the_bytes_and_patches_of_the_model(tiny, visit):
    page = visit(tiny)
    generate(page, "The cat sat", 60, seed=5, temperature=0.8)
    is_done(page)
    prompt, sampling = b"The cat sat", Sampling(0.8, seed=5)
    lm = tiny.server.lm
    data = prompt + alone(lm.module, prompt, max_bytes=60, sampling=sampling)
    patched = lm.patch(data)
    found = numbers(page)
    assert found["Bytes"] == str(len(data))
    assert found["Patches"] == found["Global steps"] == str(len(patched.boundaries))
    assert found["Bytes per patch"] == f"{patched.patch_size:.2f}"
    assert len(patch_texts(page)) == len(patched.boundaries)


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopping_frees_the_slot(lm, visit, way):
    engine = SlowEngine(lm.module, 2, max_document_bytes=512)
    with running(lm, engine, max_document_bytes=512) as server:
        page = visit(server)
        # With this seed the document does not end before.
        generate(page, "a", 300, seed=28)
        expect(page.locator("#text")).to_have_text(re.compile("^a.{8}", re.DOTALL))
        assert server.worker.stats.num_decoding == 1
        if way == "button":
            page.get_by_role("button", name="Stop").click()
        else:
            page.keyboard.press("Escape")
        expect(page.locator("#status")).to_contain_text("Stopped after")
        server.wait_until(lambda: server.worker.stats.num_decoding == 0, seconds=2)
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        shown = page.locator("#text").text_content()
        page.wait_for_timeout(200)
        assert page.locator("#text").text_content() == shown
        assert page.locator("#error").is_hidden()


SCRIPTS = {
    "emoji": "é🙂 日本 👩‍👩‍👧",
    "right to left": "سلام دنیا — שלום",
}


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
@pytest.mark.parametrize("size", [1, 3])
def test_characters_are_shown_once(lm, visit, text, size):
    """Also if their bytes belong to several patches."""
    data = text.encode()
    with running(lm, TextEngine(data, size, most=len(data))) as server:
        page = visit(server)
        # Without its request for patches at the end, the trace's stay.
        page.route("**/v1/patches", lambda route: route.abort())
        generate(page, "", len(data))
        expect(page.locator("#status")).to_contain_text("Done")
        expect(page.locator("#text")).to_have_text(text, use_inner_text=False)
        expect(page.locator("#text .patch")).to_have_count(-(-len(data) // size))
        starts = {len(text[:i].encode()) for i in range(len(text))}
        num_split = sum(
            any(at % size == 0 for at in range(begin + 1, begin + len(c.encode())))
            for begin, c in zip(sorted(starts), text, strict=True)
        )
        expect(page.locator("#text .split")).to_have_count(num_split)
        is_rtl = text is SCRIPTS["right to left"]
        rects = page.evaluate(
            """() => [...document.querySelectorAll('#text .patch')].map(
              e => e.getBoundingClientRect()).filter(r => r.width > 6).map(r => r.x)"""
        )
        if size == 3:
            assert (rects[0] > rects[1]) == is_rtl


def test_bytes_that_form_no_characters_are_escaped(lm, visit):
    data = b"a\xf0\x9f\xffb\xe2\x82\xac\x00\xc3"
    with running(lm, TextEngine(data, 2, most=len(data))) as server:
        page = visit(server)
        generate(page, "", len(data))
        is_done(page)
        expect(page.locator("#text")).to_have_text("a\\xF0\\x9F\\xFFb€\\x00\\xC3")
        assert page.locator("#text .hex").all_text_contents() == [
            "\\xF0", "\\x9F", "\\xFF", "\\x00", "\\xC3",
        ]  # fmt: skip
        assert page.locator("#strip .hex").first.text_content() == "F0"


def test_markup_is_shown_as_text(lm, visit):
    markup = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    with running(lm, TextEngine(markup.encode(), 5, most=len(markup)), name="<b>m</b>") as server:
        page = visit(server)
        generate(page, markup, len(markup))
        is_done(page)
        expect(page.locator("#text")).to_have_text(markup * 2)
        expect(page.locator("h1")).to_have_text("bytelm <b>m</b>")
        page.get_by_role("tab", name="Compare rules").click()
        page.get_by_role("button", name="Take the generated text").click()
        expect(page.locator("#compare-status")).to_contain_text("Compared")
        assert page.locator("main img, main script, h1 b").count() == 0


def test_errors_are_shown(tiny, visit, lm):
    page = visit(tiny)
    error = page.get_by_role("alert")
    generate(page, "a" * 390, 20)
    expect(error).to_contain_text("390")
    generate(page, "a" * 500, 20)
    expect(error).to_contain_text("500")
    # It goes away once something works.
    generate(page, "ab", 5)
    is_done(page)
    expect(error).to_have_count(0)


def test_says_that_the_server_is_gone(lm, visit):
    with running(lm) as server:
        page = visit(server)
    generate(page, "a", 5)
    expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_says_that_the_engine_failed_in_the_middle(lm, visit):
    engine = TextEngine(b"abc", seconds=0.02)
    with running(lm, engine) as server:
        page = visit(server)
        generate(page, "", 500)
        expect(page.locator("#text")).to_have_text(re.compile("^abc"))
        engine.data = None
        expect(page.get_by_role("alert")).to_contain_text("could not answer")
        # What was generated stays.
        expect(page.locator("#text")).to_have_text(re.compile("^abc"))
        engine.data = b"abc"


def test_asks_for_a_key(lm, visit):
    with running(lm, api_keys=("kéy",)) as server:
        page = visit(server)
        alert, key = page.get_by_role("alert"), page.get_by_label("API key")
        expect(alert).to_contain_text("an API key is needed")
        expect(key).to_be_focused()
        key.fill("wrong")
        page.keyboard.press("Enter")
        expect(alert).to_contain_text("the API key is wrong")
        key.fill("kéy")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("tiny")
        expect(key).to_be_hidden()
        generate(page, "a", 5)
        is_done(page)


def test_the_threshold_moves_patches(tiny, visit):
    page = visit(tiny)
    prompt = "Patches at another threshold."
    generate(page, prompt, 0)
    is_done(page)
    slider = page.get_by_role("slider", name="Threshold")
    reset = page.get_by_role("button", name="Model's own")
    own = numbers(page)
    expect(reset).to_be_disabled()
    entropies = tiny.server.lm.patch(prompt).entropies
    middle = round(float(sorted(entropies)[len(entropies) // 2]), 2)
    counts = []
    for value in (0, middle, 6):
        slider.fill(str(value))
        patched = tiny.server.lm.patch(prompt, threshold=value)
        counts.append(len(patched.boundaries))
        expect(page.locator("#text .patch")).to_have_count(counts[-1])
        expect(page.locator("#status")).to_contain_text(f"{counts[-1]} patches")
        assert numbers(page)["Patches"] == str(counts[-1])
        assert page.locator("#text").text_content() == prompt
    assert counts[0] == len(prompt)
    assert counts[0] > counts[1] > counts[2]
    assert numbers(page)["FLOPs per byte"] != own["FLOPs per byte"]
    reset.click()
    expect(page.locator("#threshold-value")).to_contain_text("the model's own")
    expect(page.locator("#text .patch")).to_have_count(int(own["Patches"]))


def test_rules_are_compared(tiny, visit):
    page = visit(tiny)
    page.get_by_role("tab", name="Compare rules").click()
    text = f"two words\n{SCRIPTS['right to left']}"
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#compare-status")).to_have_text("Compared 7 rules.")
    rows = page.locator("#rules tr")
    lm = tiny.server.lm
    for kind in ("byte", "space", "static", "entropy"):
        row = rows.filter(has=page.get_by_role("rowheader", name=kind, exact=True))
        patched = lm.patch(text, kind)
        cells = row.locator(".number").all_text_contents()
        assert cells[:2] == [str(len(patched.boundaries))] * 2
        assert cells[2] == f"{patched.patch_size:.2f}"
        assert float(cells[3].split()[0]) > 0
        section = page.locator("#compared section").filter(
            has=page.get_by_role("heading", name=kind, exact=True)
        )
        expect(section.locator(".patch")).to_have_count(len(patched.boundaries))
        expect(section.locator(".text")).to_have_text(text)
    length = page.get_by_label("length of the static rule")
    length.fill("2")
    length.press("Enter")
    static = rows.filter(has=page.get_by_role("rowheader", name="static", exact=True))
    num_patches = len(lm.patch(text, "static", length=2).boundaries)
    expect(static.locator(".number").first).to_have_text(str(num_patches))


def test_a_rule_that_cannot_be_applied_is_named(tiny, visit):
    page = visit(tiny)
    page.get_by_role("tab", name="Compare rules").click()
    length = page.get_by_label("length of the static rule")
    length.fill("0")
    length.press("Tab")
    expect(page.get_by_role("alert")).to_contain_text("length")
    length.fill("3")
    length.press("Tab")
    expect(page.locator("#compare-status")).to_have_text("Compared 1 rule.")
    expect(page.get_by_role("alert")).to_have_count(0)
    page.get_by_label("Text", exact=True).fill("a" * 500)
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text("500")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(tiny, visit, scheme):
    """At least 4.5 for text, 3 for bars, lines and edges (WCAG 2.2, 1.4.3 and 1.4.11)."""
    page = visit(tiny)
    page.emulate_media(color_scheme=scheme)
    names = [
        "page", "card", "ink", "muted", "edge", "accent", "on-accent", "error-page", "error",
        "mark", "bar", "bar-begin", "line", "c0", "c1", "c2", "c3",
    ]  # fmt: skip
    colours = page.evaluate(
        """names => { const style = getComputedStyle(document.documentElement);
             return names.map(name => style.getPropertyValue('--' + name).trim()); }""",
        names,
    )
    luminance = {}
    for name, colour in zip(names, colours, strict=True):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        luminance[name] = sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(one, other):
        low, high = sorted((luminance[one], luminance[other]))
        return (high + 0.05) / (low + 0.05)

    patches = ["c0", "c1", "c2", "c3"]
    for name in ["page", "card", *patches]:
        for text in ("ink", "muted"):
            assert contrast(text, name) >= 4.5, (text, name)
    for one, other in (("error", "error-page"), ("on-accent", "accent"), ("accent", "page")):
        assert contrast(one, other) >= 4.5, (one, other)
    for name in patches:
        for shape in ("mark", "bar", "bar-begin", "line", "accent"):
            assert contrast(shape, name) >= 3, (shape, name)
    assert contrast("edge", "card") >= 3


def test_a_patch_shows_its_bytes(tiny, visit):
    page = visit(tiny)
    generate(page, "né", 0)
    is_done(page)
    page.get_by_role("slider", name="Threshold").fill("0")
    expect(page.locator("#text .patch")).to_have_count(3)
    page.locator("#strip .column").nth(1).hover()
    detail = page.locator("#detail")
    expect(detail).to_contain_text("Patch 2 of 3: 1 byte")
    expect(detail.locator("tr").first).to_have_text("byteC3")
    entropy = tiny.server.lm.patch("né").entropies[1]
    expect(detail.locator("tr").last).to_have_text(f"entropy{entropy:.2f}")
    page.locator("#text .patch").nth(0).hover()
    expect(detail.locator("tr").first).to_have_text("byte6E")


def test_everything_works_by_keyboard(tiny, visit):
    page = visit(tiny)
    press, focused = page.keyboard.press, page.locator(":focus")

    def tab_to(locator):
        for _ in range(20):
            press("Tab")
            if locator.evaluate("e => e === document.activeElement"):
                style = focused.evaluate("e => getComputedStyle(e).outlineStyle")
                assert style == "solid"
                return
        raise AssertionError("it cannot be reached by keyboard")

    tab_to(page.locator("#prompt"))
    page.keyboard.type("By keyboard")
    tab_to(page.locator("summary").first)
    press("Enter")
    tab_to(page.locator("#max_tokens"))
    press("Control+A")
    page.keyboard.type("0")
    tab_to(page.locator("#start"))
    press("Enter")
    is_done(page)
    expect(page.locator("#start")).to_be_focused()
    tab_to(page.locator("#threshold"))
    before = numbers(page)["Patches"]
    press("Home")
    expect(page.locator("#text .patch")).to_have_count(len("By keyboard"))
    assert before != str(len("By keyboard"))
    tab_to(page.locator("#text"))
    press("End")
    expect(page.locator("#detail")).to_contain_text("Patch 11 of 11")
    press("ArrowLeft")
    expect(page.locator("#text [aria-selected=true]")).to_have_text("r")
    expect(page.locator("#text")).to_have_attribute("aria-activedescendant", "patch-9")
    expect(page.locator("#patch-said")).to_contain_text("Patch 10 of 11: 1 byte, entropy")
    page.locator("#tab-generate").focus()
    press("ArrowRight")
    expect(page.get_by_role("tab", name="Compare rules")).to_be_focused()
    tab_to(page.get_by_role("button", name="Compare", exact=True))
    press("Enter")
    expect(page.locator("#compare-status")).to_contain_text("Compared")


def test_long_texts_draw_only_the_columns_in_view(lm, visit):
    with running(lm, max_document_bytes=20_000) as server:
        page = visit(server)
        generate(page, "long text " * 1500, 0)
        is_done(page)
        assert page.locator("#strip .column").count() < 400
        page.locator("#strip").evaluate("e => { e.scrollLeft = e.scrollWidth; }")
        expect(page.locator("#strip .column[data-byte='14999']")).to_have_count(1)
        assert page.locator("#strip .column").count() < 400


def test_models_without_a_rule(visit):
    config = TransformerConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=48, window=8)
    lm = LanguageModel(random_byte_lm(), CheckpointConfig(model=config))
    with running(lm) as server:
        page = visit(server)
        generate(page, "plain bytes", 8, seed=1)
        is_done(page)
        # The slider shows patches that an entropy rule would make.
        assert numbers(page)["Global steps"] == "—"
        page.get_by_role("slider", name="Threshold").fill("6")
        expect(page.locator("#text .patch")).to_have_count(1)


def test_token_models(visit):
    """They have neither patches nor entropies of bytes."""
    model = TransformerConfig(dim=32, num_layers=2, num_heads=2, ffn_dim=48, vocab_size=300)
    lm = LanguageModel(token_model().eval(), CheckpointConfig(model=model, tokens=True))
    with running(lm) as server:
        page = visit(server)
        generate(page, "a cat", 8, seed=1)
        expect(page.locator("#status")).to_contain_text("Done")
        expect(page.locator("#text")).to_have_text(re.compile("^a cat."))
        expect(page.get_by_role("slider")).to_have_count(0)
        expect(page.get_by_role("heading", name="Bytes")).to_be_visible()
        assert page.locator("#strip .bar").count() == 0
        assert numbers(page)["Patches"] == "—"
        page.get_by_role("tab", name="Compare rules").click()
        expect(page.locator("#rules tr")).to_have_count(3)


def test_files_of_the_page(tiny):
    for path, kind in (
        ("/", "text/html"), ("/app.js", "javascript"), ("/style.css", "text/css"),
        ("/icon.svg", "image/svg+xml"),
    ):  # fmt: skip
        found = httpx.get(tiny.url + path)
        assert found.status_code == 200
        assert kind in found.headers["content-type"]
        assert found.headers["content-security-policy"].startswith("default-src 'self'")
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|eval\(", found.text)
    assert httpx.get(f"{tiny.url}/other.js").status_code == 404
