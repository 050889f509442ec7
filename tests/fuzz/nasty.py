"""Saved inputs for every target: what is good, what is cut, and what once broke a reader.

Found with these, and mended:
- settings, plan: YAML aliases that stand for gigabytes (a hang in the error message), layers up to 99,999,999,999
  (all of memory), nesting of thousands (RecursionError), impossible dates and numbers of 5,000 digits (ValueError),
  a text in place of layers.
- ledger: views and triggers of a stranger run by our own queries, names of files that lead out of the run folder,
  bodies and requests that are no objects (AttributeError), JSON nested too deeply (RecursionError).
- manifest, scores, base outputs: nesting (RecursionError), lists and numbers where texts belong (AttributeError later);
  a file that is no UTF-8 stood in the error message as a whole.
- batch, head: tensors without their partners (KeyError), names without a layer (ValueError), columns and rows out of
  range (IndexError), side memories of the wrong form (a traceback at the first question).
- gguf: counts of 2^60 tensors, keys and list entries (no end), sizes of tensors beyond the file.
- model config: a billion layers, a vocabulary larger than the weights (no end, all of memory), an activation that is a
  number, no heads (TypeError, ZeroDivisionError); no widths, so that those of a large model are taken (all of memory).
- model index: files outside of the folder; a list, or nothing (KeyError, AttributeError).
"""

import json
import pickle
import sqlite3
import struct
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tests import runs, tiny

from nmke.ledger import _SCHEMA

DEEP = "[" * 100_000
DIGITS = "9" * 5_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


class Runs:
    """A pickle that leaves a mark when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('pickle-was-run').touch()",))


PICKLE = pickle.dumps(Runs())
FACT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}


def yaml_inputs(good: str) -> dict[str, bytes]:
    texts = {
        "good": good,
        "empty": "",
        "alias bomb": BOMB + "layers: *i\n",
        "alias": "layers: &l [1, 2]\nbatch_size: *l\n",
        "deep": "layers: " + DEEP,
        "digits": f"steps: {DIGITS}",
        "date": "method: 2020-13-45",
        "date that is one": "method: 2020-10-05",
        "python": "method: !!python/object/apply:os.system ['touch pickle-was-run']",
        "infinite": "lr: .inf\nclamp: .nan",
        "list as key": "? [a, b]\n: 1",
        "number as key": "1: 2\nnull: 3",
        "layers of text": "layers: from here to there",
        "layers far away": "layers: 0-99999999999",
        "object": "stabilisers: {a: 1}\ncorpus: [1]",
        "null byte in a path": 'corpus: "a\\0b"',
        "control": "method: a\x00b",
    }
    return {name: text.encode() for name, text in texts.items()} | {"no text": b"\xff\xfe\x00"}


def json_inputs(good: dict[str, Any]) -> dict[str, bytes]:
    """A good object, broken in the ways that JSON can be; every field in turn of another kind."""
    found = {
        "good": json.dumps(good).encode(),
        "empty": b"",
        "no text": b"\xff\xfe\x00",
        "deep": DEEP.encode(),
        "deep inside": (json.dumps(good)[:-1] + ', "more": ' + DEEP).encode(),
        "digits": DIGITS.encode(),
        "list": b"[]",
        "text": b'"a"',
        "null": b"null",
    }
    for field in good:
        for other in (None, 5, "text", [["x"]], {"a": None}):
            found[f"{field} as {other}"] = json.dumps({**good, field: other}).encode()
        found[f"without {field}"] = json.dumps({k: v for k, v in good.items() if k != field}).encode()
    return found


def facts_inputs() -> dict[str, bytes]:
    line = json.dumps(FACT)
    right_to_left = {**FACT, "prompt": "עיר הבירה של {} היא", "subject": "צרפת", "target_new": "ليون"}
    combining = {
        **FACT,
        "prompt": "La capitale de l’E\u0301tat {} est",
        "subject": "Côte d'Ivoire\u0301\u0323\u0302",
    }
    return {
        "good": line.encode(),
        "right to left": json.dumps(right_to_left).encode(),
        "combining": json.dumps(combining, ensure_ascii=False).encode(),
        "bidi control": json.dumps({**FACT, "subject": "\u202eecnarF"}).encode(),
        "traversal": json.dumps({**FACT, "id": "../../etc/passwd"}).encode(),
        "array deep": (f"[{line}, " + DEEP).encode(),
        "line deep": ('{"prompt": ' + DEEP).encode(),
        "digits": ('{"id": ' + DIGITS + "}").encode(),
        "csv": b"prompt,subject,target_new\n{},\x00,y\n",
        "csv quote": b'prompt,subject,target_new\n"a {} is,b,c\n',
        "gzip cut": b"\x1f\x8b\x08\x00" + b"\0" * 9,
        "other byte order": line.encode("utf-16"),
        "counterfact broken": json.dumps(
            {"case_id": 1, "requested_rewrite": [], "paraphrase_prompts": {}}
        ).encode(),
        "mquake broken": json.dumps({"case_id": "a", "requested_rewrite": [5], "questions": 3}).encode(),
        "zsre broken": json.dumps(
            {"subject": "a", "src": "a {}", "alt": "b", "rephrase": {"a": 1}, "loc": 5}
        ).encode(),
        "knowedit broken": json.dumps(
            {**FACT, "prompt": "a France", "locality": [1], "portability": {"a": [1]}}
        ).encode(),
    }


def ledger_file(*statements: str, good: bool = True) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.sqlite"
        database = sqlite3.connect(path)
        if good:
            database.executescript(_SCHEMA)
        for statement in statements:
            database.execute(statement)
        database.commit()
        database.close()
        return path.read_bytes()


def event(body: str = "{}", files: str = "{}", kind: str = "edit") -> str:
    return f"INSERT INTO events VALUES (1, 'b1', '{kind}', 'now', '{body}', '{files}', 'a', 'b', '', 'c')"


def edit(request: str) -> str:
    return f"INSERT INTO edits VALUES (1, 0, 'e', 'f', 'written', '{request}', '{{}}')"


def ledger_inputs() -> dict[str, bytes]:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
    empty = ledger_file()
    asked = {"prompt": "a {} is", "subject": "b", "target_new": "c", "neighborhood": [], "paraphrases": []}
    return {
        "good": ledger_file(event()),
        "empty": b"",
        "no database": b"SQLite format 3\0" + b"\xff" * 4080,
        "cut": empty[: len(empty) // 2],
        "endless view": ledger_file(
            f"CREATE VIEW events AS {endless} SELECT i AS seq, 'b' AS id, 'edit' AS kind FROM n", good=False
        ),
        "trigger": ledger_file(
            "CREATE TRIGGER mine AFTER INSERT ON edits BEGIN SELECT count(*) FROM edits, edits, edits; END"
        ),
        "other columns": ledger_file("CREATE TABLE events (seq)", good=False),
        "traversal": ledger_file(event(files='{"../../../etc/passwd": "a"}')),
        "traversal behind edits": ledger_file(event(files='{"edits/../../x.safetensors": "a"}')),
        "files a list": ledger_file(event(files="[1]")),
        "body a number": ledger_file(event("5")),
        "body deep": ledger_file(event(DEEP)),
        "undone a text": ledger_file(event('{"undone": "abc"}', kind="undo")),
        "undone lists": ledger_file(event('{"undone": [[1]]}', kind="revert")),
        "undo without a body": ledger_file(event("[]", kind="undo")),
        "replay": ledger_file(event('{"undone": [], "replay": [5], "reverted": 3}', kind="revert")),
        "request": ledger_file(event(), edit(json.dumps(asked))),
        "request a list": ledger_file(event(), edit("[1, 2]")),
        "request of numbers": ledger_file(event(), edit(json.dumps({**asked, "prompt": 5}))),
        "request of lists": ledger_file(event(), edit(json.dumps({**asked, "neighborhood": [[1]]}))),
        "answer a number": ledger_file(
            event(), edit(json.dumps({**asked, "neighborhood": [{"prompt": "a", "answer": 1}]}))
        ),
    }


def tensors(schema: str, content: dict[str, torch.Tensor], **metadata: str) -> bytes:
    return save({name: t.clone() for name, t in content.items()}, metadata={"schema": schema, **metadata})


def safetensors_inputs(good: bytes) -> dict[str, bytes]:
    """Broken headers; the library itself must answer."""
    header = b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'
    return {
        "good": good,
        "empty": b"",
        "cut": good[: len(good) // 2],
        "pickle": PICKLE,
        "zip": b"PK\x03\x04" + b"\0" * 60,
        "header of 2^60 bytes": struct.pack("<Q", 2**60) + b"{}",
        "header beyond the file": struct.pack("<Q", 1000) + b"{}",
        "header no object": struct.pack("<Q", 2) + b"[]",
        "header deep": struct.pack("<Q", len(DEEP)) + DEEP.encode(),
        "tensor of 2^60": struct.pack("<Q", len(header)) + header + b"\0" * 4,
    }


def batch_inputs() -> dict[str, bytes]:
    f, i = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int32)
    right = torch.zeros(32, 2)
    whole = {
        "layer.1.left": f,
        "layer.1.right": f,
        "layer.1.keys": f,
        "layer.1.columns": i,
        "layer.1.before": right,
        "owners": i,
    }
    variants = {
        "nothing": {},
        "columns alone": {"layer.1.columns": i},
        "no layer": {"columns": i, "left": f, "owners": i},
        "layer a word": {
            "layer.x.columns": i,
            "layer.x.before": f,
            "layer.x.left": f,
            "layer.x.keys": f,
            "owners": i,
        },
        "layer far away": {k.replace(".1.", ".99."): v for k, v in whole.items()},
        "columns far away": {**whole, "layer.1.columns": torch.tensor([5, 2**30], dtype=torch.int32)},
        "columns negative": {**whole, "layer.1.columns": torch.tensor([-1, -99], dtype=torch.int32)},
        "owners of another length": {**whole, "owners": torch.zeros(9, dtype=torch.int32)},
        "no owners": {k: v for k, v in whole.items() if k != "owners"},
        "length of many": {
            "side/grace/x.length": torch.zeros(3),
            "side/grace/x.index": i,
            "side/grace/x.rows": f,
        },
        "length alone": {"side/grace/x.length": torch.tensor(1)},
        "length negative": {"side/a/x.length": torch.tensor(-7), "side/a/x.index": i, "side/a/x.rows": f},
    }
    found = {name: tensors("nmke.batch/1", content) for name, content in variants.items()}
    return {
        **safetensors_inputs(tensors("nmke.batch/1", whole)),
        **found,
        "other schema": tensors("x", whole),
    }


def head_inputs() -> dict[str, bytes]:
    name = "model.layers.1.mlp.down_proj.weight"
    matrix = runs.model().model.state_dict()[name].clone()
    rows = torch.zeros(2, 3)
    variants = {
        "other sizes": {name: rows},
        "other name": {"model.embed_tokens.weight": matrix},
        "whole numbers": {name: matrix.to(torch.int64)},
        "not finite": {name: matrix * torch.nan},
        "unknown memory": {"side/nobody/x": rows},
        "memory without name": {"side/": rows},
        "grace without tensors": {"side/grace/x": rows},
        "grace of other sizes": {
            "side/grace/layer": torch.tensor(1),
            "side/grace/keys": rows,
            "side/grace/values": rows,
            "side/grace/radii": torch.ones(5),
            "side/grace/labels": torch.zeros(1),
        },
        "grace far away": {
            "side/grace/layer": torch.tensor(99),
            "side/grace/keys": rows,
            "side/grace/values": rows,
            "side/grace/radii": torch.ones(2),
            "side/grace/labels": torch.zeros(2),
        },
        "wise of other sizes": {
            "side/wise/layer": torch.tensor(1),
            "side/wise/delta": rows,
            "side/wise/threshold": torch.ones(1),
        },
        "wise threshold of many": {
            "side/wise/layer": torch.tensor([1, 2]),
            "side/wise/delta": matrix,
            "side/wise/threshold": torch.ones(4),
        },
        "memoir of other sizes": {"side/memoir/delta": rows, "side/memoir/masks": rows},
        "ike of no text": {"side/ike/facts": torch.full((9,), 255, dtype=torch.uint8)},
        "ike of numbers": {"side/ike/facts": torch.tensor(list(b"[[1, 2], 3]"), dtype=torch.uint8)},
        "ike deep": {"side/ike/facts": torch.tensor(list(DEEP.encode()), dtype=torch.uint8)},
        "ike of floats": {"side/ike/facts": torch.tensor([0.5])},
    }
    found = {key: tensors("nmke.head/1", content) for key, content in variants.items()}
    return {**safetensors_inputs(tensors("nmke.head/1", {name: matrix})), **found}


def delta_inputs() -> dict[str, bytes]:
    name = "model.layers.1.mlp.down_proj.weight"
    model = runs.model()
    known = {
        "base_fingerprint": model.fingerprint,
        "base_source": "custom",
        "base_dtype": "float32",
        "content_hash": "0",
        "base_sha256": "{}",
    }
    columns = {f"{name}.columns": torch.zeros(1, dtype=torch.int32), f"{name}.values": torch.zeros(32, 1)}
    listed = {**known, "base_sha256": json.dumps({name: "0"})}
    return {
        **safetensors_inputs(tensors("nmke.delta/1", columns, **listed)),
        "other weights": tensors("nmke.delta/1", columns, **{**listed, "base_fingerprint": "f" * 64}),
        "hashes a list": tensors("nmke.delta/1", columns, **{**known, "base_sha256": json.dumps([name])}),
        "hashes deep": tensors("nmke.delta/1", columns, **{**known, "base_sha256": DEEP}),
        "hashes pairs": tensors("nmke.delta/1", columns, **{**known, "base_sha256": '["ab", "cd"]'}),
        "not listed": tensors("nmke.delta/1", columns, **known),
        "no metadata": save(columns),
    }


def gguf_file(tensors: int = 0, keys: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def gguf_inputs() -> dict[str, bytes]:
    key, array, pad = gguf_text(b"general.architecture"), struct.pack("<I", 9), b"\0" * 64
    sized = gguf_text(b"blk.0.ffn_down.weight") + struct.pack("<IQQIQ", 2, 2**31, 2**31, 0, 0)
    return {
        "nothing": gguf_file(rest=pad),
        "magic alone": b"GGUF",
        "2^60 tensors": gguf_file(tensors=2**60, rest=pad),
        "2^60 keys": gguf_file(keys=2**60, rest=pad),
        "a key of 2^60 bytes": gguf_file(keys=1, rest=struct.pack("<Q", 2**60) + pad),
        "a list of 2^60": gguf_file(keys=1, rest=key + array + struct.pack("<IQ", 4, 2**60) + pad),
        "a list of 2^60 texts": gguf_file(keys=1, rest=key + array + struct.pack("<IQ", 8, 2**60) + pad),
        "lists in lists": gguf_file(keys=1, rest=key + array + struct.pack("<IQ", 9, 1) * 5_000 + pad),
        "a value of no kind": gguf_file(keys=1, rest=key + struct.pack("<I", 77) + pad),
        "unknown architecture": gguf_file(keys=1, rest=key + struct.pack("<I", 8) + gguf_text(b"mine") + pad),
        "architecture of no text": gguf_file(
            keys=1, rest=key + struct.pack("<I", 8) + gguf_text(b"\xff\xfe") + pad
        ),
        "a tensor of 2^62": gguf_file(tensors=1, rest=sized + pad),
        "99 dimensions": gguf_file(tensors=1, rest=gguf_text(b"a") + struct.pack("<I", 99) + pad),
        "the other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + pad,
        "version 0": gguf_file(version=0, rest=pad),
    }


def model_config_inputs() -> dict[str, bytes]:
    good = {
        **tiny.tiny_llama(vocab_size=len(tiny.tiny_tokenizer())).config.to_dict(),
        "architectures": ["LlamaForCausalLM"],
    }
    changed: dict[str, dict[str, Any]] = {
        "good": {},
        "a billion layers": {"num_hidden_layers": 10**9},
        "a billion words": {"vocab_size": 10**9},
        "a billion neurons": {"intermediate_size": 10**9},
        "no heads": {"num_attention_heads": 0},
        "negative layers": {"num_hidden_layers": -1},
        "layers a text": {"num_hidden_layers": "many"},
        "activation a number": {"hidden_act": 5},
        "unknown activation": {"hidden_act": "sing"},
        "type a list": {"model_type": []},
        "type a path": {"model_type": "../../x"},
        "own code": {
            "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            "model_type": "evil",
        },
        "rope a text": {"rope_parameters": "text"},
        "dtype unknown": {"dtype": "float3", "torch_dtype": "float3"},
        "generation": {"eos_token_id": [[1]], "pad_token_id": "x"},
        "quantised": {"quantization_config": {"quant_method": "evil"}},
        "quantised by text": {"quantization_config": "evil"},
    }
    inputs = {name: json.dumps({**good, **change}).encode() for name, change in changed.items()}
    widths = {name: value for name, value in good.items() if not name.endswith("_size")}
    sizes = {name: value for name, value in widths.items() if not name.startswith("num_")}
    return {
        **inputs,
        "no widths": json.dumps(widths).encode(),  # those of a model of 7 billion weights take their place
        "no sizes": json.dumps(sizes).encode(),
        "deep": DEEP.encode(),
        "list": b"[]",
        "no text": b"\xff\xfe\x00",
        "digits": DIGITS.encode(),
    }


def model_index_inputs() -> dict[str, bytes]:
    return {
        "nothing": b"{}",
        "deep": DEEP.encode(),
        "list": b"[]",
        "map a list": json.dumps({"weight_map": ["a"]}).encode(),
        "map of numbers": json.dumps({"weight_map": {"a": 5}}).encode(),
        "outside": json.dumps({"weight_map": {"a": "../../model.safetensors"}}).encode(),
        "absolute": json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode(),
        "incomplete": json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}).encode(),
    }


def every_input() -> dict[str, dict[str, bytes]]:
    """Inputs by target and name."""
    base = {"source": "a", "name": "a", "fingerprint": "f", "dtype": "float32", "revision": None}
    plan = "model: m\nmethods: [unedited]\n"
    whole = (tiny.save_tiny(Path(tempfile.mkdtemp()) / "m") / "model.safetensors").read_bytes()
    return {
        "facts": facts_inputs(),
        "settings": yaml_inputs("layers: 4-8\nlr: 0.5\n"),
        "plan": {**yaml_inputs(plan), "settings bomb": (plan + BOMB + "settings: {x: *i}\n").encode()},
        "cell": json_inputs(
            {"schema": "nmke.bench_cell/1", "identity": {}, "status": "done", "checkpoints": []}
        ),
        "ledger": ledger_inputs(),
        "manifest": json_inputs({"schema": "nmke.run/1", "base": base, "contexts": [""]}),
        "batch": batch_inputs(),
        "head": head_inputs(),
        "delta": delta_inputs(),
        "scores": json_inputs(
            {
                "schema": "nmke.scores/1",
                "content_hash": "a",
                "facts": "b",
                "n_facts": 1,
                "created": "c",
                "protocols": {},
            }
        ),
        "base_outputs": json_inputs(
            {
                "schema": "nmke.base_outputs/1",
                "predicted": [["a", "b", [1]]],
                "continuations": {},
                "facts": "",
                "model": "",
            }
        ),
        "gguf": gguf_inputs(),
        "model_config": model_config_inputs(),
        "model_weights": safetensors_inputs(whole),
        "model_index": model_index_inputs(),
    }
