"""What results are compared with. Whatever imports this is skipped where torch is missing."""

import pytest

torch = pytest.importorskip("torch", reason="needs torch, of the `test` extra")
safetensors = pytest.importorskip("safetensors.torch")
deepseek = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
