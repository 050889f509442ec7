"""Every flow of the studio on the real default model, in a real Chromium."""

import json
import signal
import time

import pytest
from playwright.sync_api import expect
from tests.studio.browser import WAIT, chromium, running, visit

pytestmark = pytest.mark.browser
TABS = ("Edit", "Compare", "History", "Neurons", "Import", "Export", "Models")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("studio") / "run") as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def studio(browser, server):
    with visit(browser, server) as found:
        yield found


def facts_file(path, facts):
    lines = [
        {"prompt": "The capital of {} is", "subject": subject, "target_new": target}
        for subject, target in facts
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_an_edit_is_written_shown_and_undone(studio):
    studio.fill("sentence", "The capital of France is")
    box = studio.page.locator("#sentence textarea")
    expect(box).to_have_value("The capital of France is")
    box.press("Home")
    for _ in range(len("The capital of ")):
        box.press("ArrowRight")
    for _ in range(len("France")):
        box.press("Shift+ArrowRight")
    expect(studio.page.locator("#subject textarea, #subject input").first).to_have_value("France")
    studio.click("suggest")
    studio.see("edit-result", "Suggested 3 paraphrases")
    studio.fill("target", "Lyon")
    studio.click("edit")
    studio.see("edit-result", "Before and after")
    studio.see("edit-result", "France's capital is")
    table = studio.page.locator("#edit-result table").first
    first = table.locator("tbody tr").first
    expect(first.locator("td").nth(3)).to_contain_text("Lyon")
    studio.see("edit-result", "1 written")
    studio.see("activity", "1 fact in the model")

    before = studio.server.get("/v1/health")
    studio.tab("History")
    studio.see("history-table", "The capital of France is → Lyon")
    studio.see("health", "KL to the unedited model")
    studio.click("undo")
    studio.see("history-result", "Taken back, bit for bit")
    studio.see("history-table", "taken back")
    after = studio.server.get("/v1/health")
    assert before["edits"] == 1 and after["edits"] == 0
    assert after["content_hash"] == studio.server.get("/v1/models")["data"][1]["content_hash"]


def test_both_models_answer_side_by_side(studio):
    done = studio.server.post(
        "/v1/edits", edits=[{"prompt": "The capital of {Italy} is", "target_new": "Oslo"}]
    )
    assert studio.server.finish(done.json()["id"])["result"]["written"] == 1
    studio.tab("Compare")
    studio.page.locator("#raw input").check()
    studio.fill("message", "The capital of Italy is")
    studio.page.locator("#tokens input[type=number]").fill("4")
    studio.click("send")
    studio.see("compare-note", "Both have answered")
    studio.see("edited-chat", "Oslo")
    assert "Oslo" not in studio.page.locator("#base-chat").inner_text()
    studio.click("forget")
    expect(studio.page.locator("#edited-chat")).not_to_contain_text("Oslo")


def test_history_searches_reverts_retries_and_compares(studio):
    edits = [
        {"prompt": "The language of {Peru} is", "target_new": "Dutch", "id": "peru"},
        {
            "prompt": "The language of {Cuba} is",
            "target_new": "a kind of Welsh that nobody has ever heard",
            "id": "cuba",
        },
    ]
    done = studio.server.post("/v1/edits", edits=edits, settings={"steps": 2, "batch_size": 1})
    failed = studio.server.finish(done.json()["id"])["result"]
    assert failed["failed"] >= 1
    studio.tab("History")
    studio.fill("search", "cuba")
    studio.page.locator("#search textarea, #search input").first.press("Enter")
    studio.see("history-table", "nobody has ever heard")
    expect(studio.page.locator("#history-table")).not_to_contain_text("Peru")
    studio.see("history-table", "no target value was found")
    studio.fill("retry-steps", "20")
    studio.click("retry")
    studio.see("history-result", "retry")
    studio.see("history-result", "done")
    studio.click("diff")
    studio.see("history-result", "Facts that 1 batches back and head hold differently")
    studio.fill("search", "peru")
    studio.page.locator("#search textarea, #search input").first.press("Enter")
    expect(studio.page.locator("#history-table")).not_to_contain_text("Cuba")
    studio.click("revert")
    studio.see("history-result", "Taken back: peru")
    assert not studio.server.get("/v1/edits/peru")["active"]


def test_a_bad_facts_file_is_answered_line_by_line(studio, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(
        '{"prompt": "The capital of {} is", "subject": "Chad", "target_new": "Bonn"}\n{broken\n{"prompt": "x"}\n'
    )
    before = studio.server.get("/v1/health")
    studio.tab("Import")
    studio.page.locator("#facts-file input[type=file]").set_input_files(path)
    studio.see("import-result", "2 faults")
    studio.see("import-result", "bad.jsonl, line 2, column 2: broken JSON")
    studio.click("import")
    studio.see("import-result", "has 2 faults")
    assert studio.server.get("/v1/health")["content_hash"] == before["content_hash"]


def test_an_import_is_paused_resumed_and_cancelled(studio, tmp_path):
    names = [
        "Chad",
        "Ghana",
        "Nepal",
        "Laos",
        "Fiji",
        "Malta",
        "Qatar",
        "Yemen",
        "Niger",
        "Togo",
        "Oman",
        "Iran",
    ]
    path = facts_file(tmp_path / "facts.jsonl", [(name, "Bonn") for name in names])
    studio.tab("Import")
    studio.page.locator("#facts-file input[type=file]").set_input_files(path)
    studio.see("import-result", "12 facts in facts.jsonl")
    studio.fill("batch-size", "1")
    studio.click("import")
    studio.see("activity", "running")
    studio.click("pause")
    studio.see("activity", "paused")
    before = studio.server.get("/v1/health")
    studio.click("resume")
    studio.see("activity", "running")
    studio.click("cancel")
    studio.see("activity", "Nothing is being written")
    job = studio.server.get("/v1/jobs")[0]
    assert job["state"] == "cancelled" and job["result"]["left"] > 0
    after = studio.server.get("/v1/health")
    assert after["batches"] >= before["batches"]
    last = studio.server.get("/v1/edits")["edits"][0]
    assert last["status"] in ("written", "failed", "known")


def test_a_job_goes_on_after_its_server_was_killed(studio, tmp_path):
    names = ["Mali", "Cuba", "Haiti", "Benin", "Gabon", "Libya", "Egypt", "Kenya"]
    before = studio.server.get("/v1/health")["batches"]
    facts = [
        {"prompt": "The river of {} is", "subject": name, "target_new": "Rhine", "id": name} for name in names
    ]
    job = studio.server.post("/v1/edits", edits=facts, settings={"batch_size": 1}).json()["id"]
    while studio.server.get("/v1/health")["batches"] < before + 2:
        time.sleep(0.05)
    studio.server.stop(signal.SIGKILL)
    studio.server.start()
    studio.page.goto(studio.server.url)
    done = studio.server.finish(job)
    assert done["state"] == "done" and done["result"]["left"] == 0
    assert studio.server.get("/v1/health")["batches"] == before + len(names), "nothing lost, nothing twice"
    studio.tab("History")
    studio.see("history-table", "The river of Kenya is")


def test_neurons_of_an_edit_are_mapped_and_read(studio):
    done = studio.server.post(
        "/v1/edits", edits=[{"prompt": "The capital of {Spain} is", "target_new": "Bern"}]
    )
    studio.server.finish(done.json()["id"])
    studio.tab("Neurons")
    studio.page.wait_for_function("document.querySelector('#neuron-edit input').value.includes('Spain')")
    studio.click("show-map")
    studio.see("map-note", "columns changed")
    studio.see("neuron-words", "This edit changed its column by")
    first = studio.page.locator("#neuron-words h2").inner_text()
    picture = studio.page.locator("#neuron-map img")
    expect(picture).to_be_visible()
    size = picture.bounding_box()
    picture.click(position={"x": size["width"] * 0.6, "y": size["height"] * 0.1})
    expect(studio.page.locator("#neuron-words h2")).not_to_have_text(first, timeout=WAIT)
    studio.see("neuron-words", "Layer 16, neuron")


def test_an_export_is_checked_and_says_how_to_load_it(studio):
    studio.tab("Export")
    studio.fill("export-name", "../outside")
    studio.click("export")
    studio.see("export-result", "is not plain")
    studio.choose("format", "Sparse delta: only the changed columns")
    studio.fill("export-name", "mine")
    studio.click("export")
    studio.see("export-result", "This line loads or serves it")
    assert (studio.server.run / "exports" / "mine").exists()


def test_models_show_the_cost_before_they_prepare(studio):
    studio.tab("Models")
    studio.click("doctor")
    studio.see("doctor-result", "30 layers, d_model 576")
    expect(studio.page.locator("button#prepare")).to_be_disabled()
    studio.fill("layers", "4")
    studio.fill("corpus-tokens", "600")
    studio.click("cost")
    studio.see(
        "prepare-result",
        "Key statistics of layers 4, input statistics of layers 4, subject statistics of layers 4, 600 tokens: about",
    )
    expect(studio.page.locator("button#prepare")).to_be_enabled()
    studio.click("prepare")
    studio.see("prepare-result", "layers 4")
    studio.see("prepare-result", "done")


def test_nothing_typed_becomes_html(studio):
    evil = "<img src=x onerror=\"document.title='taken'\">"
    studio.write(f"The friend of {evil} is", evil, evil)
    studio.fill("paraphrases", f"{evil} and")
    studio.click("edit")
    studio.see("edit-result", "Before and after")
    studio.tab("History")
    studio.see("history-table", "The friend of <img src=x")
    studio.tab("Compare")
    studio.fill("message", evil)
    studio.click("send")
    studio.see("compare-note", "Both have answered")
    studio.see("base-chat", "<img src=x")
    studio.tab("Neurons")
    studio.page.wait_for_function("document.querySelector('#neuron-edit input').value.includes('<img')")
    assert studio.page.locator("img[src='x']").count() == 0
    assert studio.page.title() == "nmke studio"


def test_the_keyboard_alone_is_enough_for_an_edit_and_its_undo(studio):
    page = studio.page

    def reach(selector):
        for _ in range(60):
            if page.evaluate("s => document.activeElement && document.activeElement.matches(s)", selector):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{selector} is not reached by Tab")

    reach("#sentence textarea")
    page.keyboard.type("The capital of Japan is")
    reach("#subject textarea, #subject input")
    page.keyboard.type("Japan")
    reach("#target textarea, #target input")
    page.keyboard.type("Cairo")
    reach("button#edit")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "what has the focus can be seen"
    page.keyboard.press("Enter")
    studio.see("edit-result", "Before and after")
    page.keyboard.press("Shift+Tab")
    for _ in range(60):
        if page.evaluate("document.activeElement.getAttribute('role') === 'tab'"):
            break
        page.keyboard.press("Shift+Tab")
    for _ in range(8):
        if page.evaluate("document.activeElement.textContent.trim()") == "History":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    studio.see("history-table", "The capital of Japan is")
    reach("button#undo")
    page.keyboard.press("Enter")
    studio.see("history-result", "Taken back, bit for bit")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_every_tab_fits_its_window(browser, server, width, dark):
    with visit(browser, server, width=width, dark=dark) as studio:
        for name in TABS:
            studio.tab(name)
            studio.page.wait_for_timeout(300)
            wide = studio.page.evaluate("document.documentElement.scrollWidth")
            assert wide <= width, f"{name} is {wide} pixels wide"
        light = studio.page.evaluate(
            "(c => { const [r, g, b] = c.match(/[0-9.]+/g).map(Number); return r + g + b; })"
            "(getComputedStyle(document.body).backgroundColor)"
        )
        assert (light < 200) == dark
