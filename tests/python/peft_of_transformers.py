"""Transformers' own adapters ask for a PEFT that need not be out yet: 5.24 for 0.22."""

import peft
import pytest
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION

needs_peft_of_transformers = pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION),
    reason=f"transformers' add_adapter asks for PEFT {MIN_PEFT_VERSION}, found {peft.__version__}",
)
