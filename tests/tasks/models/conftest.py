"""A checkpoint for the tests of models."""

from pathlib import Path

import pytest

from storage.files import Checkpoint


@pytest.fixture
def checkpoint(home: Path, tiny_model: Path) -> Checkpoint:
    """The tiny model where a checkpoint of this home would be."""
    checkpoint = Checkpoint(digest="tiny", content="")
    checkpoint.path.parent.mkdir(parents=True)
    checkpoint.path.symlink_to(tiny_model)
    return checkpoint
