"""GPTBigCode with any number of K/V heads in every layer (written by mqadapt-rs).

This file works with transformers 5 and 4.57. `config.json` holds the largest count in `num_key_value_heads` and the counts
of the layers that differ from it in `per_layer_config`. The rows of a fused projection are those of the query heads, then of
the K heads, then of the V heads.
"""

import copy

import torch
from torch import nn
from transformers import GPTBigCodeForCausalLM, GPTBigCodeModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

FLAG = "allow_global_per_layer_attribute_access"
NOT_PASSED_ON = ("use_cache", "output_attentions", "head_mask", "encoder_hidden_states", "encoder_attention_mask")


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


def eager_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """The attention of the eager implementation: K/V heads are repeated."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask[..., : key.shape[-2]]
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class GroupedHeads:
    """What makes the attention of a layer one with fewer K/V heads than query heads."""

    def group(self, config, num_key_value_heads):
        """Makes the fused projection as high as these heads ask for."""
        hidden_size, heads = config.hidden_size, config.num_attention_heads
        self.head_dim = hidden_size // heads
        self.num_key_value_groups = heads // num_key_value_heads
        self.kv_dim = num_key_value_heads * self.head_dim
        scaled = getattr(config, "scale_attn_weights", True)
        self.scaling = self.head_dim**-0.5 if scaled else 1.0
        old = getattr(self, self.fused)
        setattr(self, self.fused, nn.Linear(hidden_size, hidden_size + 2 * self.kv_dim, bias=old.bias is not None))

    def forward(self, hidden_states, attention_mask=None, layer_past=None, position_embeddings=None, **kwargs):
        fused = getattr(self, self.fused)(hidden_states)
        parts = fused.split([fused.shape[-1] - 2 * self.kv_dim, self.kv_dim, self.kv_dim], dim=-1)
        # [batch, heads, seq_len, head_dim]
        query, key, value = (x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2) for x in parts)
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if layer_past is not None:
            cache = getattr(layer_past, "self_attention_cache", layer_past)
            positions = kwargs.get("cache_position")  # transformers 4.57
            more = () if positions is None else ({"cache_position": positions},)
            key, value = cache.update(key, value, self.layer_idx, *more)
        kind = self.config._attn_implementation
        attend = eager_attention if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
        dropout = getattr(self, "attention_dropout", getattr(self, "attn_pdrop", 0.0)) if self.training else 0.0
        kwargs = {name: value for name, value in kwargs.items() if name not in NOT_PASSED_ON}
        out, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = getattr(self, self.output)(out.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return getattr(self, "resid_dropout", nn.Identity())(out), weights


class LayerwiseKV:
    def __init__(self, config):
        # transformers 5 refuses to read a field that differs by layer; its own constructor does, so let it
        before = config.__dict__.get(FLAG)
        config.__dict__[FLAG] = True
        try:
            super().__init__(config)
        finally:
            del config.__dict__[FLAG]  # left there, it would be saved
            if before is not None:
                config.__dict__[FLAG] = before
        decoder = getattr(self, self.base_model_prefix, self)
        for layer_idx, layer in enumerate(getattr(decoder, "h", None) or decoder.layers):
            attention, names = (
                (layer.attn, ("c_attn", "c_proj"))
                if hasattr(layer, "attn")
                else (layer.attention, ("query_key_value", "dense"))
            )
            fused, output = names
            kind = type(attention)
            attention.__class__ = type(kind.__name__, (GroupedHeads, kind), {"fused": fused, "output": output})
            attention.group(config, config_of_layer(config, layer_idx).num_key_value_heads)
        self.post_init()


class LayerwiseKVGPTBigCodeModel(LayerwiseKV, GPTBigCodeModel):
    pass


class LayerwiseKVGPTBigCodeForCausalLM(LayerwiseKV, GPTBigCodeForCausalLM):
    pass


def share_names(of, to):
    """Lets a class of ours read and write the names of tensors that its base class does (transformers 5)."""
    try:
        from transformers import conversion_mapping as names
    except ImportError:
        return
    mapping = names.get_checkpoint_conversion_mapping(of.__name__)
    if mapping is not None:
        names.register_checkpoint_conversion_mapping(to.__name__, mapping, overwrite=True)


share_names(GPTBigCodeForCausalLM, LayerwiseKVGPTBigCodeForCausalLM)
# so that save_pretrained() copies this file
LayerwiseKVGPTBigCodeModel.register_for_auto_class("AutoModel")
LayerwiseKVGPTBigCodeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
