"""The torch model: equal to Qwen2 where it must be, causal, and the same however a text is cut into calls."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, Qwen2ForCausalLM

from dsa_export.config import DSAConfig
from dsa_export.model import AttentionTrace, dense_twin, load_model
from dsa_export.model.attention.dsa import SparseAttention
from dsa_export.model.cache import MOST_DOUBLED, CacheEntry, DSACache, fill_randomly
from plugins.index_topk.op import index_scores
from plugins.sparse_attention.op import sparse_attention_torch
from tests.conftest import build_qwen

EXACT = {"atol": 1e-5, "rtol": 0}
VARIANTS = ["dense", "sparse", "sparse-training"]


def variant(model, name):
    """The model as `name`: the dense twin, the gathering core (with one k per layer), or training's masked core."""
    if name == "dense":
        return dense_twin(model)
    if name == "by-layer":
        model.set_topk([5, 30])
    return model.train(name == "sparse-training")


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_equals_stock_qwen2_when_k_covers_the_text(tmp_path, tokens, tied):
    folder = build_qwen(tmp_path / "qwen", tied=tied)
    stock = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(folder, index_topk=tokens.shape[1])
    expected = stock(tokens).logits
    torch.testing.assert_close(model(tokens).logits, expected, **EXACT)
    torch.testing.assert_close(dense_twin(model)(tokens).logits, expected, **EXACT)
    model.set_topk(8)
    assert (model(tokens).logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_generates_what_stock_qwen2_generates(qwen_folder, tokens):
    stock = Qwen2ForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32).eval()
    model = load_model(qwen_folder, index_topk=256)
    mask = torch.ones_like(tokens)
    mask[1, :40] = 0  # padded on the left; the first row says one thing again and again
    for options in ({"num_beams": 1}, {"num_beams": 3}):
        arguments = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
        expected = stock.generate(tokens, **arguments)
        assert torch.equal(model.generate(tokens, **arguments), expected) and len(set(expected[1, 60:].tolist())) > 4


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_assisted_generation_changes_nothing(dsa_model, tokens, sparse):
    """Drafts that are refused are cropped from the cache: looked up in the prompt, or of another model."""
    model = dsa_model if sparse else dense_twin(dsa_model)
    prompt = tokens[:1, :20].repeat(1, 2)
    other = dense_twin(model)
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": other}):
        assert torch.equal(
            model.generate(prompt, max_new_tokens=24, do_sample=False, pad_token_id=0, **draft), expected
        )


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
@torch.no_grad()
def test_the_bare_model_takes_the_cache_by_its_old_name_too(dsa_model, tokens):
    cache = DSACache(dsa_model.model.cache_layouts)
    for model in (dsa_model.model, dsa_model):
        model(tokens[:, :20], past_key_values=cache, use_cache=True)
    assert cache.lengths.tolist() == [40, 40]


@torch.no_grad()
def test_what_was_cropped_is_forgotten(dsa_model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :23] = 0
    whole = dsa_model(tokens, attention_mask=mask, use_cache=True)
    whole.cache.crop(0)
    assert whole.cache.get_seq_length() == 60 and whole.cache.lengths.tolist() == [37, 60]
    whole.cache.crop(-10)
    assert whole.cache.get_seq_length() == 50 and whole.cache.lengths.tolist() == [27, 50]
    again = dsa_model(tokens[:, 50:], attention_mask=mask, cache=whole.cache, use_cache=True)
    torch.testing.assert_close(again.logits, whole.logits[:, 50:], **EXACT)
    with pytest.raises(ValueError, match=r"crop\(\) takes minus the number"):
        whole.cache.crop(10)
    assert whole.cache.is_croppable and whole.cache.get_max_length() == -1


@pytest.mark.parametrize(
    "options",
    [{}, {"index_keys": "int8"}, {"index_pool": 2}, {"index_share": 2}, {"attention": "nsa"}, {"attention": "dense"}],
    ids=str,
)
@pytest.mark.parametrize("use_cache", [False, True])
@torch.no_grad()
def test_evaluation_under_autocast(qwen_folder, tokens, options, use_cache):
    model = load_model(qwen_folder, index_topk=None if "attention" in options else 16, **options)
    exact = model(tokens, labels=tokens, use_cache=use_cache).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, labels=tokens, use_cache=use_cache).loss
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize(
    "options",
    [{"output_hidden_states": True}, {"output_attentions": True}, {"inputs_embeds": torch.zeros(2, 60, 96)}],
    ids=lambda options: next(iter(options)),
)
def test_outputs_and_inputs_that_there_are_not_are_refused(dsa_model, tokens, options):
    (name,) = options
    inputs = {} if name == "inputs_embeds" else {"input_ids": tokens}
    for model in (dsa_model, dsa_model.model):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            model(**inputs, **options)
        with pytest.raises(ValueError, match="input_ids is missing"):
            model(**{name: None})


@torch.no_grad()
def test_an_output_without_losses_of_layers_has_none(dsa_model, tokens):
    """transformers' Trainer takes whatever stands beside the logits for predictions."""
    assert dsa_model(tokens, use_cache=False).to_tuple()[1:] == ()


@torch.no_grad()
def test_training_keeps_no_cache_unless_told_to(dsa_model, tokens):
    assert dsa_model(tokens).cache is not None
    assert dsa_model.train()(tokens).cache is None


@torch.no_grad()
def test_logits_of_chosen_positions(dsa_model, tokens):
    """As transformers' models take them: the last ones, or a tensor of positions."""
    logits = dsa_model(tokens, use_cache=False).logits
    positions = torch.tensor([50, 3])
    for kept, expected in ((2, logits[:, -2:]), (positions, logits[:, positions])):
        torch.testing.assert_close(dsa_model(tokens, logits_to_keep=kept, use_cache=False).logits, expected, **EXACT)


@torch.no_grad()
def test_the_loss_of_accumulated_batches_is_over_all_their_tokens(dsa_model, tokens):
    """transformers' Trainer says how many labels an update has."""
    mean = dsa_model(tokens, labels=tokens, use_cache=False).loss
    part = dsa_model(tokens, labels=tokens, use_cache=False, num_items_in_batch=500).loss
    torch.testing.assert_close(part, mean * tokens[:, 1:].numel() / 500)


@torch.no_grad()
def test_a_model_is_sparse_only_if_every_layer_is(dsa_model):
    found = []
    for selects in ([True, True], [True, False], [False, False]):
        dsa_model.select_where(selects)
        found.append(dsa_model.sparse)
    assert found == [True, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_mask": torch.ones(2, 59)}, r"attention_mask must be \[batch, past \+ tokens\], got \[2, 59\]"),
        ({"attention_mask": torch.ones(2, 1, 60, 60)}, r"got \[2, 1, 60, 60\]"),
        ({"cache": DynamicCache()}, "cache must be a DSACache, got DynamicCache"),
    ],
    ids=["short mask", "4-D mask", "cache"],
)
def test_arguments_of_other_models_are_refused(dsa_model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        dsa_model(tokens, **arguments)


def test_continuous_batching_is_refused(dsa_model):
    with pytest.raises(NotImplementedError, match=r"engines\.serve"):
        dsa_model.generate_batch([[1, 2]])


def test_a_cache_of_another_batch_is_refused(dsa_model, tokens):
    cache = dsa_model(tokens, use_cache=True).cache
    with pytest.raises(ValueError, match="the cache holds 2 rows, the input 1"):
        dsa_model(tokens[:1, :1], cache=cache, use_cache=True)


@pytest.mark.parametrize(
    ("options", "topk", "said"),
    [({"index_share": 2}, [8, 24], "index_share = 2 needs one"), ({"index_pool": 4}, 6, "index_topk and the options")],
)
def test_a_k_that_the_configuration_cannot_have_is_not_set(qwen_folder, options, topk, said):
    model = load_model(qwen_folder, index_topk=16, **options)
    with pytest.raises(ValueError, match=said):
        model.set_topk(topk)
    assert model.config.index_topk == 16 and [layer.self_attn.topk for layer in model.model.layers] == [16, 16]
    model.set_topk([8, 8])
    assert model.config.index_topk == 8
    with pytest.raises(ValueError, match="attention='dense' has no selection"):
        dense_twin(model).set_topk(8)


@torch.no_grad()
def test_k_per_layer(dsa_model, tokens):
    """Each layer selects its own k; layers that select everything leave the model dense."""
    dense = dense_twin(dsa_model)(tokens, use_cache=False).logits
    dsa_model.set_topk([60, 200])
    torch.testing.assert_close(dsa_model(tokens, use_cache=False).logits, dense, **EXACT)
    widths = []
    dsa_model.set_topk([7, 40])
    dsa_model(tokens, use_cache=False, observer=lambda trace: widths.append(trace.indices.shape[-1]) or {})
    assert widths == [7, 40]
    dsa_model.set_topk([24, 24])
    assert dsa_model.config.index_topk == 24


@pytest.mark.parametrize("name", [*VARIANTS, "by-layer"])
@torch.no_grad()
def test_no_later_token_leaks_into_earlier_outputs(dsa_model, tokens, name):
    model = variant(dsa_model, name)
    before = model(tokens, use_cache=False).logits
    for position in (1, 10, 40, 59):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 7) % 500 + 3
        after = model(changed, use_cache=False).logits
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-6, rtol=0)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("cuts", [[1] * 60, [1, 59], [37, 1, 22], [60]])
@torch.no_grad()
def test_any_cut_into_chunks_equals_one_call(dsa_model, tokens, name, cuts):
    """Chunked prefill, step by step decoding, and a one-token prompt (which is no decode step)."""
    model = variant(dsa_model, name)
    whole = model(tokens, use_cache=False).logits
    cache, parts, start = None, [], 0
    for length in cuts:
        output = model(tokens[:, start : start + length], cache=cache, use_cache=True)
        cache, start = output.cache, start + length
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


@pytest.mark.parametrize("options", [{}, {"index_pool": 2}, {"index_keys": "int8"}], ids=str)
@torch.no_grad()
def test_free_rows_of_the_cache_change_nothing(qwen_folder, tokens, monkeypatch, options):
    """On a GPU the operators get the whole cache; what stands behind the rows in use may be anything."""
    model = load_model(qwen_folder, index_topk=16, **options).eval()
    whole = model(tokens, use_cache=False).logits
    monkeypatch.setattr(SparseAttention, "wants_whole_cache", lambda *_: True)
    cache = model(tokens[:, :37], use_cache=True).cache
    for name, cached in cache.layers[0].items():
        cached[:, :, -(-37 // (2 if name == "pooled" else 1)) :] = 99
    last = model(tokens[:, 37:], cache=cache, use_cache=True).logits
    torch.testing.assert_close(last, whole[:, 37:], **EXACT)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other_or_padding(dsa_model, tokens, side):
    lengths = [60, 31]
    alone = [dsa_model(tokens[row : row + 1, :n], use_cache=False).logits[0] for row, n in enumerate(lengths)]
    batch, mask = torch.zeros_like(tokens), torch.zeros_like(tokens)
    for row, n in enumerate(lengths):
        place = slice(60 - n, 60) if side == "left" else slice(0, n)
        batch[row, place], mask[row, place] = tokens[row, :n], 1
    prompt = dsa_model(batch, attention_mask=mask, use_cache=True)
    for row in range(2):
        torch.testing.assert_close(prompt.logits[row][mask[row].bool()], alone[row], **EXACT)
    # One more token per row, at each row's own position.
    step = dsa_model(
        tokens[:, :1],
        attention_mask=torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1),
        cache=prompt.cache,
        use_cache=True,
    )
    for row, n in enumerate(lengths):
        longer = torch.cat([tokens[row : row + 1, :n], tokens[row : row + 1, :1]], 1)
        torch.testing.assert_close(step.logits[row, -1], dsa_model(longer, use_cache=False).logits[0, -1], **EXACT)


@torch.no_grad()
def test_cached_index_keys_are_rotated_once(dsa_model, tokens):
    whole = dsa_model(tokens, use_cache=True).cache
    stepped = dsa_model(tokens[:, :40], use_cache=True).cache
    before = stepped.layers[0]["index"][:, :, :40].clone()
    for position in range(40, 60):
        stepped = dsa_model(tokens[:, position : position + 1], cache=stepped, use_cache=True).cache
    assert torch.equal(stepped.layers[0]["index"][:, :, :40], before)
    for ours, theirs in zip(stepped.layers, whole.layers, strict=True):
        torch.testing.assert_close(ours["index"][:, :, :60], theirs["index"][:, :, :60], **EXACT)


@torch.no_grad()
def test_cache_grows_without_recomputation(dsa_model):
    tokens = torch.randint(3, 500, (1, 300))
    cache = dsa_model(tokens[:, :250], use_cache=True).cache
    assert cache.layers[0]["key"].shape[2] == 256
    last = dsa_model(tokens[:, 250:], cache=cache, use_cache=True)
    assert cache.layers[0]["key"].shape[2] == 512
    whole = dsa_model(tokens, use_cache=False).logits
    torch.testing.assert_close(last.logits, whole[:, 250:], **EXACT)


def small_cache() -> DSACache:
    return DSACache([[CacheEntry("key", 1, 1)]])


def test_a_cache_doubles_up_to_what_the_kernels_take():
    cache = small_cache()
    capacities = []
    for tokens in (1, 256, 257, 600, 600_000, 600_100):
        cache.begin(1, tokens, torch.bool, torch.device("cpu"))
        capacities.append(cache.capacity)
    assert capacities == [256, 256, 512, 1024, 600_064, MOST_DOUBLED]


def test_a_cache_forgets_no_more_than_it_has_and_starts_anew():
    cache = small_cache()
    for _ in range(2):
        cache.crop(-1)
        cache.batch_repeat_interleave(2)  # empty, as the lines above leave it
        assert cache.get_seq_length() == 0
        cache.begin(2, 300, torch.float32, torch.device("cpu"))
        assert cache.layers[0]["key"].shape == (2, 1, 512, 1)
        cache.advance(torch.tensor([3, 300]), 300)
        cache.batch_repeat_interleave(2)
        assert cache.lengths.tolist() == [3, 3, 300, 300]
        cache.crop(-10)
        assert cache.lengths.tolist() == [0, 0, 290, 290] and cache.get_seq_length() == 290
        cache.crop(-1000)
        assert cache.lengths.tolist() == [0] * 4 and cache.get_seq_length() == 0
        cache.reset()


def test_caches_of_random_rows_differ_and_come_again():
    caches = [torch.empty(4, 64), torch.empty(4, 64), torch.empty(50, 64, dtype=torch.uint8)]
    fill_randomly(caches, seed=1)
    before = [cache.clone() for cache in caches]
    fill_randomly(caches, seed=1)
    assert all(map(torch.equal, caches, before)) and not torch.equal(caches[0], caches[1])
    assert caches[2].unique().tolist() == list(range(1, 256))


@torch.no_grad()
def test_masked_core_of_training_equals_the_gathering_core(dsa_model, tokens):
    gathered = dsa_model.eval()(tokens, use_cache=False).logits
    masked = dsa_model.train()(tokens).logits
    torch.testing.assert_close(masked, gathered, **EXACT)


class RecordOperators(TorchDispatchMode):
    """Records every operator's name, and the operand shapes of every matrix product."""

    def __init__(self):
        super().__init__()
        self.names, self.operands = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        if any(part in str(function) for part in ("bmm", "aten.mm", "matmul")):
            self.operands += [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def test_only_selected_rows_enter_the_products(dsa_model):
    """D = 64 marks K and V (the indexer has 32), T = 75 marks the whole context: they never meet in a product."""
    tokens = torch.randint(3, 500, (1, 75))
    with RecordOperators() as sparse:
        dsa_model(tokens, use_cache=False)
    assert not any("scaled_dot_product" in name for name in sparse.names)
    assert any("dsa.sparse_attention" in name for name in sparse.names)
    assert not [shape for shape in sparse.operands if set(shape[-2:]) == {64, 75}]
    with RecordOperators() as dense:
        dense_twin(dsa_model)(tokens, use_cache=False)
    assert any("scaled_dot_product" in name for name in dense.names)

    # The operator is opaque in the model's trace; this is what it does inside.
    q, k, v = torch.randn(1, 7, 75, 64), torch.randn(1, 1, 75, 64), torch.randn(1, 1, 75, 64)
    with RecordOperators() as core:
        sparse_attention_torch(q, k, v, torch.randint(0, 75, (1, 75, 16), dtype=torch.int32), 0.125)
    assert not [shape for shape in core.operands if set(shape[-2:]) == {64, 75}]
    assert any({16, 64} == set(shape[-2:]) for shape in core.operands)  # the k = 16 selected rows do enter


@pytest.mark.parametrize("options", [{}, {"index_queries": "shared", "index_heads": 7, "index_dim": 64}], ids=str)
def test_indexer_is_detached_from_the_base(qwen_folder, tokens, options):
    """A loss on the indexer's outputs reaches the indexer only; cross-entropy reaches the base only."""
    dsa_model = load_model(qwen_folder, index_topk=16, **options)

    def observe(trace):
        return {"index": trace.index_k.square().mean() + trace.index_q.square().mean() + trace.index_weights.mean()}

    output = dsa_model.train()(tokens, labels=tokens, observer=observe)
    output.aux_losses["index"].backward(retain_graph=True)
    for name, parameter in dsa_model.named_parameters():
        touched = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert touched == (".indexer." in name), name
    dsa_model.zero_grad()
    output.loss.backward()
    for name, parameter in dsa_model.named_parameters():
        assert ".indexer." not in name or parameter.grad is None or not parameter.grad.abs().sum(), name


@torch.no_grad()
def test_scores_are_of_one_size_whatever_the_indexers(qwen_folder, tokens):
    """The KL compares their softmax with the attention."""
    sizes = []
    for heads, dim in ((4, 16), (64, 16), (4, 256)):
        model = load_model(qwen_folder, index_topk=16, index_heads=heads, index_dim=dim)
        torch.manual_seed(0)
        indexer = model.model.layers[0].self_attn.indexer
        for projection in (indexer.q_proj, indexer.k_proj, indexer.weights_proj):
            torch.nn.init.normal_(projection.weight)
        traces: list[AttentionTrace] = []
        model(tokens, use_cache=False, observer=lambda trace, traces=traces: traces.append(trace) or {})
        sizes.append(index_scores(traces[0].index_q, traces[0].index_weights, traces[0].index_k).std())
    assert max(sizes) < 1.5 * min(sizes)


def test_observer_sees_the_dense_teacher_when_selection_is_off(dsa_model, tokens):
    seen = []
    dsa_model.sparse = False
    dsa_model.train()(tokens, observer=lambda trace: seen.append(trace) or {})
    assert [trace.layer for trace in seen] == [0, 1]
    assert all(trace.indices is None for trace in seen)
    dense = dense_twin(dsa_model)(tokens, use_cache=False).logits
    torch.testing.assert_close(dsa_model(tokens).logits, dense, **EXACT)


@torch.no_grad()
def test_shared_index_queries(qwen_folder, tokens):
    """The original's option: the indexer scores with the main attention's rotated queries."""
    model = load_model(qwen_folder, index_queries="shared", index_heads=7, index_dim=64, index_topk=12)
    traces = []
    model(tokens, use_cache=False, observer=lambda trace: traces.append(trace) or {})
    torch.testing.assert_close(traces[0].index_q, traces[0].q.transpose(1, 2))
    assert not any("indexer.q_proj" in name for name in model.state_dict())


def test_positions_that_do_not_count_the_tokens_are_refused(dsa_model, tokens):
    with pytest.raises(ValueError, match="packed"):
        dsa_model(tokens, position_ids=torch.arange(60) % 30)


@torch.no_grad()
def test_positions_may_have_gaps_without_a_cache(dsa_model, qwen_folder, tokens):
    """As stock models take them; with a cache the next token's position would not be the number of tokens."""
    positions = torch.arange(60) + 100 * (torch.arange(60) >= 30)
    padded = torch.ones_like(tokens)
    padded[1, :20] = 0
    stock = AutoModelForCausalLM.from_pretrained(qwen_folder, dtype=torch.float32)
    for mask in (torch.ones_like(tokens), padded):
        expected = stock(tokens, attention_mask=mask, position_ids=positions.expand(2, 60), use_cache=False).logits
        ours = dense_twin(dsa_model)(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], **EXACT)
    with pytest.raises(ValueError, match="from 0 with a cache and upwards without one"):
        dsa_model(tokens, position_ids=positions, use_cache=True)


@pytest.mark.parametrize("topk", [16, [8, 24]])
def test_round_trip_through_transformers(dsa_model, tmp_path, topk):
    dsa_model.set_topk(topk)
    dsa_model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.index_topk == topk
    assert [layer.self_attn.topk for layer in again.model.layers] == (topk if isinstance(topk, list) else [topk] * 2)
    backbone = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, dsa_model.model.state_dict()[name]) for name, tensor in backbone.items())
    state = dsa_model.state_dict()
    assert state.keys() == again.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"attention": "other"},
        {"index_topk": 0},
        {"index_topk": 2.5},
        {"index_topk": [16, 0], "num_hidden_layers": 2},
        {"index_topk": [16, 16, 16], "num_hidden_layers": 2},
        {"index_dim": 33},
        {"index_dim": 0},
        {"index_heads": 0},
        {"index_queries": "shared", "index_heads": 3},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 8},
    ],
)
def test_configurations_that_cannot_work_are_refused(options):
    with pytest.raises(ValueError):
        DSAConfig(**options)
