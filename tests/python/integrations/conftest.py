# The base model that a Trainer's tests start from.
import pytest
from trainer_models import save_base


@pytest.fixture
def folder(tmp_path):
    """An empty folder but for "base", the model that trainer_models.base() reads."""
    save_base(tmp_path / "base")
    return tmp_path
