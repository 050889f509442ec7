from tests import runs

from nmke.evaluation.suggestions import other_subjects, paraphrase, suggest
from nmke.facts import bundled_facts


def test_attributes_are_asked_in_three_ways():
    found = paraphrase("The capital of {} is", "France")
    assert found[0] == "France's capital is"
    assert found[1] == "What is the capital of France? It is"
    assert all("France" in text and "{" not in text for text in found)


def test_other_sentences_get_something_in_front():
    assert all(text.endswith("Ada lived in") for text in paraphrase("{} lived in", "Ada"))


def test_subjects_of_our_own_facts_come_first_and_never_the_subject_itself():
    fact = bundled_facts()[0]
    found = other_subjects(runs.model(), fact.prompt, fact.subject)
    same = {other.subject for other in bundled_facts() if other.prompt == fact.prompt}
    assert len(found) == 3 and set(found) <= same - {fact.subject}


def test_the_model_lists_names_where_we_have_none(monkeypatch):
    model = runs.model()
    said = [
        " Italy, and Spain, France, France, , {x}, a name far too long to be one that anybody would give it, Per"
    ]
    monkeypatch.setattr(model, "generate", lambda *_, **__: said)
    assert other_subjects(model, "{} borders", "France") == ["Italy", "Spain"]
    assert suggest(model, "{} borders", "France").neighbours == ("Italy borders", "Spain borders")
