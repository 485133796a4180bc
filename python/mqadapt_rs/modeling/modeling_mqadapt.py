"""Llama with its own number of K/V heads in every layer (written by mqadapt-rs).

This file works with transformers 5 and 4.57. `config.json` holds the largest count in `num_key_value_heads` and the counts
of the layers that differ from it in `per_layer_config`.
"""

import copy

from transformers import LlamaForCausalLM, LlamaModel

FLAG = "allow_global_per_layer_attribute_access"


def config_of_layer(config, layer_idx):
    """The configuration of one layer, with that layer's `num_key_value_heads`."""
    if getattr(config, "is_heterogeneous", False):  # transformers 5
        return config.per_layer_config[layer_idx]
    own = copy.copy(config)
    for key, fields in (config.__dict__.get("per_layer_config") or {}).items():
        if int(key) == layer_idx:
            for name, value in fields.items():
                setattr(own, name, value)
    return own


class LayerwiseKV:
    def __init__(self, config):
        # transformers 5 refuses to read a field that differs by layer; its own constructor does, so let it
        before = config.__dict__.get(FLAG)
        config.__dict__[FLAG] = True
        try:
            super().__init__(config)
            widest = config.num_key_value_heads
        finally:
            del config.__dict__[FLAG]  # left there, it would be saved
            if before is not None:
                config.__dict__[FLAG] = before
        decoder = self if hasattr(self, "layers") else self.model
        for layer_idx, layer in enumerate(decoder.layers):
            own = config_of_layer(config, layer_idx)
            if own.num_key_value_heads != widest:
                layer.self_attn = type(layer.self_attn)(own, layer_idx)
                layer.self_attn.config = config  # so that set_attn_implementation() reaches it
        self.post_init()


class LayerwiseKVLlamaModel(LayerwiseKV, LlamaModel):
    pass


class LayerwiseKVLlamaForCausalLM(LayerwiseKV, LlamaForCausalLM):
    pass


# so that save_pretrained() copies this file
LayerwiseKVLlamaModel.register_for_auto_class("AutoModel")
LayerwiseKVLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
