"""Gathering key statistics: which tokens count, what is cached, and what happens after a kill."""

import gzip
import json
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.exact import exact

from nmke.errors import RequestError, StatsError
from nmke.models.load import EditableModel
from nmke.stats import corpus as corpus_module
from nmke.stats import store as store_module
from nmke.stats.corpus import Corpus, openers, read_corpus, self_written
from nmke.stats.covariance import KeyCovariance
from nmke.stats.store import CorpusSpec, StatsKey, StatsStore, add_windows, token_windows

LAYERS = (0, 1)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return exact(tiny.tiny_llama, num_hidden_layers=3)


@pytest.fixture
def store(tmp_path: Path) -> StatsStore:
    return StatsStore(tmp_path / "stats")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(tiny.SENTENCES * 4), encoding="utf-8")
    return path


@pytest.fixture
def few_openers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "openers", lambda: ("The old", "Because", "In the city of", "I was"))


def dense(model: EditableModel, windows: list[list[int]], layer: int) -> tuple[torch.Tensor, int]:
    """Second moment from one plain forward per window, position 0 left out."""
    total, count = torch.zeros(64, 64, dtype=torch.float64), 0
    for window in windows:
        seen: list[torch.Tensor] = []
        down = model.layout.layers[layer].down_proj
        handle = down.register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            model.model(torch.tensor([window]))
        handle.remove()
        keys = seen[0].reshape(len(window), -1)[1:]
        total, count = total + keys.T @ keys, count + len(keys)
    return total / count, count


@pytest.mark.parametrize("builder", [tiny.tiny_llama, tiny.tiny_gpt2, tiny.tiny_opt])
def test_gathered_moment_equals_one_forward_per_window_without_position_zero(builder, text_file, store):
    model = exact(builder)
    found = store.prepare(model, LAYERS, CorpusSpec(str(text_file), tokens=300))
    windows = token_windows(model, read_corpus(str(text_file), 10_000), 300)
    assert len({len(window) for window in windows}) > 1  # so that there is padding
    for layer in LAYERS:
        moment, count = dense(model, windows, layer)
        assert found[layer].count == count
        torch.testing.assert_close(found[layer].moment, moment, rtol=1e-5, atol=1e-6)


def test_bos_stands_at_position_zero_of_every_window_and_is_left_out():
    model = exact(tiny.tiny_llama, tiny.tiny_tokenizer(add_bos=True))
    corpus = Corpus("c", (tiny.SENTENCES[0] * 20,))
    windows = token_windows(model, corpus, 400)
    assert [window[0] for window in windows] == [1] * len(windows) and len(windows) == 4
    totals = {0: KeyCovariance.empty(64)}
    add_windows(model, totals, windows)
    assert totals[0].count == 400


@pytest.mark.parametrize("tokens", [1, 2, 100, 128, 129, 130, 300, 10_000])
def test_windows_hold_the_tokens_asked_for(model, tokens):
    corpus = Corpus("c", tuple(tiny.SENTENCES) * 3 + (" ".join(tiny.SENTENCES),) * 2)
    windows = token_windows(model, corpus, tokens)
    available = sum(len(model.encoder.encode(text)) for text in corpus.texts)
    assert all(2 <= len(window) <= 128 for window in windows)
    assert sum(map(len, windows)) <= tokens
    assert sum(map(len, windows)) >= min(tokens, available) - 2 * len(corpus.texts)


def test_the_forward_pass_stops_behind_the_last_edited_layer(model, text_file, store):
    calls: list[int] = []
    handles = [
        parts.block.register_forward_hook(lambda *_, i=parts.index: calls.append(i))
        for parts in model.layout.layers
    ]
    handles.append(model.layout.final_norm.register_forward_hook(lambda *_: calls.append(99)))
    store.prepare(model, (1,), CorpusSpec(str(text_file), tokens=300))
    for handle in handles:
        handle.remove()
    assert set(calls) == {0, 1}


def test_statistics_are_gathered_once_and_only_for_missing_layers(model, text_file, store, monkeypatch):
    spec = CorpusSpec(str(text_file), tokens=300)
    assert store.missing(model, LAYERS, spec) == [0, 1]
    first = store.prepare(model, (0,), spec)
    assert store.missing(model, LAYERS, spec) == [1]
    gathered: list[set[int]] = []
    plain = store_module.add_windows
    monkeypatch.setattr(
        store_module, "add_windows", lambda m, t, w, k: (gathered.append(set(t)), plain(m, t, w, k))
    )
    both = store.prepare(model, LAYERS, spec)
    assert gathered and all(layers == {1} for layers in gathered)
    assert torch.equal(both[0].total, first[0].total) and both[0].count == first[0].count
    gathered.clear()
    store.prepare(model, LAYERS, spec)
    assert not gathered


def test_the_key_holds_everything_the_statistics_depend_on(model, text_file, store):
    spec = CorpusSpec(str(text_file), tokens=300)
    key = store.keys_for(model, (0,), spec)[0]
    other_text = text_file.with_name("other.txt")
    other_text.write_text("Another text.", encoding="utf-8")
    changed = exact(tiny.tiny_llama, num_hidden_layers=3)
    with torch.no_grad():
        changed.model.model.layers[2].mlp.up_proj.weight[3, 4] += 1e-3
    keys = [
        key,
        store.keys_for(changed, (0,), spec)[0],
        store.keys_for(model, (1,), spec)[1],
        store.keys_for(model, (0,), CorpusSpec(str(text_file), tokens=301))[0],
        store.keys_for(model, (0,), CorpusSpec(str(other_text), tokens=300))[0],
        store.keys_for(model, (0,), CorpusSpec(tokens=300))[0],
        store.keys_for(model, (0,), CorpusSpec(tokens=300, seed=1))[0],
        StatsKey(key.weights, key.layer, key.corpus, key.tokens, "bfloat16"),
    ]
    assert len({each.digest for each in keys}) == len(keys)
    assert store.keys_for(exact(tiny.tiny_llama, num_hidden_layers=3), (0,), spec)[0] == key
    moved = shutil.copy(text_file, text_file.with_name("renamed.txt"))
    assert store.keys_for(model, (0,), CorpusSpec(str(moved), tokens=300))[0] == key


def test_statistics_of_other_weights_are_refused(model, text_file, store):
    spec = CorpusSpec(str(text_file), tokens=300)
    store.prepare(model, (0,), spec)
    other = exact(tiny.tiny_llama, num_hidden_layers=3, seed=1)
    key, own = (store.keys_for(each, (0,), spec)[0] for each in (other, model))
    assert store.load(key) is None
    shutil.copy(store.path(own), store.path(key))
    with pytest.raises(StatsError, match=r"belongs to something else .*weights.*; delete it"):
        store.prepare(other, (0,), spec)


def test_a_damaged_file_is_named(model, text_file, store):
    spec = CorpusSpec(str(text_file), tokens=300)
    store.prepare(model, (0,), spec)
    path = store.path(store.keys_for(model, (0,), spec)[0])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(
        StatsError, match=rf"statistics file {path.name} is damaged .* delete it and prepare again"
    ):
        store.prepare(model, (0,), spec)


@pytest.mark.parametrize("killed_at", [1, 2, 5])
def test_a_killed_run_resumes_to_the_same_bits(model, text_file, tmp_path, monkeypatch, killed_at):
    monkeypatch.setattr(store_module, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(store_module, "BATCH_WINDOWS", 2)
    spec = CorpusSpec(str(text_file), tokens=600)
    whole = StatsStore(tmp_path / "whole").prepare(model, LAYERS, spec)

    store, calls = StatsStore(tmp_path / "broken"), []
    plain = store_module.add_windows

    def counted(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == killed_at:
            raise KeyboardInterrupt
        plain(*arguments)

    monkeypatch.setattr(store_module, "add_windows", counted)
    with pytest.raises(KeyboardInterrupt):
        store.prepare(model, LAYERS, spec)
    assert store.missing(model, LAYERS, spec) == list(LAYERS)
    assert len(list(store.root.glob("*.partial.safetensors"))) == (len(LAYERS) if killed_at > 1 else 0)
    before = len(calls)
    resumed = store.prepare(model, LAYERS, spec)
    windows = token_windows(model, read_corpus(str(text_file), 10_000), 600)
    assert len(calls) - before == -(-len(windows) // 2) - (killed_at - 1)
    for layer in LAYERS:
        assert torch.equal(resumed[layer].total, whole[layer].total)
        assert resumed[layer].count == whole[layer].count
    assert not list(store.root.glob("*.partial*"))


def test_partial_results_of_unequal_progress_start_anew(model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(store_module, "BATCH_WINDOWS", 2)
    spec = CorpusSpec(str(text_file), tokens=600)
    whole = StatsStore(tmp_path / "whole").prepare(model, LAYERS, spec)
    store, saves = StatsStore(tmp_path / "broken"), []
    plain = store_module._save

    def counted(*arguments: object) -> None:
        saves.append(1)
        if len(saves) == 4:  # between the two layers of the second checkpoint
            raise KeyboardInterrupt
        plain(*arguments)

    monkeypatch.setattr(store_module, "_save", counted)
    with pytest.raises(KeyboardInterrupt):
        store.prepare(model, LAYERS, spec)
    again = store.prepare(model, LAYERS, spec)
    assert all(torch.equal(again[layer].total, whole[layer].total) for layer in LAYERS)


def test_gathering_leaves_no_trace_in_the_model(model, text_file, store):
    store.prepare(model, LAYERS, CorpusSpec(str(text_file), tokens=300))
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.model.modules())


@pytest.mark.usefixtures("few_openers")
def test_self_written_text_is_decided_by_its_seed(model):
    first, again, other = (self_written(model, 128, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first.texts != other.texts and first.sha256 != other.sha256
    assert len(first.texts) == 4
    assert all(
        text.startswith(opener) for text, opener in zip(first.texts, corpus_module.openers(), strict=True)
    )
    assert len(self_written(model, 1000).texts) == 8  # two rounds, each of windows of 128 tokens at most


@pytest.mark.usefixtures("few_openers")
def test_self_written_corpus_is_written_once(model, store, monkeypatch):
    spec = CorpusSpec(tokens=128)
    first = store.corpus(model, spec)
    monkeypatch.setattr(store_module, "self_written", lambda *_: pytest.fail("written again"))
    assert store.corpus(model, spec) == first
    assert store.prepare(model, (0,), spec)[0].count > 60


def test_openers_are_many_varied_and_plain():
    found = openers()
    assert 180 <= len(found) <= 260 and len(set(found)) == len(found)
    assert all(line == line.strip() and len(line) < 120 for line in found)
    assert len({line.split()[0] for line in found}) > 60


def lines_as(kind: str, lines: list[str], path: Path) -> Path:
    """The lines as a text or JSONL file, gzipped or not."""
    body = "\n".join(json.dumps({"text": line, "id": 1}) if "json" in kind else line for line in lines)
    path = path / f"corpus.{kind}"
    path.write_bytes(gzip.compress(body.encode()) if kind.endswith("gz") else body.encode())
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "txt.gz", "jsonl.gz"])
def test_files_of_text_are_read(kind, tmp_path):
    path = lines_as(kind, ["The capital", "", "of Ünïcode \U0001f600"], tmp_path)
    corpus = read_corpus(str(path), 1000)
    assert [text.strip() for text in corpus.texts] == ["The capital", "of Ünïcode \U0001f600"]
    assert corpus.name == path.name
    assert len(read_corpus(str(path), 5).texts) == 1


def test_broken_corpora_are_named(tmp_path):
    def write(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    cases = {
        str(tmp_path / "none.txt"): r"none\.txt' is not a file; give a text file, JSONL, 'self' or 'hf:NAME'",
        write("empty.txt", b" \n\n"): r"empty\.txt' holds no text",
        write("latin.txt", "é".encode("latin-1")): r"latin\.txt' cannot be read as UTF-8 text",
        write("broken.jsonl", b'{"text": "a"}\n{"text": '): r"broken\.jsonl line 2 is not JSON",
        write("other.jsonl", b'{"words": "a"}'): r"other\.jsonl line 1 has no 'text' field",
        write("list.jsonl", b"[1]"): r"list\.jsonl line 1 has no 'text' field",
        write("cut.txt.gz", gzip.compress(b"word " * 500)[:-20]): r"cut\.txt\.gz' cannot be read",
        write(
            "torn.txt.gz", gzip.compress(b"word " * 9)[:10] + b"\xff" * 40
        ): r"torn\.txt\.gz' cannot be read",
    }
    for source, message in cases.items():
        with pytest.raises(RequestError, match=message):
            read_corpus(source, 1000)


def test_a_corpus_too_short_for_a_window_is_refused(model, store, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("a", encoding="utf-8")
    with pytest.raises(RequestError, match=r"short\.txt.* holds no two tokens in a row"):
        store.prepare(model, (0,), CorpusSpec(str(path), tokens=300))
    assert store.missing(model, (0,), CorpusSpec(str(path), tokens=300)) == [0]


def test_hub_corpora_stream_or_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        RequestError, match=r"'datasets' is not installed; run: pip install 'nmke\[datasets\]'"
    ):
        read_corpus("hf:wikitext:raw", 100)
    asked: list[tuple[object, ...]] = []

    def load_dataset(name: str, config: str | None, **options: object) -> list[dict[str, str]]:
        asked.append((name, config, options))
        return [{"text": ""}, {"text": "One sentence."}, {"title": "none"}, {"text": "Two."}]

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_corpus("hf:owner/wikitext:raw", 1000).texts == ("One sentence.", "Two.")
    assert read_corpus("hf:owner/wikitext", 5).texts == ("One sentence.",)
    assert asked[0] == ("owner/wikitext", "raw", {"split": "train", "streaming": True})
    assert asked[1][1] is None
