"""The short texts in front of a prompt that make keys and targets hold in more than one context.

Source: MEMIT, arXiv:2210.07229, sec. 4.3: the bare prompt, and five texts that the model itself wrote.
"""

from __future__ import annotations

from nmke.models.load import EditableModel

STARTS = ("The", "Therefore", "Because", "I", "You")


def write_contexts(model: EditableModel, tokens: int = 10, seed: int = 0) -> tuple[str, ...]:
    """Prefixes for every prompt: the empty one, then one text of `tokens` tokens per start, ending in ". ".

    Args:
        model: The model that writes them, sampled with `seed`.
        tokens: Tokens written behind each start.
        seed: Seed of the sampling.
    """
    written = model.generate(list(STARTS), tokens, do_sample=True, seed=seed)
    texts = (" ".join((start + text).split()) for start, text in zip(STARTS, written, strict=True))
    return ("", *(f"{text.rstrip('.')}. " for text in texts))
