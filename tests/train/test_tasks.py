"""Retrieval tasks: samples of the length asked for that hold their answer, and greedy answers with a cache."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from dsa_export.cli import UserError
from dsa_export.model import load_model
from train.tasks import TASKS, answer, common, fit, recall, smallest


@pytest.mark.parametrize("name", TASKS)
def test_samples_fill_the_length_and_hold_their_answer(name: str, tokenizer) -> None:
    sample, prompt = fit(name, 4000, tokenizer, seed=1)
    assert 3400 <= len(prompt) <= 4000 - TASKS[name].answer_tokens
    assert all(part in sample.question for part in sample.expected)
    assert len(set(sample.expected)) == len(sample.expected)
    text = tokenizer.decode(prompt)
    assert text.startswith("<|im_start|>user") and text.endswith(sample.begun)
    assert recall(sample.rest, sample.expected) == 1 and (name == "kv") != sample.rest.startswith(" ")
    assert fit(name, 4000, tokenizer, seed=1)[0] == sample != fit(name, 4000, tokenizer, seed=2)[0]
    with pytest.raises(UserError, match=f"too short for the task {name}"):
        fit(name, 80, tokenizer, seed=1)


@pytest.mark.parametrize("name", TASKS)
def test_no_sample_is_made_that_is_many_times_too_long(name: str, tokenizer) -> None:
    """The search begins with small samples; from `length` sentences downwards it read 80 times what it kept."""
    made: list[int] = []

    class Counting:
        chat_template = tokenizer.chat_template
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, **options):
            encoded = tokenizer(text, **options)
            made.append(len(encoded["input_ids"]))
            return encoded

    _, prompt = fit(name, 4000, Counting(), seed=1)
    assert max(made) < 2.5 * 4000 and sum(made) < 20 * 4000
    assert len(prompt) in made
    del made[:]
    smallest(name, 4000, Counting(), seed=1)
    assert len(made) == 1 and made[0] < 2000


@pytest.mark.parametrize("size", [1, 39, 100, 1000, 5000, 40_000])
def test_common_words_are_common_in_a_list_of_any_length(size: int) -> None:
    sample = common(random.Random(3), size)
    counts = Counter(sample.question.split("\n\n")[1].split()[1::2])
    assert {word for word, _ in counts.most_common(10)} == set(sample.expected)
    often, seldom = (count for _, count in counts.most_common(11)[9:])
    assert often > seldom and (counts.total() > 0.95 * size or size == 1)


def test_word_tasks_have_one_right_answer(tokenizer) -> None:
    sample, _ = fit("frequent", 4000, tokenizer, seed=3)
    coded = sample.question.split("\n\n")[1].split(" ... ")
    assert sorted(set(coded), key=coded.count, reverse=True)[:3] == list(sample.expected)
    assert len({coded.count(word) for word in sample.expected}) == 3


def test_variables_form_one_chain(tokenizer) -> None:
    sample, _ = fit("variables", 4000, tokenizer, seed=5)
    for earlier, later in zip(sample.expected, sample.expected[1:], strict=False):
        assert f"VAR {later} = VAR {earlier}." in sample.question
        assert sample.question.index(f"VAR {earlier} =") < sample.question.index(f"VAR {later} =")


def test_scores_are_shares_of_the_expected_strings() -> None:
    assert recall("They are 12 and 34.", ["12", "34"]) == 1
    assert recall("Twelve, 34", ["12", "34"]) == 0.5
    assert recall("the Quiet WORD", ["quiet"]) == 1


@pytest.mark.parametrize("sparse", [False, True])
def test_answers_are_greedy(tiny: Path, sparse: bool) -> None:
    """The prompt in the masked form, the rest by gathering, give what one whole call prefers at every position."""
    torch.manual_seed(0)
    model = load_model(tiny, index_heads=2, index_dim=16, index_topk=[6, 12])
    model.sparse = sparse
    prompt, right = torch.randint(3, 250, (1, 40)), torch.randint(3, 250, (1, 6))
    found, nats = answer(model, prompt, right, 10, ends=set())
    with torch.no_grad():
        logits = model.eval()(torch.cat([prompt, torch.tensor([found])], 1), use_cache=False).logits[0]
        labels = torch.cat([torch.full((1, 40), -100), right], 1)
        loss = model(torch.cat([prompt, right], 1), labels=labels, use_cache=False).loss
    assert found == logits[39:-1].argmax(-1).tolist() and len(found) == 10
    assert nats == pytest.approx(float(loss), rel=1e-4)
    assert answer(model, prompt, right, 10, ends={found[3]})[0] == found[: found.index(found[3])]
