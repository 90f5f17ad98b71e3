"""tools/demo_app.py, before it serves."""

import os
import sys

import pytest
from scripts import load_script
from tiny_models import build_models, export_models, write_tokenizer

import megarq.page
from megarq.errors import ConfigError


def test_a_missing_gradio_is_asked_for(tmp_path, monkeypatch):
    model = export_models(build_models(), tmp_path / "model", tokenizer_file=write_tokenizer(tmp_path))
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "megarq.page.layout", raising=False)
    monkeypatch.delattr(megarq.page, "layout", raising=False)  # another test may have imported it
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ConfigError, match=r"needs the package gradio. Run `pip install -e '.\[app\]'`"):
        load_script("tools/demo_app.py").main([str(model)])
