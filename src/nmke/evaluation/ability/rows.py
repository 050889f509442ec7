"""Records of the ability data sets, as published or as in our data folder, to one row a question.

A row holds only what its task's prompt names, so that one prompt serves every spelling of a data set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nmke.errors import RequestError

Row = dict[str, Any]
GROUP = "group"


def choice(record: Mapping[str, Any]) -> Row:
    """A question with its choices and the place of the right one: ARC, OpenBookQA, CommonsenseQA, MMLU."""
    question = record["question"]
    nested = isinstance(question, dict)
    texts, labels = _choices((question if nested else record)["choices"], record.get("labels"))
    answer = record["answer"] if "answer" in record else record["answerKey"]
    place = labels.index(answer.strip()) if isinstance(answer, str) else int(answer)
    text = question["stem"] if nested else question
    row = {"question": text.strip(), "choices": texts, "answer": place}
    return {**row, GROUP: record["subject"]} if "subject" in record else row


def _choices(found: Any, labels: list[str] | None) -> tuple[list[str], list[str]]:
    """Texts and labels of choices written as texts, as objects, or as two columns."""
    if isinstance(found, dict):
        return list(found["text"]), list(found["label"])
    if found and isinstance(found[0], dict):
        return [item["text"] for item in found], [item["label"] for item in found]
    return list(found), labels or [chr(ord("A") + place) for place in range(len(found))]


def piqa(record: Mapping[str, Any]) -> Row:
    """A goal and two ways to it."""
    choices = record["choices"] if "choices" in record else [record["sol1"], record["sol2"]]
    return {"question": record["goal"], "choices": list(choices), "answer": int(_answer(record))}


def social_iqa(record: Mapping[str, Any]) -> Row:
    """A situation with its question, three answers."""
    if "choices" in record:
        return {
            "question": record["question"],
            "choices": list(record["choices"]),
            "answer": int(record["answer"]),
        }
    choices = [record["answerA"], record["answerB"], record["answerC"]]
    question = f"{record['context']} {record['question']}"
    return {"question": question, "choices": choices, "answer": int(_answer(record)) - 1}


def winogrande(record: Mapping[str, Any]) -> Row:
    """A sentence with a gap: the text up to the gap with either filling, and the ending that both share."""
    sentence = record.get("question", record.get("sentence", ""))
    before, gap, after = sentence.partition("_")
    if not gap:
        raise RequestError(f"WinoGrande sentence {sentence[:80]!r} has no gap '_'; check the file")
    options = record["choices"] if "choices" in record else [record["option1"], record["option2"]]
    answer = int(record["answer"]) - (0 if "choices" in record else 1)
    return {"contexts": [before + option for option in options], "ending": after.strip(), "answer": answer}


def boolq(record: Mapping[str, Any]) -> Row:
    """A yes/no question, without the passage that would answer it."""
    return {"question": record["question"].strip().rstrip("?") + "?", "answer": int(_answer(record))}


def lambada(record: Mapping[str, Any]) -> Row:
    """A passage and its last word."""
    context, _, word = record["text"].rstrip().rpartition(" ")
    return {"context": context, "word": word}


def gsm8k(record: Mapping[str, Any]) -> Row:
    """A word problem, its worked solution, and the number behind ####."""
    final = record["answer"].rpartition("####")[2].strip().replace(",", "")
    return {"question": record["question"], "solution": record["answer"], "final": final}


def bbh(record: Mapping[str, Any]) -> Row:
    """An input of one BIG-Bench Hard task and the answer to give."""
    return {"question": record["input"], "target": record["target"].strip(), GROUP: record["task"]}


def bbh_examples(record: Mapping[str, Any], task: str) -> Iterator[Row]:
    """The examples of a published task file, each with the task's name."""
    return ({**example, "task": task} for example in record["examples"])


def _answer(record: Mapping[str, Any]) -> Any:
    return record["answer"] if "answer" in record else record["label"]
