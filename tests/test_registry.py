"""Lookup by name, and the errors that name the nearest."""

import pytest

from nmke.attribution import neuron_scores
from nmke.editors import methods
from nmke.errors import ConfigError, unknown_name
from nmke.registry import Registry


@pytest.fixture
def tools() -> Registry[int]:
    registry: Registry[int] = Registry("tool")
    registry.register("hammer", 1, source="forge", summary="hits")
    registry.register("saw", 2, source="mill", summary="cuts")
    return registry


def test_things_are_found_by_name_in_order(tools):
    assert tools.names() == ("hammer", "saw")
    assert [entry.value for entry in tools] == [1, 2]
    assert tools.get("saw") == 2
    assert (tools.entry("saw").source, tools.entry("saw").summary) == ("mill", "cuts")
    assert "saw" in tools and "axe" not in tools


def test_register_gives_the_thing_back(tools):
    assert tools.register("axe", 3, source="forge", summary="splits") == 3


def test_a_name_is_taken_once(tools):
    with pytest.raises(ConfigError, match="tool 'saw' is registered twice; choose another name"):
        tools.register("saw", 3, source="", summary="")
    assert tools.get("saw") == 2


def test_unknown_names_are_answered_with_the_nearest(tools):
    with pytest.raises(
        ConfigError, match=r"unknown tool 'hamer'; did you mean 'hammer'\? Available: hammer, saw"
    ):
        tools.get("hamer")
    with pytest.raises(ConfigError, match=r"unknown tool 'xyz'; Available: hammer, saw"):
        tools.entry("xyz")


def test_an_empty_list_of_names_says_so():
    assert unknown_name("tool", "saw", ()) == "unknown tool 'saw'; Available: none"


@pytest.mark.parametrize("registry", [methods, neuron_scores], ids=["methods", "scores"])
def test_everything_registered_says_where_it_comes_from(registry):
    assert registry.names()
    for entry in registry:
        assert entry.source.strip() and entry.summary.strip()


def test_an_entry_says_what_it_needs_and_how_it_differs_from_its_source():
    registry: Registry[int] = Registry("thing")
    doc = "A thing.\n\nSource: a paper, eq. 2: y = x.\nDiffers: solved\nelsewhere: twice.\n"
    registry.register("one", 1, source="a paper", summary="a thing", needs=("statistics",), doc=doc)
    entry = registry.entry("one")
    assert entry.needs == ("statistics",) and entry.differs == "solved elsewhere: twice."
    registry.register("two", 2, source="a paper", summary="another")
    assert registry.entry("two").needs == () and registry.entry("two").differs == ""
