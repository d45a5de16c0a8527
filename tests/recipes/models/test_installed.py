"""What transformers has is read from its files, and is what transformers itself says."""

from __future__ import annotations

import inspect

from recipes.models.installed import configuration, is_known


def test_every_model_type_of_transformers_is_known_with_its_source():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    assert len(CONFIG_MAPPING_NAMES) > 400
    assert [kind for kind in CONFIG_MAPPING_NAMES if not is_known(kind)] == []
    sourceless = {kind for kind in CONFIG_MAPPING_NAMES if not configuration(kind)}
    assert sourceless <= {
        "data2vec-audio",
        "data2vec-text",
        "data2vec-vision",
        "donut-swin",
        "gpt-sw3",
    }  # several in a folder
    for kind in ("llama", "gemma3", "gemma3_text", "openai-gpt", "qwen3_5_moe_text", "gemma4_text"):
        assert inspect.getsource(inspect.getmodule(CONFIG_MAPPING[kind])) == configuration(kind)
    assert not is_known("unheard-of") and configuration("unheard-of") == ""
