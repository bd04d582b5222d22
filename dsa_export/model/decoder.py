"""The decoder: one class for dense and sparse models, with transformers' parameter names.

Shapes: B batch, S tokens of this call, E hidden size, V vocabulary. Inside, rows are padded on the right and each row
has its own past length; batches padded on the left (transformers' generate) are moved at the door and back.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput
from transformers.utils.deprecation import deprecate_kwarg

from dsa_export.config import DSAConfig
from dsa_export.model import attention, feed_forward
from dsa_export.model.attention import Call
from dsa_export.model.attention.base import Observer, Selector, mean_over_layers
from dsa_export.model.cache import CacheEntry, DSACache, LayerCache
from dsa_export.model.norm import RMSNorm
from dsa_export.model.rope import RotaryTable
from dsa_export.topk import TopK, compact_topk, topk_per_layer

UNSUPPORTED = ("inputs_embeds", "output_attentions", "output_hidden_states")
"""Arguments of transformers' models that this one must not drop in silence."""


@dataclass
class DecoderOutput(ModelOutput):
    """last_hidden_state [B, S, E]; cache; aux_losses: the observer's and the slots' scalars, means of the layers."""

    last_hidden_state: Tensor | None = None
    cache: DSACache | None = None
    aux_losses: dict[str, Tensor] | None = None


@dataclass
class CausalLMOutput(ModelOutput):
    """loss (scalar, if labels were given), logits [B, S, V], cache, aux_losses as in DecoderOutput."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: DSACache | None = None
    aux_losses: dict[str, Tensor] | None = None


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DSAConfig, layer: int):
        super().__init__()
        self.self_attn = attention.VARIANTS[config.attention](config, layer)
        self.mlp = feed_forward.VARIANTS[config.feed_forward](config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        attended, aux = self.self_attn(self.input_layernorm(hidden), call)
        hidden = hidden + attended
        transformed, mlp_aux = self.mlp(self.post_attention_layernorm(hidden), call.lengths)
        return hidden + transformed, aux | mlp_aux


class DSAPreTrainedModel(PreTrainedModel):
    config_class = DSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["DecoderLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"rotary_emb\.inv_freq"]  # older Llama files hold it
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        reset = getattr(module, "reset", None)  # RotaryTable, and what a variant initialises in a way of its own
        if callable(reset):
            reset()


class DSAModel(DSAPreTrainedModel):
    """The backbone: embeddings, decoder layers, final norm."""

    def __init__(self, config: DSAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryTable(config, config.rope_size)
        self.index_rotary = RotaryTable(config, config.index_dim)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def cache_layouts(self) -> list[list[CacheEntry]]:
        """The cache layout of every layer."""
        variant = attention.VARIANTS[self.config.attention]
        return [variant.cache_layout(self.config, layer) for layer in range(self.config.num_hidden_layers)]

    def run(
        self,
        input_ids: Tensor,
        past_lengths: Tensor,
        lengths: Tensor,
        caches: list[LayerCache] | None = None,
        observer: Observer | None = None,
        selector: Selector | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The step that the exported graphs hold: input_ids [B, S], padded on the right, after past_lengths [B] tokens.

        `lengths` [B] are the valid tokens of this call; `positions` [B, S] where RoPE takes the tokens to stand (None:
        one after the other). Returns the hidden states [B, S, E] (after the final norm) and the scalars of the observer
        and the feed-forwards, averaged over the layers.
        """
        S = input_ids.shape[1]
        hidden = self.embed_tokens(input_ids)
        if positions is None:
            positions = past_lengths.unsqueeze(1) + torch.arange(S, device=input_ids.device)
        call = Call(
            rope=self.rotary(positions, hidden.dtype),
            index_rope=self.index_rotary(positions, hidden.dtype),
            kv_lengths=past_lengths + S,
            lengths=lengths,
            caches=caches,
            observer=observer,
            selector=selector,
            handed_on=UserDict() if self.training else {},
        )
        aux: list[dict[str, Tensor]] = []
        for layer in self.layers:
            hidden, layer_aux = layer(hidden, call)
            aux.append(layer_aux)
        return self.norm(hidden), mean_over_layers(aux)

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DSACache | None = None,
        use_cache: bool | None = False,
        observer: Observer | None = None,
        selector: Selector | None = None,
        **kwargs: Any,
    ) -> DecoderOutput:
        """transformers' calling convention. attention_mask [B, past + S], 1 = token; 4-D masks are refused.

        position_ids [B, S] count each row's tokens; without a cache they may have gaps.
        """
        for option in UNSUPPORTED:
            value = kwargs.get(option, getattr(self.config, option, None))
            if value is not None and value is not False:
                raise ValueError(f"{option} is not supported")
        if input_ids is None:
            raise ValueError("input_ids is missing")
        B, S = input_ids.shape
        valid = _valid_tokens(attention_mask, input_ids)
        lengths = valid.sum(1)
        padded = not bool(valid.all())
        if padded:  # tokens first, padding last, order kept
            order = (~valid).int().argsort(dim=1, stable=True)
            input_ids = input_ids.gather(1, order)

        caches = None
        past_lengths = torch.zeros(B, dtype=torch.int64, device=input_ids.device)
        if use_cache and cache is None:
            cache = DSACache(self.cache_layouts)
        if cache is not None:
            if not isinstance(cache, DSACache):
                raise ValueError(f"cache must be a DSACache, got {type(cache).__name__}")
            caches = cache.begin(B, S, self.dtype, input_ids.device)
            past_lengths = caches[0].past_lengths
        positions = None
        if position_ids is not None:
            position_ids, expected = position_ids.expand(B, S), past_lengths[:, None] + valid.cumsum(1) - 1
            if not bool((position_ids == expected)[valid].all()):
                positions = position_ids.gather(1, order) if padded else position_ids
                within = torch.arange(1, S, device=lengths.device) < lengths[:, None]
                if caches is not None or bool((positions[:, 1:] <= positions[:, :-1])[within].any()):
                    raise ValueError(
                        "position_ids must count each row's tokens, from 0 with a cache and upwards without one: "
                        "packed rows, and in generate() batches that are padded on the right, are not supported"
                    )

        hidden, aux = self.run(input_ids, past_lengths, lengths, caches, observer, selector, positions)
        if cache is not None:
            cache.advance(lengths, S)
        if padded:
            hidden = hidden.gather(1, order.argsort(dim=1)[..., None].expand_as(hidden))
        return DecoderOutput(hidden, cache if use_cache else None, aux)


def _valid_tokens(attention_mask: Tensor | None, input_ids: Tensor) -> Tensor:
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
        raise ValueError(f"attention_mask must be [batch, past + tokens], got {list(attention_mask.shape)}")
    return attention_mask[:, -input_ids.shape[1] :].bool()


class DSAForCausalLM(DSAPreTrainedModel, GenerationMixin):
    """A language model of one of the families (config.family) with dense or sparse attention (config.attention)."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DSAConfig, types: Mapping[str, torch.dtype] = MappingProxyType({})):
        """types: of parameters that are not of torch's default type, by their names."""
        super().__init__(config)
        self.model = DSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        for name, dtype in types.items():
            parameter = self.get_parameter(name)
            parameter.data = parameter.data.to(dtype)

    @property
    def sparse(self) -> bool:
        """Whether attention goes over the selection (True) or over everything visible (False: dense teacher)."""
        return all(getattr(layer.self_attn, "sparse", False) for layer in self.model.layers)

    @sparse.setter
    def sparse(self, value: bool) -> None:
        self.select_where([value] * len(self.model.layers))

    def select_where(self, selects: Iterable[bool]) -> None:
        """Sets `sparse` layer by layer."""
        for layer, value in zip(self._selecting(), selects, strict=True):
            layer.sparse = value

    def set_topk(self, topk: TopK) -> None:
        """Sets k, for all layers or one per layer. Raises ValueError for k that the configuration cannot have."""
        selecting, values = self._selecting(), topk_per_layer(topk, len(self.model.layers))
        before, self.config.index_topk = self.config.index_topk, compact_topk(values)
        try:
            self.config.check()
        except ValueError:
            self.config.index_topk = before
            raise
        for layer, k in zip(selecting, values, strict=True):
            layer.topk = k

    def _selecting(self) -> list[Any]:
        """Every layer's attention. Raises ValueError unless it goes over a selection of k tokens."""
        attentions: list[Any] = [layer.self_attn for layer in self.model.layers]
        if not all(hasattr(attention, "sparse") for attention in attentions):
            raise ValueError(f"attention={self.config.attention!r} has no selection of k tokens")
        return attentions

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DSACache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        observer: Observer | None = None,
        selector: Selector | None = None,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """input_ids [B, S] → logits [B, S, V] (the last `logits_to_keep` positions, or those indexed; 0: all).

        labels [B, S], -100 ignored, are shifted inside. `observer` sees every layer (see AttentionTrace),
        `selector` selects in place of the indexers where attention is sparse.
        """
        # Training never keeps a cache; inference follows the configuration.
        keep = (
            (self.config.use_cache and not self.training and not (observer or selector))
            if use_cache is None
            else use_cache
        )
        output = self.model(
            input_ids, attention_mask, position_ids, cache, keep, observer, selector, **kwargs
        )  # fmt: skip
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, rows])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss, logits, output.cache, output.aux_losses or None)

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """transformers' continuous batching packs rows and pages the cache, which this model's cache does not do."""
        raise NotImplementedError("continuous batching is not supported: use generate(), or engines.serve for several")

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict, *args: Any) -> None:
        if generation_config.use_cache is not False and model_kwargs.get("cache") is None:
            model_kwargs["cache"] = DSACache(self.model.cache_layouts)
