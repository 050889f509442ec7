"""Session-wide fixtures: one thread, tiny models and tokenizers built once. Tests that write weights copy them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests import tiny
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

torch.set_num_threads(1)
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """A tiny Llama; shared, so leave its weights alone or deep-copy it."""
    return tiny.tiny_llama()


@pytest.fixture(scope="session")
def gpt2() -> PreTrainedModel:
    """A tiny GPT-2; shared, so leave its weights alone or deep-copy it."""
    return tiny.tiny_gpt2()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without a beginning-of-sequence token."""
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A saved tiny Llama with its tokenizer, as `from_pretrained` reads it."""
    yield tiny.save_tiny(tmp_path_factory.mktemp("llama"), tiny.tiny_llama)
