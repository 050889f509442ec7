"""Shapes around CounterFact's `requested_rewrite`: CounterFact, MQuAKE, PEAK."""

from __future__ import annotations

from nmke.facts.record import Record
from nmke.facts.shape import Shape, string, template
from nmke.types import EditCase, EditRequest, Neighbor, Question


def _counterfact(record: Record, derived: bool) -> EditCase:
    rewrite = record.nested("requested_rewrite", record.data.get("requested_rewrite"))
    paraphrases, neighbors = record.texts("paraphrase_prompts"), record.texts("neighborhood_prompts")
    if derived:
        paraphrases += record.texts("paraphrase_prompts_rebuilt")
        neighbors += record.texts("neighborhood_prompts_pool")
    true = string(rewrite, "target_true")
    request = _request(
        rewrite,
        record.identifier("case_id", "counterfact"),
        paraphrases,
        tuple(Neighbor(prompt, true) for prompt in neighbors),
    )
    return EditCase(
        (request,),
        generation_prompts=record.texts("generation_prompts"),
        attribute_prompts=record.texts("attribute_prompts"),
    )


def _mquake(record: Record, derived: bool) -> EditCase:
    rewrites = [
        record.nested(f"requested_rewrite[{index}]", item)
        for index, item in enumerate(record.items("requested_rewrite"))
    ]
    if not rewrites:
        raise record.unusable("requested_rewrite", "is empty; a case needs a fact to edit")
    name = record.identifier("case_id", "mquake")
    requests = tuple(
        _request(rewrite, f"{name}-{number}" if name else "", rewrite.texts("question"))
        for number, rewrite in enumerate(rewrites, start=1)
    )
    answers = (record.text("new_answer").strip(), *record.texts("new_answer_alias"))
    old = record.optional("answer")
    rival = None if old in answers else old
    questions = tuple(Question("multi_hop", text, answers, rival) for text in record.texts("questions"))
    return EditCase(requests, name, questions)


def _peak(record: Record, derived: bool) -> EditCase:
    rewrite = record.nested("requested_rewrite", record.data.get("requested_rewrite"))
    neighbors = []
    for index, pair in enumerate(record.items("neighborhood_prompts")):
        field = f"neighborhood_prompts[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise record.error(field, "is no pair; write [prompt, answer]")
        prompt, answer = (record.checked(field, part) for part in pair)
        neighbors.append(Neighbor(prompt, answer.strip()))
    request = _request(
        rewrite, record.identifier("case_id", "peak"), record.texts("para_add_prompts"), tuple(neighbors)
    )
    kept, false = record.texts("postive_list"), record.texts("negtive_list")
    questions = tuple(
        Question("kept_answer", request.text, (answer,), false[index % len(false)])
        for index, answer in enumerate(kept if false else ())
    )
    return EditCase((request,), questions=questions)


def _request(
    rewrite: Record, name: str, paraphrases: tuple[str, ...], neighbors: tuple[Neighbor, ...] = ()
) -> EditRequest:
    """The fact that a `requested_rewrite` asks for."""
    prompt, subject = template(rewrite, "prompt", rewrite.text("subject"))
    return EditRequest(
        prompt=prompt,
        subject=subject,
        target_new=string(rewrite, "target_new"),
        id=name,
        target_true=string(rewrite, "target_true"),
        relation=rewrite.optional("relation_id"),
        paraphrases=paraphrases,
        neighborhood=neighbors,
    )


COUNTERFACT = Shape(
    "counterfact",
    "CounterFact as published with ROME",
    frozenset({"requested_rewrite"}),
    frozenset(
        {
            "case_id",
            "requested_rewrite",
            "paraphrase_prompts",
            "neighborhood_prompts",
            "generation_prompts",
            "attribute_prompts",
        }
    ),
    _counterfact,
)
MQUAKE = Shape(
    "mquake",
    "MQuAKE, several facts and multi-hop questions a record",
    frozenset({"new_answer", "new_single_hops"}),
    frozenset({"case_id", "requested_rewrite", "questions", "answer", "new_answer", "new_answer_alias"}),
    _mquake,
)
PEAK = Shape(
    "peak",
    "PEAK, an answer added to others that must be kept",
    frozenset({"postive_list", "negtive_list"}),
    frozenset(
        {
            "case_id",
            "requested_rewrite",
            "postive_list",
            "negtive_list",
            "para_add_prompts",
            "neighborhood_prompts",
        }
    ),
    _peak,
)
