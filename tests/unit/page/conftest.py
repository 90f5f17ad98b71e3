from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import build_models, export_models, write_tokenizer

from megarq.inference.generator import ImageGenerator
from megarq.page.page import Page


@pytest.fixture(scope="session")
def make_page(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Page]:
    """The page of a tiny model of up to six pictures at once: make_page(cond_length=1, ..)."""

    def make(**changes: Any) -> Page:
        folder: Path = tmp_path_factory.mktemp("page")
        model = export_models(build_models(**changes), folder / "model", tokenizer_file=write_tokenizer(folder))
        return Page(ImageGenerator.from_pretrained(model), most=6)

    return make


@pytest.fixture
def page(make_page: Callable[..., Page]) -> Page:
    """That of a model of captions."""
    return make_page()
