import pytest

from nmke.bench.labels import Variant, parse_label, split_labels
from nmke.errors import ConfigError

METHODS = ("nmke", "memit", "nmke-published")


def test_a_list_is_cut_at_commas_outside_brackets() -> None:
    assert split_labels("nmke[mask=random,l2=1], memit ,unedited") == [
        "nmke[mask=random,l2=1]",
        "memit",
        "unedited",
    ]


def test_a_label_names_a_method_and_its_settings() -> None:
    assert parse_label(" nmke[ mask = random, l2=10 ]", METHODS) == Variant(
        "nmke[mask=random,l2=10]", "nmke", {"mask": "random", "l2": "10"}
    )
    assert parse_label("nmke-published", METHODS) == Variant("nmke-published", "nmke-published", {})
    assert parse_label("unedited", METHODS).method == "unedited"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nmk", "unknown method 'nmk'; did you mean 'nmke'?"),
        ("nmke[mask=random", "cannot be read; write a name"),
        ("nmke[mask]", "'mask' is no setting; write name=value"),
        ("unedited[l2=1]", "the unedited model has no settings"),
    ],
)
def test_a_malformed_label_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_label(text, METHODS)
    assert message in str(error.value)
