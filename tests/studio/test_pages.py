import numpy
import pytest
import torch
from tests import runs
from tests.studio.conftest import wait_for

from nmke.batch_file import LayerWrite
from nmke.errors import RequestError
from nmke.studio.api import FaultsError, import_file
from nmke.studio.limits import StudioError
from nmke.studio.pages import activity, history, neurons
from nmke.studio.pages.common import follow, job_html, problem_html, say
from nmke.studio.pages.compare import transcript
from nmke.studio.pages.edit import changed_settings, make_request
from nmke.types import Columns, EditRequest

EVIL = "<img src=x onerror=alert(1)>"


def test_nothing_typed_becomes_html(studio):
    request = EditRequest("The train had left for {}", EVIL, EVIL, paraphrases=(EVIL,))
    job = wait_for(studio.submit_edits([request], watch=True))
    pages = [
        job_html(job),
        activity.activity_html(studio, job),
        history.html("history.html", places=studio.edits(), filtered=False),
        history.html("diff.html", rows=[(EVIL, EVIL, None)], names=[EVIL, EVIL], same=False),
        problem_html(RequestError(EVIL)),
        problem_html(FaultsError([f"{EVIL}, line 3: {EVIL}"])),
        say(EVIL),
        transcript(EVIL, [{"role": "user", "content": EVIL}, {"role": "assistant", "content": EVIL}]),
    ]
    for page in pages:
        assert "&lt;img" in page and "<img" not in page


def test_a_followed_job_is_shown_to_its_end(studio):
    shown = list(follow(studio.submit_edits(runs.facts(2), {"batch_size": 1})))
    assert 'data-state="done"' in shown[-1] and "written" in shown[-1]
    failed = list(follow(studio.worker.submit("undo", {"n": 9})))
    assert "undo of 9 batches asked" in failed[-1]


def test_the_strip_says_what_is_being_written(studio):
    assert "Nothing is being written" in activity.activity_html(studio, activity.current(studio))
    with studio.gate.turn():
        job = studio.submit_edits(runs.facts(1))
        wait_for(job, "running")
        other = studio.submit_undo(1)
        assert activity.current(studio) is job
        text = activity.activity_html(studio, job)
        assert 'data-state="running"' in text and "1 more waiting" in text
        studio.worker.cancel(other.id)
    wait_for(job)
    assert activity.current(studio) is None


def test_health_is_charted_once_it_was_looked_at(open_studio):
    studio = open_studio(health_every=1, on_collapse="continue")
    assert history.health_html(studio.batches(9)) == ""
    wait_for(studio.submit_edits(runs.facts(3), {"batch_size": 1}))
    page = history.health_html(studio.batches(9))
    assert page.count("<svg") == 3 and page.count("<circle") >= 6 and "retention" in page


def test_the_edit_form_makes_the_request_it_shows():
    request = make_request(
        "The capital of France is ", "France", " Lyon ", "A\n\n B ", "The capital of Italy is"
    )
    assert (request.prompt, request.subject, request.target_new) == ("The capital of {} is", "France", "Lyon")
    assert request.paraphrases == ("A", "B") and request.neighborhood[0].prompt == "The capital of Italy is"
    assert make_request("The capital of {France} is", "", "Lyon", "", "").subject == "France"
    with pytest.raises(RequestError, match="names no subject"):
        make_request("The capital of France is", "", "Lyon", "", "")


def test_only_changed_settings_are_sent():
    config = runs.config()
    given = {"steps": config.steps, "method": "memit", "mask": None}
    assert changed_settings(config, given) == {"method": "memit"}


def write(columns, rows, d_mlp=6, owners=(0, 1)):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(4, rows, generator=generator)
    right = torch.zeros(rows, d_mlp)
    right[:, columns] = torch.randn(rows, len(columns), generator=generator)
    before = torch.randn(4, len(columns), generator=generator)
    index = torch.tensor(columns, dtype=torch.int32)
    return LayerWrite(
        left, right, torch.zeros(rows, d_mlp), torch.tensor(owners), Columns(index, before), None
    )


def test_an_edits_map_is_its_own_part_of_each_column():
    layer = write([1, 4], 3, owners=(0, 1, 0))
    found = neurons.edit_map({5: layer}, 0).sizes[5]
    own = layer.left[:, [0, 2]].double() @ layer.right[[0, 2]].double()
    expected = numpy.zeros(6)
    expected[[1, 4]] = (own.norm(dim=0)[[1, 4]] / layer.before.values.double().norm(dim=0)).numpy()
    numpy.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_neuron_map_is_read_back_from_its_pixels():
    wide = write(list(range(0, 200, 3)), 1, d_mlp=200, owners=(0,))
    found = neurons.edit_map({2: wide, 3: wide}, 0)
    picture = found.picture()
    assert picture.shape == ((3 + neurons.GAP + 3) * neurons.CELL, neurons.ACROSS * neurons.CELL, 3)
    assert found.neuron_at(0, 0) == (2, 0)
    assert found.neuron_at(5 * neurons.CELL + 3, neurons.CELL + 1) == (2, neurons.ACROSS + 5)
    assert found.neuron_at(0, 3 * neurons.CELL) is None, "between two layers"
    assert found.neuron_at(7 * neurons.CELL, (3 + neurons.GAP) * neurons.CELL) == (3, 7)
    assert found.neuron_at(95 * neurons.CELL, 2 * neurons.CELL) is None, "behind the last neuron"
    layer, neuron, size = found.strongest(1)[0]
    assert size == max(wide.max() for wide in found.sizes.values()) and neuron % 3 == 0
    x, y = (neuron % neurons.ACROSS) * neurons.CELL, (neuron // neurons.ACROSS) * neurons.CELL
    assert tuple(picture[y, x]) == neurons.INK[1] and layer == 2
    assert tuple(picture[0, neurons.CELL]) == neurons.PAPER, "neuron 1 was left alone"


def test_neurons_of_an_edit_say_what_they_promote(studio):
    wait_for(studio.submit_edits(runs.facts(2)))
    found = neurons.load_map(studio, "e001")
    layer, neuron, _ = found.strongest(1)[0]
    page = neurons.words_html(studio, "e001", layer, neuron)
    assert f"Layer {layer}, neuron {neuron}" in page and page.count("<tr>") == 32
    with pytest.raises(StudioError, match="does not exist"):
        neurons.load_map(studio, "none")


def test_imports_leave_no_file_behind(studio):
    with pytest.raises(FaultsError, match="has 2 faults"):
        import_file(studio, b"{\n{", "facts.jsonl", {}, resume=False)
    assert [path.name for path in (studio.root / "studio").iterdir()] == ["jobs"]
