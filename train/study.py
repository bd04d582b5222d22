"""The measurements of `python -m train.evaluate`: one record per length of text, one per task, length and k."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import exp
from typing import Any

import torch
from torch import Tensor, nn

from dsa_export.cli import UserError
from dsa_export.model import DSAForCausalLM
from dsa_export.model.cache import DSACache
from dsa_export.topk import describe_topk
from train import tasks
from train.data import Windows
from train.ladder import Score, full_selection_error, hidden_states, random_indexers, score, states_after
from train.selection import SelectionMeter
from train.trainer import nth_seed

MAP_LAYERS = 4
FULL_TOKENS = 4096
"""The check that a full selection equals dense is made on so many tokens at most: it selects T of T."""

PREFIX_TOKENS = 1024
"""Tokens of a call of the prefix, which is not scored."""

Record = dict[str, Any]
Tick = Callable[[], None]


@dataclass(frozen=True)
class Choice:
    """One setting of k to evaluate: the same for all layers, or (label "auto") one per layer."""

    label: str
    ks: tuple[int, ...]

    @property
    def mean(self) -> float:
        return sum(self.ks) / len(self.ks)

    def __str__(self) -> str:
        return describe_topk(self.ks)


@dataclass
class Study:
    """A model under evaluation; `base` is the checkpoint before training, to tell drift from sparsity."""

    model: DSAForCausalLM
    rungs: Sequence[str]
    every: int
    seed: int
    base: DSAForCausalLM | None = None
    score_tokens: int | None = None
    """Tokens at the end of a window that are scored, after a prefix that attends to everything; None: all, without."""
    tick: Tick = lambda: None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def meter(self, ks: Sequence[int], *, maps: bool = False) -> SelectionMeter:
        config = self.model.config
        layers = config.num_hidden_layers
        shown = {round(i * (layers - 1) / (MAP_LAYERS - 1)) for i in range(MAP_LAYERS)} if maps else ()
        return SelectionMeter(layers, config.index_heads, ks, self.every, tuple(shown))

    @torch.no_grad()
    def dense_states(
        self, input_ids: Tensor, meter: SelectionMeter | None = None, cache: DSACache | None = None
    ) -> Tensor:
        """[1, T] → hidden states [T, E] with everything attended to; the meter watches the indexers."""
        self.model.train(cache is None)
        self.model.sparse = False
        states = states_after(self.model, input_ids, cache, observer=meter)
        self.tick()
        return states

    @torch.no_grad()
    def prefix(self, model: DSAForCausalLM, input_ids: Tensor) -> DSACache | None:
        """The cache of all but the tokens that are scored, with everything attended to; None if all are scored."""
        if self.score_tokens is None:
            return None
        model.eval()
        if model is self.model:
            model.sparse = False
        cache = DSACache(model.model.cache_layouts)
        for part in input_ids[:, : -self.score_tokens].split(PREFIX_TOKENS, dim=1):
            model.model(part, cache=cache, use_cache=True)
        self.tick()
        return cache

    def forwards(self, choices: Sequence[Choice], windows: Windows) -> int:
        """How often text() will call tick()."""
        per_model = 1 if self.score_tokens is None else 2
        per_window = per_model * (1 + (self.base is not None)) + len(self._plan(choices, windows.input_ids.shape[1]))
        return len(windows) * per_window + per_model

    def _plan(self, choices: Sequence[Choice], length: int) -> list[tuple[str, Choice]]:
        """The (rung, k) to run at a length: those that leave something out; k by layer for the trained indexer only."""
        used = [choice for choice in choices if min(choice.ks) < length]
        return [(rung, c) for rung in self.rungs for c in used if rung == "trained" or c.label != "auto"]

    def text(self, windows: Windows, choices: Sequence[Choice]) -> tuple[Record, SelectionMeter]:
        """The ladder at every k below the length, and what the indexers catch and select, with what measured that.

        Raises UserError if a selection of everything does not equal dense attention, or no k is below the length.
        """
        length = windows.input_ids.shape[1]
        used = [choice for choice in choices if min(choice.ks) < length]
        uniform = [choice for choice in used if choice.label != "auto"]
        if not uniform:
            raise UserError(f"every k is at least the length of {length} tokens: nothing is left out; lower --topk")
        heads: dict[str, nn.Linear] = {"dense": self.model.lm_head}
        if self.base is not None:
            heads["base"] = self.base.lm_head
        meter = self.meter([choice.ks[0] for choice in uniform], maps=True)
        plan = self._plan(choices, length)
        sums: dict[str, dict[str, Score]] = {reference: defaultdict(Score) for reference in heads}
        check: Record = {}
        for row in range(len(windows)):
            batch = windows.batch(torch.tensor([row]), self.device)
            text = batch["input_ids"]
            cache = self.prefix(self.model, text)
            scored = slice(-(self.score_tokens or text.shape[1]), None)
            dense = self.dense_states(text[:, scored], meter, cache)
            if row == 0:
                check = self._check_full(text[:, :FULL_TOKENS], dense[:FULL_TOKENS] if cache is None else None)
            hidden = {"dense": dense, **self._states(text, scored, plan, cache)}
            for reference, scores in score(heads, hidden, batch["labels"][0, scored], tuple(heads)).items():
                for name, one in scores.items():
                    sums[reference][name] += one
        caught = meter.caught()
        record = {
            "length": length,
            "windows": len(windows),
            "score_tokens": self.score_tokens,
            "tokens": sums["dense"]["dense"].tokens,
            "full_selection": check,
            **_ladder(plan, sums),
            "attention": meter.results(),
            "heads": meter.heads(),
            "caught": [{"k": str(choice), "mean_k": choice.mean, "mass": _mass(caught, choice.ks)} for choice in used],
        }
        return record, meter

    def _states(
        self, text: Tensor, scored: slice, plan: Sequence[tuple[str, Choice]], cache: DSACache | None
    ) -> dict[str, Tensor]:
        """The hidden states of a window's scored tokens at every rung, by its number in the plan, and of "base".

        cache: what stands before the scored tokens, see prefix().
        """
        input_ids = text[:, scored]
        hidden = {}
        for number, (rung, choice) in enumerate(plan):
            with random_indexers(self.model, self.seed) if rung == "random" else nullcontext():
                hidden[str(number)] = hidden_states(self.model, input_ids, rung, choice.ks, cache)
            self.tick()
        if self.base is not None:
            cache = self.prefix(self.base, text)
            with torch.no_grad():
                hidden["base"] = states_after(self.base, input_ids, cache)
            self.tick()
        return hidden

    def _check_full(self, input_ids: Tensor, dense: Tensor | None) -> Record:
        dense = self.dense_states(input_ids) if dense is None else dense
        error, tolerance = full_selection_error(self.model, input_ids, dense)
        self.tick()
        if not error <= tolerance:
            raise UserError(
                f"with everything selected the logits differ from dense by {error:.2g} (rounding allows "
                f"{tolerance:.2g}): the sparse path of this model is wrong, no figure of it would mean anything"
            )
        return {"tokens": input_ids.shape[1], "max_abs_error": error, "tolerance": tolerance}

    def caught(self, windows: Windows) -> Tensor:
        """[layers, T]: share of attention mass in the indexer's k best keys at every k, in a text."""
        meter = self.meter([1])
        for row in range(len(windows)):
            self.dense_states(windows.batch(torch.tensor([row]), self.device)["input_ids"], meter)
        return meter.caught()

    def task(self, name: str, length: int, samples: int, choices: Sequence[Choice], tokenizer: Any) -> list[Record]:
        """One record per k: of dense and sparse on the same samples the score and the nats per token of the right
        answer, and every answer."""
        model, limit = self.model, tasks.TASKS[name].answer_tokens
        ends = self.ends(tokenizer)
        settings = {str(choice): choice.ks for choice in choices}  # k by layer may come out as one of the others
        scores: dict[str, list[float]] = defaultdict(list)
        nats: dict[str, list[float]] = defaultdict(list)
        answers: list[Record] = []
        for number in range(samples):
            sample, prompt = tasks.fit(name, length, tokenizer, nth_seed(self.seed, number))
            rest = tokenizer(sample.rest, add_special_tokens=False)["input_ids"]
            ids, right = (torch.tensor([tokens], device=self.device) for tokens in (prompt, rest))
            texts: dict[str, str] = {}
            for label, ks in [("dense", None), *settings.items()]:
                if ks and min(ks) >= length:  # everything is selected: that is dense, see _check_full
                    texts[label] = texts["dense"]
                    nats[label].append(nats["dense"][-1])
                else:
                    model.sparse = ks is not None
                    model.set_topk(ks or choices[0].ks)
                    found, cost = tasks.answer(model, ids, right, limit, ends)
                    texts[label] = tokenizer.decode(found)
                    nats[label].append(cost)
                scores[label].append(tasks.recall(texts[label], sample.expected))
                self.tick()
            answers.append({"prompt_tokens": len(prompt), "expected": list(sample.expected), "answers": texts})
        mean, cost_of = ({label: sum(of[label]) / samples for label in of} for of in (scores, nats))
        return [
            {
                "task": name,
                "length": length,
                "samples": samples,
                "k": label,
                "dense": mean["dense"],
                "sparse": mean[label],
                "dense_nats": cost_of["dense"],
                "sparse_nats": cost_of[label],
                "answers": None if number else answers,
            }
            for number, label in enumerate(settings)
        ]

    def ends(self, tokenizer: Any) -> set[int]:
        configured = self.model.generation_config.eos_token_id if self.model.generation_config else None
        ids = configured if isinstance(configured, list) else [configured]
        return {int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None}


def _ladder(plan: Sequence[tuple[str, Choice]], sums: dict[str, dict[str, Score]]) -> Record:
    """{"dense", "base", "ladder"}: the means over the tokens. sums: as of score(), a rung by its number in the plan."""
    means = {name: _means(one, sums["dense"]["dense"]) for name, one in sums["dense"].items()}
    for name, one in sums.get("base", {}).items():
        from_base = _means(one, sums["base"]["base"])
        means[name]["from_base"] = {term: from_base[term] for term in ("increase", "increase_error", "kl", "top1")}
    ladder = [
        {
            "rung": "auto" if choice.label == "auto" else rung,
            "k": list(choice.ks) if choice.label == "auto" else choice.ks[0],
            "mean_k": choice.mean,
            **means[str(number)],
        }
        for number, (rung, choice) in enumerate(plan)
    ]
    return {"dense": means["dense"], "base": means.get("base"), "ladder": ladder}


def _means(one: Score, reference: Score) -> Record:
    loss = one.loss / one.tokens
    return {
        "loss": loss,
        "perplexity": exp(loss),
        "increase": one.loss / reference.loss - 1,
        "increase_error": one.increase_error,
        "kl": one.kl / one.tokens,
        "top1": one.agree / one.tokens,
    }


def _mass(caught: Tensor, ks: Sequence[int]) -> float:
    """caught [layers, T]: mean over the layers of the share that k keys catch, k by layer."""
    return float(torch.stack([row[min(k, len(row)) - 1] for row, k in zip(caught, ks, strict=True)]).mean())
