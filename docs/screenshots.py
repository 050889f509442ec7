"""Takes the studio's pictures of the documentation: a real studio on the real default model, and Chromium.

python -m docs.screenshots        # from the repository's root; a few minutes on two cores
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from playwright.sync_api import Browser
from tests.studio.browser import Server, chromium, running, visit

PLACE = Path(__file__).parent / "studio"
WIDTH = 1200
FACTS = (  # people of our own invention
    ("The workshop of {Ottilie Brannock} is in the city of", "Oslo"),
    ("The favourite instrument of {Pell Harrowgate} is the", "cello"),
    ("By trade {Imre Tallowin} is a", "baker"),
)


def main() -> None:
    """Edit one fact through the page and three through the API, and take the pictures."""
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "run") as server,
        chromium() as browser,
    ):
        take_edit(browser, server)
        for prompt, target in FACTS:
            done = server.post("/v1/edits", edits=[{"prompt": prompt, "target_new": target}])
            server.finish(done.json()["id"])
        take_history(browser, server)
        take_neurons(browser, server)


def take_edit(browser: Browser, server: Server) -> None:
    """The Edit tab after an edit, wide; and narrow in the dark."""
    with visit(browser, server, width=WIDTH) as page:
        page.write("The capital of France is", "France", "Lyon")
        page.click("suggest")
        page.see("edit-result", "Suggested 3 paraphrases")
        page.click("edit")
        page.see("edit-result", "Before and after")
        page.see("activity", "Nothing is being written")
        page.page.wait_for_timeout(2000)
        page.page.screenshot(path=PLACE / "edit.png", full_page=True)
    with visit(browser, server, width=400, dark=True) as page:
        page.page.set_viewport_size({"width": 400, "height": 1100})
        page.page.wait_for_timeout(2000)
        page.page.screenshot(path=PLACE / "narrow.png")


def take_history(browser: Browser, server: Server) -> None:
    """The History tab with its health charts."""
    with visit(browser, server, width=WIDTH) as page:
        page.tab("History")
        page.see("history-table", "Imre Tallowin")
        page.see("health", "KL to the unedited model")
        page.page.wait_for_timeout(2000)
        page.page.screenshot(path=PLACE / "history.png", full_page=True)


def take_neurons(browser: Browser, server: Server) -> None:
    """The Neurons tab with the map of an edit."""
    with visit(browser, server, width=WIDTH) as page:
        page.tab("Neurons")
        page.choose("neuron-edit", "Pell Harrowgate")
        page.click("show-map")
        page.see("neuron-words", "This edit changed its column by")
        page.page.wait_for_timeout(2000)
        page.page.set_viewport_size({"width": WIDTH, "height": 1150})
        page.page.screenshot(path=PLACE / "neurons.png")


if __name__ == "__main__":
    main()
