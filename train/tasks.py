"""Retrieval tasks of any length, made here: does the sparse model still find what the dense one finds?

    passkey     one number in running text
    kv          the value of one key in a JSON object of random pairs
    multikey    the number of one name among the numbers of many names
    multivalue  all four numbers of one name
    variables   all variables that hold a number, through a chain of assignments
    common      the ten words that stand in a list far more often than the others
    frequent    the three most frequent made-up words of a text whose word counts follow Zipf's law

The definitions of the last five are RULER's (Hsieh et al., 2024): needles at random depths, the answer begun by the
prompt, scored by the share of the expected strings that the answer contains. What the right answer costs in nats tells
two models apart as well where neither finds it, or both always do. Running text is the docstrings of the standard
library. Samples are a function of task, length, seed and tokenizer; dense and sparse answer the same ones.
"""

from __future__ import annotations

import ast
import json
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from dsa_export.cli import UserError
from dsa_export.files import standard_library
from dsa_export.model import DSAForCausalLM

SENTENCES = 1000
"""Different sentences of running text; longer texts repeat them."""


@dataclass(frozen=True)
class Sample:
    """`question` is the whole user message, `begun` the beginning of the answer, `expected` what must be in it."""

    question: str
    begun: str
    expected: tuple[str, ...]

    @property
    def rest(self) -> str:
        """How a right answer goes on after `begun`."""
        return ("" if self.begun.endswith('"') else " ") + ", ".join(self.expected)


@dataclass(frozen=True)
class Task:
    build: Callable[[random.Random, int], Sample]
    """(random numbers, size: sentences, pairs or words) → a sample."""
    answer_tokens: int


# ---------------------------------------------------------------- the tasks


def passkey(rng: random.Random, size: int) -> Sample:
    number = _number(rng, 5)
    text = _hide(rng, size, [f"The pass key is {number}. Remember it: {number} is the pass key."])
    question = (
        "A pass key is hidden in the following text. Find it and remember it.\n\n"
        f"{text}\n\nWhat is the pass key in the text above?"
    )
    return Sample(question, "The pass key is", (number,))


def kv(rng: random.Random, size: int) -> Sample:
    pairs = {_uuid(rng): _uuid(rng) for _ in range(max(1, size))}
    key = rng.choice(list(pairs))
    question = (
        f"Below is a JSON object of keys and values.\n\n{json.dumps(pairs, indent=0)}\n\n"
        f'What is the value of the key "{key}"?'
    )
    return Sample(question, f'The value of the key "{key}" is "', (pairs[key],))


def multikey(rng: random.Random, size: int) -> Sample:
    names = rng.sample(_names(), 4)
    numbers = [_number(rng, 7) for _ in names]
    asked = rng.randrange(len(names))
    text = _hide(rng, size, [_needle(name, number) for name, number in zip(names, numbers, strict=True)])
    return _needle_sample(text, names[asked], [numbers[asked]])


def multivalue(rng: random.Random, size: int) -> Sample:
    name = rng.choice(_names())
    numbers = [_number(rng, 7) for _ in range(4)]
    return _needle_sample(_hide(rng, size, [_needle(name, number) for number in numbers]), name, numbers)


def variables(rng: random.Random, size: int) -> Sample:
    number = _number(rng, 5)
    names: list[str] = []
    while len(names) < 5:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [name] if name not in names else []
    lines = [f"VAR {names[0]} = {number}."]
    lines += [f"VAR {later} = VAR {earlier}." for earlier, later in pairwise(names)]
    text = _hide(rng, size, lines, ordered=True)
    question = (
        "Assignments of variables are hidden in the following text. Follow the chain of assignments.\n\n"
        f"{text}\n\nWhich variables have the value {number}? There are {len(names)} of them."
    )
    return Sample(question, f"The {len(names)} variables with the value {number} are", tuple(names))


def common(rng: random.Random, size: int) -> Sample:
    seldom = max(3, -(-size // (len(_words()) + 90)))  # of a long text all words there are hold too little
    often = 10 * seldom
    while size < 10 * often + 10 * seldom and often > 3:  # a short text holds each of them fewer times
        often, seldom = often // 2, max(1, seldom // 2)
    words = rng.sample(_words(), min(len(_words()), 10 + max(1, (size - 10 * often) // seldom)))
    wanted, others = words[:10], words[10:]
    listed = wanted * often + others * seldom
    rng.shuffle(listed)
    numbered = " ".join(f"{i}. {word}" for i, word in enumerate(listed, start=1))
    question = (
        "Below is a numbered list of words. Some stand in it often, most of them seldom. Memorise the ones that are "
        f"common.\n\n{numbered}\n\nWhat are the 10 most common words in the list above?"
    )
    return Sample(question, "The 10 most common words in the list are:", tuple(wanted))


def frequent(rng: random.Random, size: int) -> Sample:
    made_up: list[str] = []
    while len(made_up) < max(4, size // 8):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        made_up += [word] if word not in made_up else []
    weights = [rank**-2.0 for rank in range(1, len(made_up) + 1)]
    counts = [max(1, round(size * weight / sum(weights))) for weight in weights]
    counts = [count + extra for count, extra in zip(counts, [2, 1, 0, *[-1] * len(counts)], strict=False)]  # no ties
    text = [word for word, count in zip(made_up, counts, strict=True) for _ in range(count)]
    rng.shuffle(text)
    question = (
        "Below is a coded text. Count how often each coded word appears and ignore the dots.\n\n"
        f"{' ... '.join(text)}\n\nWhat are the three most frequent words in the coded text above?"
    )
    return Sample(question, "The three most frequent words are:", tuple(made_up[:3]))


TASKS = {
    "passkey": Task(passkey, 12),
    "kv": Task(kv, 48),
    "multikey": Task(multikey, 16),
    "multivalue": Task(multivalue, 64),
    "variables": Task(variables, 48),
    "common": Task(common, 80),
    "frequent": Task(frequent, 40),
}


# ---------------------------------------------------------------- their parts


def _needle(name: str, number: str) -> str:
    return f"One of the special numbers of the {name} is: {number}."


def _needle_sample(text: str, name: str, numbers: Sequence[str]) -> Sample:
    several = len(numbers) > 1
    what = f"all the special numbers of the {name}" if several else f"the special number of the {name}"
    question = (
        f"Special numbers are hidden in the following text. Remember them.\n\n{text}\n\n"
        f"What {'are' if several else 'is'} {what} given in the text above?"
    )
    return Sample(question, f"{what[0].upper()}{what[1:]} given in the text {'are' if several else 'is'}", (*numbers,))


def _hide(rng: random.Random, sentences: int, needles: Sequence[str], *, ordered: bool = False) -> str:
    """`sentences` of running text with the needles between them, at random places, in order if that matters."""
    filler = _sentences()
    start = rng.randrange(len(filler))
    text = [filler[(start + i) % len(filler)] for i in range(sentences)]
    places = [rng.randint(0, sentences) for _ in needles]
    if ordered:
        places.sort()
    placed = sorted(zip(places, range(len(needles)), strict=True), reverse=True)
    for place, number in placed:
        text.insert(place, needles[number])
    return " ".join(text)


def _number(rng: random.Random, digits: int) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


@cache
def _sentences() -> list[str]:
    """English sentences from the docstrings of the standard library's modules, in the order of their names."""
    found: dict[str, None] = {}
    for path in standard_library("[a-z]*.py"):
        if len(found) >= SENTENCES:
            break
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        documented = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        text = " ".join(" ".join((ast.get_docstring(node) or "").split()) for node in documented)
        found.update(dict.fromkeys(re.findall(r"\b[A-Z][a-z][a-zA-Z ,'-]{30,200}\.(?=\s|$)", text)))
    return list(found)


@cache
def _words() -> list[str]:
    """Ordinary words: lower case, 4 to 10 letters."""
    return sorted(set(re.findall(r"\b[a-z]{4,10}\b", " ".join(_sentences()))))


@cache
def _names() -> list[str]:
    colours = [
        "amber",
        "black",
        "blue",
        "brown",
        "copper",
        "golden",
        "green",
        "grey",
        "purple",
        "red",
        "silver",
        "white",
    ]
    things = [
        "anchor",
        "bridge",
        "candle",
        "castle",
        "engine",
        "forest",
        "garden",
        "harbour",
        "island",
        "lamp",
        "mirror",
    ]
    return [f"{colour} {thing}" for colour in colours for thing in things]


# ---------------------------------------------------------------- prompts and answers


def prompt_ids(sample: Sample, tokenizer: Any) -> list[int]:
    """The sample through the chat template (plain text where there is none), with the answer begun."""
    if tokenizer.chat_template:
        message = [{"role": "user", "content": sample.question}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True) + sample.begun
    else:
        text = f"{sample.question}\n{sample.begun}"
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def smallest(name: str, length: int, tokenizer: Any, seed: int) -> tuple[Sample, list[int]]:
    """The smallest sample of a task, and its prompt. Raises UserError if it does not fit into `length` tokens."""
    sample, prompt = _build(name, length, tokenizer, seed, 1)
    if len(prompt) > length - TASKS[name].answer_tokens:
        raise UserError(f"--task-lengths {length} is too short for the task {name}: {len(prompt)} tokens at least")
    return sample, prompt


def fit(name: str, length: int, tokenizer: Any, seed: int) -> tuple[Sample, list[int]]:
    """The largest sample of a task whose prompt and answer fit into `length` tokens, and its prompt.

    Raises UserError if not even the smallest fits.
    """

    def fitting(size: int) -> tuple[Sample, list[int]] | None:
        candidate = _build(name, length, tokenizer, seed, size)
        return candidate if len(candidate[1]) <= length - TASKS[name].answer_tokens else None

    best = smallest(name, length, tokenizer, seed)
    too_large = 2
    while too_large <= length and fitting(too_large):
        too_large *= 2
    low, high = 1, length  # of one token each there are no more; what is known not to fit is not made
    while low < high:
        middle = (low + high + 1) // 2
        if middle < too_large and (candidate := fitting(middle)):
            low, best = middle, candidate
        else:
            high = middle - 1
    return best


def _build(name: str, length: int, tokenizer: Any, seed: int, size: int) -> tuple[Sample, list[int]]:
    sample = TASKS[name].build(random.Random(f"{name} {length} {seed}"), size)
    return sample, prompt_ids(sample, tokenizer)


@torch.no_grad()
def answer(
    model: DSAForCausalLM, prompt: Tensor, right: Tensor, tokens: int, ends: set[int]
) -> tuple[list[int], float]:
    """Answers prompt [1, T] greedily, as the model is switched (model.sparse), with a KV cache. Returns that, and what
    the right answer [1, N] costs in its place: nats per token.

    On a CPU the prompt is read in the masked form, which is the same function and faster; decoding gathers.
    """
    model.train(prompt.device.type == "cpu")
    output = model(prompt, use_cache=True, logits_to_keep=1)
    model.eval()
    forced = model(right, cache=output.cache, use_cache=True).logits
    logits = torch.cat([output.logits, forced[:, :-1]], 1)
    nats = cross_entropy(logits[0].float(), right[0]).item()
    output.cache.crop(-right.shape[1])
    found: list[int] = []
    while True:
        token = output.logits[:, -1:].argmax(-1)
        if int(token) in ends:
            return found, nats
        found.append(int(token))
        if len(found) == tokens:
            return found, nats
        output = model(token, cache=output.cache, use_cache=True)


def recall(text: str, expected: Sequence[str]) -> float:
    """The share of the expected strings that stand in the text."""
    return sum(part.lower() in text.lower() for part in expected) / len(expected)
