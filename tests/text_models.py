"""Text models of every architecture, opened from the folders of the fixture ``text_folder``."""

from collections.abc import Callable
from pathlib import Path

from ttmpd.models.open import open_model
from ttmpd.models.opened import OpenedModel

KINDS = ("bert", "roberta", "distilbert", "gpt2", "llama")
Folder = Callable[[str], Path]


def opened_text_model(text_folder: Folder, name: str) -> OpenedModel:
    return open_model(f"hf:{text_folder(name)}")
