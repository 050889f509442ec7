"""Fluency and consistency of longer generations.

Source: Meng et al. 2022, arXiv:2202.05262, appendix on evaluation (GE and RS).
Differs: words are runs of letters and digits in lower case, where the reference uses nltk's tokenizer and
scikit-learn's vocabulary of the whole reference corpus; numbers are comparable within this package only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return _WORD.findall(text.lower())


def ngram_entropy(tokens: Sequence[str], n: int) -> float:
    """Shannon entropy of the n-gram distribution, in bits; 0 when there is no n-gram."""
    counts = Counter(zip(*(tokens[start:] for start in range(n)), strict=False))
    total = counts.total()
    return math.fsum(count / total * math.log2(total / count) for count in counts.values())


def fluency(text: str) -> float:
    """Mean of 2/3 of the bigram and 4/3 of the trigram entropy, in bits; low for repetitive text.

    Args:
        text: A generation of about 100 tokens.
    """
    tokens = words(text)
    return (2 / 3 * ngram_entropy(tokens, 2) + 4 / 3 * ngram_entropy(tokens, 3)) / 2


def consistency(generations: Sequence[str], references: Sequence[str]) -> float:
    """TF-IDF cosine between all generations about a subject and the reference texts about its new object.

    Term frequency is the plain count, inverse document frequency ln((1 + N) / (1 + df)) + 1 over the
    reference texts and the generations taken as one document (scikit-learn's smoothed form).

    Returns:
        A number in [0, 1]; 0 when one side has no word.
    """
    documents = [Counter(words(text)) for text in (*references, " ".join(generations))]
    frequency = Counter(word for document in documents for word in document)
    weight = {word: math.log((1 + len(documents)) / (1 + df)) + 1 for word, df in frequency.items()}
    told = Counter(words(" ".join(references)))
    return _cosine(
        {word: count * weight[word] for word, count in documents[-1].items()},
        {word: count * weight[word] for word, count in told.items()},
    )


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
    size = math.sqrt(sum(x * x for x in a.values())) * math.sqrt(sum(x * x for x in b.values()))
    return math.fsum(value * b.get(word, 0.0) for word, value in a.items()) / size if size else 0.0
