"""Native sparse attention: against its definition, one query and head at a time; dense where it must be; causal; the
same however a text is cut into calls; and trainable in all its parts."""

from __future__ import annotations

import math

import pytest
import torch

from dsa_export.config import DSAConfig
from dsa_export.model import DSAForCausalLM, dense_twin, load_model
from dsa_export.model.attention import Call
from dsa_export.model.attention.nsa import BRANCHES, NativeSparseAttention, grouped_attention
from tests.conftest import VOCABULARY

EXACT = {"atol": 2e-5, "rtol": 0}
OPTIONS = {
    "nsa_block_size": 8,
    "nsa_stride": 4,
    "nsa_selection_size": 8,
    "nsa_selected_blocks": 4,
    "nsa_window": 10,
}
BUGS = (
    "query 5 everywhere",
    "no causal mask in compression",
    "no causal mask in selection",
    "keys and values summed over heads",
    "window masked after the softmax",
    "overlap sum one stride off",
    "one selection for all KV heads",
)


def config(layers: int = 2, **options) -> DSAConfig:
    """Two layers, 14 query heads on 2 KV heads: groups of 7."""
    return DSAConfig(
        attention="nsa",
        vocab_size=VOCABULARY,
        hidden_size=64,
        head_dim=16,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        eos_token_id=1,
        **{**OPTIONS, **options},
    )


def build(layers: int = 2, **options) -> DSAForCausalLM:
    """Random weights that make attention sharp and every part of a branch matter."""
    torch.manual_seed(0)
    model = DSAForCausalLM(config(layers, **options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "self_attn" in name:
                parameter.normal_(std=0.03 if "o_proj" in name else 0.3)
    return model


@pytest.fixture(scope="module")
def model() -> DSAForCausalLM:
    return build()


def only(model: DSAForCausalLM, *branches: str) -> DSAForCausalLM:
    """Opens the gates of these branches and closes the others."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.branch_gates.weight.zero_()
            for branch, bias in zip(BRANCHES, layer.self_attn.branch_gates.bias.chunk(3), strict=True):
                bias.fill_(100.0 if branch in branches else -100.0)
    return model


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    half = x.shape[-1] // 2
    angle = position * 1e4 ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def reference(layer: NativeSparseAttention, hidden: torch.Tensor, bug: str | None = None) -> torch.Tensor:
    """hidden [T, E] → [T, E] by the equations, with one of the notebook's bugs if asked for."""
    c, T = layer, len(hidden)
    G, D = c.query_heads // c.kv_heads, round(c.scale**-2)

    def heads(projection):
        rows = projection(hidden).view(T, -1, D)
        if bug == "keys and values summed over heads" and rows.shape[1] == c.kv_heads:
            rows = rows.sum(1, keepdim=True).expand_as(rows)
        return rows

    def rotated(rows):
        return torch.stack([rotate(row, t) for t, row in enumerate(rows)])

    q = rotated(heads(c.q_proj))
    if bug == "query 5 everywhere":
        q = q[5:6].expand_as(q)
    k, v = rotated(heads(c.k_proj)), heads(c.v_proj)
    window_k, window_v = rotated(heads(c.window.k_proj)), heads(c.window.v_proj)
    block_k, block_v = heads(c.compression.k_proj), heads(c.compression.v_proj)
    starts = range(0, T - c.block + 1, c.stride)
    gates = torch.sigmoid(c.branch_gates(hidden)).view(T, 3, c.query_heads)
    output = torch.zeros(T, c.query_heads, D)
    selected: dict[tuple[int, int], list[int]] = {}
    for t in range(T):
        for h in range(c.kv_heads):
            group = range(h * G, (h + 1) * G)
            visible = [s for s in starts if s + c.block - 1 <= t or bug == "no causal mask in compression"]
            importance = [0.0] * math.ceil(T / c.selection_size)
            if visible:
                keys = torch.stack([
                    rotate(c.compression.key(block_k[s : s + c.block, h]), s + c.block - 1) for s in visible
                ])  # fmt: skip
                values = torch.stack([c.compression.value(block_v[s : s + c.block, h]) for s in visible])
            for head in group if visible else []:
                p = torch.softmax(keys @ q[t, head] * c.scale, 0)
                output[t, head] += gates[t, 0, head] * (p @ values)
                for s, weight in zip(visible, p.tolist(), strict=True):
                    for token in range(s, s + c.block):
                        shifted = token + (c.stride if bug == "overlap sum one stride off" else 0)
                        importance[min(shifted, T - 1) // c.selection_size] += weight / c.stride

            own = t // c.selection_size
            if bug == "no causal mask in selection":
                own = len(importance) - 1
            always = {0, max(own - 1, 0), own}
            others = sorted((j for j in range(own + 1) if j not in always), key=lambda j: (-importance[j], j))
            blocks = [*always, *others][: c.selected_blocks] if own + 1 > len(always) else range(own + 1)
            selected[t, h] = [s for j in blocks for s in range(j * c.selection_size, (j + 1) * c.selection_size)]
            chosen = selected[t, 0 if bug == "one selection for all KV heads" else h]
            limit = T - 1 if bug == "no causal mask in selection" else t
            chosen = [s for s in chosen if s <= limit]
            recent = list(range(max(0, t - c.window_size + 1), t + 1))
            for head in group:
                p = torch.softmax(k[chosen, h] @ q[t, head] * c.scale, 0)
                output[t, head] += gates[t, 1, head] * (p @ v[chosen, h])
                if bug == "window masked after the softmax":
                    p = torch.softmax(window_k[:, h] @ q[t, head] * c.scale, 0)[recent]
                else:
                    p = torch.softmax(window_k[recent, h] @ q[t, head] * c.scale, 0)
                output[t, head] += gates[t, 2, head] * (p @ window_v[recent, h])
    return c.o_proj(output.flatten(1))


@pytest.fixture(scope="module")
def layer_case(model):
    """A layer, its input [T, E] and its output in training's masked form and in the gathering one."""
    layer, T = model.model.layers[0].self_attn, 47
    hidden = torch.randn(1, T, 64, generator=torch.Generator().manual_seed(1))
    rope = model.model.rotary(torch.arange(T)[None], torch.float32)
    call = Call(rope=rope, index_rope=rope, kv_lengths=torch.tensor([T]), lengths=torch.tensor([T]), caches=None)
    with torch.no_grad():
        outputs = [layer.train(mode)(hidden, call)[0][0] for mode in (True, False)]
    return layer, hidden[0], outputs


@torch.no_grad()
def test_equals_the_definition(layer_case):
    layer, hidden, outputs = layer_case
    expected = reference(layer, hidden)
    for output in outputs:
        torch.testing.assert_close(output, expected, **EXACT)


@pytest.mark.parametrize("bug", BUGS)
@torch.no_grad()
def test_the_definition_tells_each_bug_of_the_notebook(layer_case, bug):
    layer, hidden, outputs = layer_case
    assert (reference(layer, hidden, bug) - outputs[0]).abs().max() > 1e-2


@torch.no_grad()
def test_selection_alone_with_everything_selected_is_dense(tokens):
    model = only(build(nsa_selected_blocks=8), "selection")
    torch.testing.assert_close(model(tokens).logits, dense_twin(model)(tokens).logits, **EXACT)
    fewer = only(build(nsa_selected_blocks=4), "selection")
    assert (fewer(tokens).logits - dense_twin(model)(tokens).logits).abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_no_later_token_leaks_into_earlier_outputs(model, tokens, training):
    model.train(training)
    before = model(tokens, use_cache=False).logits
    for position in (1, 7, 8, 33, 59):
        changed = tokens.clone()
        changed[:, position:] = (changed[:, position:] + 7) % 500 + 3
        after = model(changed, use_cache=False).logits
        torch.testing.assert_close(after[:, :position], before[:, :position], atol=1e-6, rtol=0)
        assert (after[:, position] - before[:, position]).abs().max() > 1e-3
    model.eval()


@pytest.mark.parametrize("cuts", [[1] * 60, [1, 59], [37, 1, 22], [13, 4, 4, 39]])
@torch.no_grad()
def test_any_cut_into_chunks_equals_one_call(model, tokens, cuts):
    whole = model(tokens, use_cache=False).logits
    cache, parts, start = None, [], 0
    for length in cuts:
        output = model(tokens[:, start : start + length], cache=cache, use_cache=True)
        cache, start = output.cache, start + length
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, **EXACT)


@torch.no_grad()
def test_padded_rows_of_different_lengths(model, tokens):
    """Blocks that hold padding of one call are made again when their tokens come."""
    lengths = [60, 29]
    mask = (torch.arange(60) < torch.tensor(lengths)[:, None]).long()
    prompt = model(tokens * mask, attention_mask=mask, use_cache=True)
    more = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.cat([mask, torch.ones(2, 9, dtype=torch.int64)], 1)
    step = model(more, attention_mask=mask, cache=prompt.cache, use_cache=True).logits
    for row, n in enumerate(lengths):
        alone = model(torch.cat([tokens[row : row + 1, :n], more[row : row + 1]], 1), use_cache=False).logits
        torch.testing.assert_close(prompt.logits[row, :n], alone[0, :n], **EXACT)
        torch.testing.assert_close(step[row], alone[0, n:], **EXACT)


def test_gradients_reach_every_parameter_of_every_branch(model, tokens):
    model.train()(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    model.zero_grad()
    model.eval()


@torch.no_grad()
def test_starts_close_to_dense_and_comes_back_as_it_was_saved(qwen_folder, tokens, tmp_path):
    """On a dense checkpoint's weights: exactly dense but for the compression, which has a twentieth of the weight."""
    model = load_model(qwen_folder, attention="nsa", nsa_window=64)
    dense = load_model(qwen_folder, attention="dense")(tokens).logits
    difference = (model(tokens).logits - dense).abs().mean() / dense.abs().mean()
    assert 1e-4 < difference < 0.1
    for layer in model.model.layers:
        layer.self_attn.branch_gates.bias[:7] = -100  # compression
    torch.testing.assert_close(model(tokens).logits, dense, atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config.attention == "nsa"
    for name, parameter in model.state_dict().items():
        assert torch.equal(parameter, again.state_dict()[name]), name
    torch.testing.assert_close(dense_twin(again)(tokens).logits, dense, **EXACT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nsa_stride": 3}, "nsa_stride=3 must divide nsa_block_size=8"),
        ({"nsa_selection_size": 6}, "nsa_stride=4 must divide nsa_selection_size=6"),
        ({"nsa_selected_blocks": 2}, "nsa_selected_blocks must be at least 3"),
        ({"nsa_window": 0}, "nsa_window must be a whole number of at least 1, got 0"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_products_beyond_fp16_that_the_scale_brings_back():
    q, rows = torch.full((1, 2, 1, 64), 40.0).half(), torch.full((1, 1, 3, 64), 40.0).half()
    rows[:, :, 2] = 41  # q · k is beyond 65,504
    output, probabilities = grouped_attention(q, rows, rows, torch.ones(1, 1, 3, dtype=torch.bool), 0.125)
    torch.testing.assert_close(output, torch.full_like(q, 41))
    assert probabilities[..., 2].eq(1).all()
