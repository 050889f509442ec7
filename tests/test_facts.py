"""Facts files: every shape and format read, every fault one error that names file, line and field."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nmke.errors import ConfigError, RequestError
from nmke.facts import FactsFile, bundled_facts, data_path, find_faults, parse_prompt, read_facts
from nmke.facts.json_array import _CHUNK
from nmke.types import Neighbor

FRANCE = {"id": "a", "prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}
ITALY = {"id": "b", "prompt": "The capital of {Italy} is", "target_new": "Turin", "target_true": "Rome"}
COUNTERFACT = {
    "case_id": 18,
    "requested_rewrite": {
        "prompt": "{}, created by",
        "relation_id": "P176",
        "target_new": {"str": "Honda", "id": "Q9584"},
        "target_true": {"str": "Porsche", "id": "Q40993"},
        "subject": "Porsche 911",
    },
    "paraphrase_prompts": ["Porsche 911 is developed by"],
    "neighborhood_prompts": ["Porsche 550, developed by"],
    "generation_prompts": ["Porsche 911 is sold by"],
}
ZSRE = {
    "subject": "Mount Erebus",
    "src": "On which continent is Mount Erebus?",
    "rephrase": "Where is Mount Erebus?",
    "alt": "Africa",
    "answers": ["Antarctica"],
    "pred": "Asia",
    "loc": "nq question: who sang the song",
    "loc_ans": "nobody",
}


def lines(*records: Any) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def read(tmp_path: Path, content: bytes, **options: Any) -> FactsFile:
    path = tmp_path / "facts.jsonl"
    path.write_bytes(content)
    return read_facts(path, **options)


# Subject marking


@pytest.mark.parametrize(
    ("prompt", "subject", "template", "found"),
    [
        ("The capital of {France} is", None, "The capital of {} is", "France"),
        ("The capital of { France } is", None, "The capital of {} is", "France"),
        ("The capital of {} is", "France", "The capital of {} is", "France"),
        ("The capital of France is", "France", "The capital of {} is", "France"),
        ("The capital of France is", " France ", "The capital of {} is", "France"),
        ("France, or {France}, has", "France", "France, or {}, has", "France"),
        ("{} is not France", "Italy", "{} is not France", "Italy"),
        ('{"city": "France"} has', "France", '{"city": "{}"} has', "France"),
        ("{a} and {b} for {France}", "France", "{a} and {b} for {}", "France"),
        ("if (x) { return } in Java", "Java", "if (x) { return } in {}", "Java"),
        ("Die Hauptstadt von Österreich ist", "Österreich", "Die Hauptstadt von {} ist", "Österreich"),
        ("中国の首都は", "中国", "{}の首都は", "中国"),
    ],
)
def test_parse_prompt_finds_the_subject(prompt: str, subject: str | None, template: str, found: str) -> None:
    assert parse_prompt(prompt, subject) == (template, found)


@pytest.mark.parametrize(
    ("prompt", "subject"), [("Cafe\u0301 X is", "Caf\u00e9"), ("Caf\u00e9 X is", "Cafe\u0301")]
)
def test_parse_prompt_takes_other_unicode_forms(prompt: str, subject: str) -> None:
    assert parse_prompt(prompt, subject) == ("{} X is", "Caf\u00e9")


@pytest.mark.parametrize(
    ("prompt", "subject", "message"),
    [
        ("The capital of Spain is", "France", "'France' is not in prompt .*put '{}' where it stands"),
        ("The capital of france is", "France", "upper and lower case"),
        ("France borders France by", "France", "more than once.*mark the one"),
        ("aaa", "aa", "more than once"),
        ("{France} and {France}", "France", "more than once"),
        ("{} and {}", "France", "2 places '{}'"),
        ("{France} and {}", "France", "2 places '{}'"),
        ("{} is", None, "names no subject: 0 "),
        ("The capital is", None, "names no subject: 0 .*mark it once"),
        ("{a} and {b}", None, "names no subject: 2 "),
        ("{a} and {}", None, "2 places"),
        ("{ } is", None, "empty subject"),
        ("{} is", "  ", "is empty; name what"),
    ],
)
def test_parse_prompt_refuses(prompt: str, subject: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_prompt(prompt, subject)


# Formats


def test_reads_every_format_alike(tmp_path: Path) -> None:
    spaced = json.dumps([FRANCE, ITALY], indent=2).encode()
    table = b"id,prompt,subject,target_new,target_true\na,The capital of {} is,France,Lyon,\n"
    table += b"b,The capital of {Italy} is,,Turin,Rome\r\n"
    expected = read(tmp_path, lines(FRANCE, ITALY))
    assert (expected.shape, expected.format, len(expected.requests)) == ("nmke", "jsonl", 2)
    assert expected.requests[1].text == "The capital of Italy is"
    for content, form in [
        (lines(FRANCE, ITALY), "jsonl"),
        (b"\xef\xbb\xbf\n" + lines(FRANCE) + b"\r\n\n" + lines(ITALY).strip(), "jsonl"),
        (spaced, "json"),
        (json.dumps([FRANCE, ITALY]).encode(), "json"),
        (table, "csv"),
    ]:
        for packed in (content, gzip.compress(content, mtime=0)):
            facts = read(tmp_path, packed)
            assert facts.requests == expected.requests
            assert facts.format == form


def test_csv_parts_paraphrases_and_keeps_quoted_commas_and_line_breaks(tmp_path: Path) -> None:
    facts = read(
        tmp_path,
        b'prompt,subject,target_new,paraphrases\n"In {}, one\nspeaks",Lima,"Basque, mostly",In {} people speak | B \n',
    )
    request = facts.requests[0]
    assert (request.text, request.target_new) == ("In Lima, one\nspeaks", "Basque, mostly")
    assert request.paraphrases == ("In Lima people speak", "B")


def test_our_shape_keeps_all_fields(tmp_path: Path) -> None:
    record = {
        **FRANCE,
        "id": 7,
        "target_true": "Paris",
        "relation": "capital",
        "paraphrases": ["{}'s capital is", "{France}: capital", "Plain"],
        "neighborhood": [{"prompt": "The capital of Italy is", "answer": "Rome"}, {"prompt": "P"}, "Q"],
    }
    request = read(tmp_path, lines(record)).requests[0]
    assert (request.id, request.target_true, request.relation) == ("nmke-7", "Paris", "capital")
    assert request.paraphrases == ("France's capital is", "France: capital", "Plain")
    assert request.neighborhood == (Neighbor("The capital of Italy is", "Rome"), Neighbor("P"), Neighbor("Q"))


def test_array_larger_than_the_window_is_streamed(tmp_path: Path) -> None:
    count = 2 * _CHUNK // 100
    records = [{**FRANCE, "id": f"é{index}", "subject": f"Landé {index}"} for index in range(count)]
    records[3]["target_new"] = "x" * 19_000
    facts = read(tmp_path, json.dumps(records, ensure_ascii=False, indent=1).encode())
    assert [request.id for request in facts.requests] == [f"é{index}" for index in range(count)]


def test_limit_stops_before_what_follows(tmp_path: Path) -> None:
    content = lines(FRANCE, ITALY) + b"{broken"
    facts = read(tmp_path, content, limit=1, offset=1)
    assert [request.id for request in facts.requests] == ["b"]
    assert facts.sha256 == read(tmp_path, content, limit=2).sha256
    with pytest.raises(RequestError, match="holds 2 records and 5 are left out"):
        read(tmp_path, lines(FRANCE, ITALY), offset=5)
    with pytest.raises(ConfigError, match="limit 0"):
        read(tmp_path, content, limit=0)


def test_ten_thousand_characters_are_allowed(tmp_path: Path) -> None:
    request = read(tmp_path, lines({**FRANCE, "prompt": "word " * 2000 + "{} is"})).requests[0]
    assert len(request.text) > 10_000


# Known shapes


def test_counterfact_as_published(tmp_path: Path) -> None:
    facts = read(tmp_path, lines(COUNTERFACT))
    request = facts.requests[0]
    assert facts.shape == "counterfact"
    assert (request.id, request.text, request.target_new) == (
        "counterfact-18",
        "Porsche 911, created by",
        "Honda",
    )
    assert (request.target_true, request.relation) == ("Porsche", "P176")
    assert request.paraphrases == ("Porsche 911 is developed by",)
    assert request.neighborhood == (Neighbor("Porsche 550, developed by", "Porsche"),)
    assert facts.cases[0].generation_prompts == ("Porsche 911 is sold by",)
    assert facts.notes == ()


def test_counterfact_uses_derived_fields_only_when_asked(tmp_path: Path) -> None:
    extra = {"paraphrase_prompts_rebuilt": ["P"], "neighborhood_prompts_pool": ["N"]}
    plain = read(tmp_path, lines({**COUNTERFACT, **extra}))
    assert plain.requests == read(tmp_path, lines(COUNTERFACT)).requests
    assert "paraphrase_prompts_rebuilt" in plain.notes[0]
    facts = read(tmp_path, lines({**COUNTERFACT, **extra}), derived=True)
    assert facts.requests[0].paraphrases[1:] == ("P",)
    assert facts.requests[0].neighborhood[1:] == (Neighbor("N", "Porsche"),)
    assert any("not CounterFact's own" in note for note in facts.notes)


def test_zsre_as_published(tmp_path: Path) -> None:
    facts = read(tmp_path, json.dumps([ZSRE]).encode())
    request = facts.requests[0]
    assert (facts.shape, request.prompt) == ("zsre", "On which continent is {}?")
    assert (request.target_new, request.target_true) == ("Africa", "Antarctica")
    assert request.paraphrases == ("Where is Mount Erebus?",)
    assert request.neighborhood == (Neighbor("nq question: who sang the song", "nobody"),)


def test_zsre_skips_what_cannot_be_edited_and_says_so(tmp_path: Path) -> None:
    other = {**ZSRE, "src": "On which continent is it?", "case_id": "no-subject"}
    empty = {**ZSRE, "alt": " ", "case_id": "no-target"}
    facts = read(tmp_path, lines(ZSRE, other, empty, {**ZSRE, "answers": None, "alt": "Asia"}))
    assert [request.target_new for request in facts.requests] == ["Africa", "Asia"]
    assert "2 facts skipped (no-subject, no-target)" in facts.notes[0]
    with pytest.raises(
        RequestError, match=r"no fact that can be edited among 1; first: .*line 1, field 'src'"
    ):
        read(tmp_path, lines(other))


def test_knowedit_and_easyedit_shapes(tmp_path: Path) -> None:
    base = {"case_id": "k", "subject": "ZIC3", "prompt": "What species is ZIC3?", "target_new": "male"}
    group = [{"prompt": "The strand of ZIC3 is", "ground_truth": [["forward"]]}]
    knowedit = {
        **base,
        "ground_truth": ["human"],
        "rephrase_prompt": "R",
        "locality": {"Spec": group},
        "portability": {},
    }
    facts = read(tmp_path, lines(knowedit))
    assert (facts.shape, facts.notes, facts.cases[0].questions) == ("knowedit", (), ())
    assert facts.requests[0].target_true == "human"
    assert facts.requests[0].neighborhood == (Neighbor("The strand of ZIC3 is", "forward"),)
    flat = {**base, "rephrase_prompt": "R", "locality_prompt": "L", "locality_ground_truth": "A"}
    facts = read(tmp_path, lines(flat))
    assert (facts.shape, facts.requests[0].paraphrases) == ("easyedit", ("R",))
    assert facts.requests[0].neighborhood == (Neighbor("L", "A"),)


def test_same_derived_id_of_other_facts_gets_a_longer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nmke.facts import plain_shapes

    real = plain_shapes.EditRequest
    monkeypatch.setattr(
        plain_shapes, "EditRequest", lambda **fields: real(**{**fields, "id": fields["id"] or "e0"})
    )
    facts = read(tmp_path, lines({**ITALY, "id": None}, {**ITALY, "id": None, "target_new": "Bari"}))
    assert facts.requests[0].id == "e0"
    assert len(facts.requests[1].id) == 25


# Faults


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no fact in the file: it is empty"),
        (b"\n \n", "no fact in the file: it is empty"),
        (b"[]", "no fact in the file: it is empty"),
        (lines(FRANCE) + b"\n{'prompt': 1}\n", "line 3, column 2: broken JSON"),
        (b'{"prompt": \n', "line 1, column .*: broken JSON"),
        (lines(FRANCE) + b"[1]\n", r"line 2: '\[1\]' is not a JSON object"),
        (lines(FRANCE) + b"null\n", "line 2: 'null' is not a JSON object"),
        (b"[\n1]", "line 2: '1]' is not a JSON object"),
        (b"[" + lines(FRANCE) + b",]", "line 2: ']' is not a JSON object"),
        (b"[" + lines(FRANCE) + lines(ITALY) + b"]", "line 2: broken JSON array: found '{'"),
        (b"[" + lines(FRANCE), "line 2: broken JSON array: ends before ']'"),
        (b"[" + lines(FRANCE) + b"] x", "text behind the end of the array"),
        (b'[\n{"prompt":\n oops}]', "line 3, column 2: broken JSON"),
        (b"[" * 50_000, "is not a JSON object"),
        (b'{"prompt":' + b"[" * 100_000, "line 1"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "line 1.*broken JSON"),
        (lines(FRANCE) + b'{"prompt": "\xff"}\n', "line 2: byte 12 .0xff. is not UTF-8"),
        (b'[{"prompt": "\xff"}]', "line 1: .*not UTF-8"),
        ("{}".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (lines({**FRANCE, "target": "x"}), "line 1, field 'target': unknown field 'target'; did you mean 'target_new'"),
        (lines({"prompt": "P {x}", "targetnew": "x"}), "line 1, field 'targetnew'.*did you mean 'target_new'"),
        (lines({"promt": "P {x}", "hello": "x"}), "field 'promt': no known shape of record.*mean 'prompt'"),
        (lines({}), "no known shape of record"),
        (b'{"prompt": "a", "prompt": "b"}', "field 'prompt' stands twice"),
        (lines({**FRANCE, "target_new": ""}), "line 1, field 'target_new': is empty"),
        (lines({**FRANCE, "target_new": " \t"}), "field 'target_new': is empty"),
        (lines({**FRANCE, "target_new": None}), "field 'target_new': is missing; the record has 'id', 'prompt'"),
        (lines({**FRANCE, "target_new": 3}), "field 'target_new': is a number; write a text"),
        (lines({**FRANCE, "subject": ["x"]}), "field 'subject': is a list; write a text"),
        (lines({**FRANCE, "prompt": "The capital is"}), "field 'prompt': subject 'France' is not in prompt"),
        (lines({**FRANCE, "prompt": "France and France"}), "field 'prompt': .*more than once"),
        (lines({**FRANCE, "prompt": "{} and {}"}), "field 'prompt': .*2 places"),
        (lines({**FRANCE, "subject": ""}), "names no subject"),
        (lines({**FRANCE, "prompt": "x" * 20_001}), "field 'prompt': has 20,001 characters; at most 20,000"),
        (lines({**FRANCE, "id": True}), "field 'id': is true or false"),
        (lines({**FRANCE, "id": "../x"}), "field 'id': '../x' cannot be an id; use at most 100"),
        (lines({**FRANCE, "id": "a/b"}), "cannot be an id"),
        (lines({**FRANCE, "id": "a\nb"}), "cannot be an id"),
        (lines({**FRANCE, "id": "x" * 101}), "cannot be an id"),
        (lines(FRANCE, {**ITALY, "id": "a"}), "line 2, field 'id': 'a' is also the id of line 1"),
        (lines({**FRANCE, "id": None}, {**FRANCE, "id": None}), "line 2, .*same fact as on line 1"),
        (lines({**FRANCE, "paraphrases": 5}), "field 'paraphrases': is a number; write a list"),
        (lines({**FRANCE, "paraphrases": [5]}), r"field 'paraphrases\[0\]': is a number"),
        (lines({**FRANCE, "neighborhood": {}}), "field 'neighborhood': is an object; write a list"),
        (lines({**FRANCE, "neighborhood": [3]}), r"field 'neighborhood\[0\]': is a number; write an object"),
        (lines({**FRANCE, "neighborhood": [{"answer": "x"}]}), r"field 'neighborhood\[0\]\.prompt': is missing"),
        (lines({**FRANCE, "neighborhood": [{"promt": "x"}]}), r"neighborhood\[0\]\.promt'.*mean 'prompt'"),
        (b'{"prompt": "{x} is", "target_new": "\\ud800"}', "field 'target_new': holds half of a surrogate"),
        (lines({**COUNTERFACT, "requested_rewrite": []}), "field 'requested_rewrite': is a list; write an object"),
        (lines(COUNTERFACT, COUNTERFACT), "line 2, field 'id': 'counterfact-18' is also the id of line 1"),
        (lines(COUNTERFACT, FRANCE), "line 2, field 'requested_rewrite': is null"),
        (b"id,prompt,subjekt,target_new\na,b,c,d\n", "line 2, field 'subjekt'.*did you mean 'subject'"),
        (b"id,text\na,b\n", "line 1: no column 'prompt'"),
        (b"prompt,prompt\na,b\n", "line 1: a column name stands twice"),
        (b"prompt,target_new\na,b,c\n", "line 2: 3 cells, but the header names 2 columns"),
        (b'prompt,target_new\na,"b\n', "line 2: broken CSV"),
        (b"prompt,target_new\n{x} is,\n", "line 2, field 'target_new': is empty"),
        (b"prompt,target_new\n\xff,b\n", "line 2: byte 0"),
        (b"prompt,target_new\n", "it is empty"),
        (b"hello world\n", "'hello world.*' begins neither a JSON record nor a CSV header"),
        (gzip.compress(lines(FRANCE), mtime=0)[:-12], "cannot be read"),
        (b"\x1f\x8bnonsense", "cannot be read"),
    ],
)  # fmt: skip
def test_each_fault_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        read(tmp_path, content)
    assert "facts.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overlong_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nmke.facts.rows.MAX_RECORD", 100)
    with pytest.raises(RequestError, match="line 2: longer than 100 bytes"):
        read(tmp_path, lines(FRANCE) + b'{"prompt": "' + b"x" * 200)
    monkeypatch.setattr("nmke.facts.json_array.MAX_RECORD", 100)
    with pytest.raises(RequestError, match="longer than 100 characters"):
        read(tmp_path, b'[{"prompt": "' + b"x" * 200)


@pytest.mark.parametrize(("name", "message"), [("none.jsonl", "no such file"), (".", "not a regular file")])
def test_no_file_is_an_error(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_facts(tmp_path / name)


def test_impossible_paths_are_errors() -> None:
    for path in ("a" * 5000, "nul\0byte"):
        with pytest.raises(RequestError):
            read_facts(path)


def test_unknown_shape_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown facts shape 'zrse'; did you mean 'zsre'"):
        read(tmp_path, lines(FRANCE), shape="zrse")


# Anything at all

_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["{}", "{a}", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *FRANCE,
                    *COUNTERFACT,
                    *ZSRE,
                    "requested_rewrite",
                    "str",
                    "locality",
                    "neighborhood",
                    "paraphrases",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
_FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reads_or_explains(tmp_path: Path, content: bytes) -> None:
    try:
        facts = read(tmp_path, content)
    except RequestError as error:
        assert str(error)
    else:
        assert facts.requests
        assert len({request.id for request in facts.requests}) == len(facts.requests)


@_FUZZ
@given(content=st.binary(max_size=200))
def test_any_bytes_read_or_explain(tmp_path: Path, content: bytes) -> None:
    reads_or_explains(tmp_path, content)
    reads_or_explains(tmp_path, gzip.compress(content, mtime=0))


@_FUZZ
@given(records=st.lists(_JSON, max_size=4), array=st.booleans())
def test_any_json_reads_or_explains(tmp_path: Path, records: list[Any], array: bool) -> None:
    reads_or_explains(tmp_path, json.dumps(records).encode() if array else lines(*records))


@_FUZZ
@given(data=st.data())
def test_damaged_files_read_or_explain(tmp_path: Path, data: st.DataObject) -> None:
    table = b'id,prompt,subject,target_new\na,{} is,X,"y"\nb,{Z} is,,q\n'
    whole = data.draw(
        st.sampled_from([lines(FRANCE, ITALY), json.dumps([COUNTERFACT]).encode(), lines(ZSRE), table])
    )
    content = bytearray(gzip.compress(whole, mtime=0) if data.draw(st.booleans()) else whole)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    reads_or_explains(tmp_path, bytes(content))


# Real data


def test_bundled_facts_read() -> None:
    facts = bundled_facts()
    assert len(facts) >= 100
    assert all(request.target_true and request.paraphrases and request.neighborhood for request in facts)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("counterfact.jsonl.gz", "counterfact"),
        ("counterfact_full500.jsonl", "counterfact"),
        ("zsre.jsonl", "zsre"),
        ("zsre_knowedit.jsonl", "knowedit"),
        ("wikibigedit_3k.jsonl", "easyedit"),
    ],
)
def test_first_200_of_each_data_set_read(name: str, shape: str) -> None:
    path = data_path(name)
    if path is None:
        pytest.skip(f"{name} is neither in NMKE_DATA nor in ../shared/data")
    facts = read_facts(path, limit=200)
    assert (facts.shape, len(facts.requests)) == (shape, 200)
    assert all(request.subject in request.text for request in facts.requests)
    assert not any("skipped" in note for note in facts.notes)


def test_data_path_looks_in_the_named_folder_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zsre.jsonl").write_bytes(lines(ZSRE))
    monkeypatch.setenv("NMKE_DATA", str(tmp_path))
    assert data_path("zsre.jsonl") == tmp_path / "zsre.jsonl"
    assert data_path("no-such-file.jsonl") is None


def test_every_fault_is_found_where_reading_stops_at_the_first(tmp_path):
    path = tmp_path / "facts.jsonl"
    good = '{"prompt": "The capital of {} is", "subject": "%s", "target_new": "Lyon"}'
    lines = [good % "France", "{broken", good % "Peru", '{"prompt": "x {}", "subject": "y"}', good % "France"]
    path.write_text("\n".join(lines))
    found = [str(fault) for fault in find_faults(path)]
    assert [fault.split(", ")[1] for fault in found] == ["line 2", "line 4", "line 5"]
    assert "broken JSON" in found[0] and "target_new" in found[1] and "the same fact as on line 1" in found[2]
    assert len(find_faults(path, most=2)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no fact in the file"),
        ("[{}, 3]", "line 1"),
        ("prompt,subject,target_new\na {},b\nc {},d,e\nf {},g,h,i\n", "2 cells, but the header names 3"),
        ("\x00", "begins neither"),
    ],
)
def test_faults_of_whole_files_are_found_too(tmp_path, content, message):
    path = tmp_path / "facts"
    path.write_text(content)
    assert message in str(find_faults(path)[0])


def test_a_good_file_has_no_fault(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("prompt,subject,target_new\nThe capital of {} is,France,Lyon\n")
    assert find_faults(path) == []
