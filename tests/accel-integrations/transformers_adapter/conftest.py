"""What several tests of models of transformers use."""

from typing import Any

import pytest
import transformers

from sms_spam import MINILM


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """That of a real encoder."""
    return transformers.AutoTokenizer.from_pretrained(MINILM)
