"""Checkpoints: a folder or hub name of a supported family, or a folder of ours, loaded strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging, resolve_revision

from dsa_export.cli import UserError, console, first_line
from dsa_export.config import DSAConfig
from dsa_export.files import MANIFEST, checkpoint_hash, manifest_kind
from dsa_export.memory import available_memory
from dsa_export.model import families
from dsa_export.model.attention import VARIANTS, SparseAttention
from dsa_export.model.decoder import DSAForCausalLM

DEFAULT_CHECKPOINT = "ckpt"
"""Where training ends, and what comes after it begins, unless told otherwise."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights, as safetensors names them."""

WEIGHT_FILES = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, "model-*-of-*.safetensors")

UNEXPECTED = (OSError, ValueError, KeyError, AttributeError, TypeError)
"""What transformers raises over a file that is missing, or holds something else than it looks for there."""

INDEXER = ".indexer."
"""Part of the name of every indexer parameter."""


def load_config(name: str | Path) -> PreTrainedConfig:
    """The configuration of a checkpoint: DSAConfig for ours, a family's stock one otherwise.

    Raises UserError: not found, not readable, another architecture, or an option that cannot be converted.
    """
    if Path(name) == Path(DEFAULT_CHECKPOINT) and not Path(name).exists():
        raise UserError(f"there is no folder {DEFAULT_CHECKPOINT}: `python -m train.joint` makes it, or name a --model")
    folder = Path(name)
    if folder.suffix == ".gguf":
        raise UserError(f"{name} is a GGUF file: make a checkpoint of it first (docs/guide.md, From a GGUF file)")
    if folder.is_file():
        raise UserError(f"{name} is a file: name the folder of the checkpoint")
    if (kind := manifest_kind(folder)) and kind != "checkpoint" and not (folder / "config.json").exists():
        raise UserError(f"{name} holds {kind!r}, not a checkpoint")
    if not folder.exists() and len(folder.parts) == 1:
        raise UserError(f"no such folder: {name} (a model of the hub has an owner: Qwen/Qwen2.5-0.5B-Instruct)")
    if not folder.exists() and any(folder.parent.glob(f"*/{MANIFEST}")):
        raise UserError(f"no such folder: {name}")  # beside outputs of ours: nobody need wait for the hub
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)  # else it asks, on a terminal
    except (*UNEXPECTED, StrictDataclassError) as error:
        if not folder.exists() and (isinstance(name, Path) or name.startswith((".", "/"))):
            raise UserError(f"no such folder: {name}") from None
        missing = f"no folder and no reachable hub model is named {name!r}"
        what = f"no readable model in {name}" if folder.exists() else missing
        raise UserError(f"{what} ({first_line(error)})") from None
    if not isinstance(config, DSAConfig):
        try:
            families.check(config)
        except ValueError as error:
            raise UserError(f"{name} cannot be converted: {error}") from None
    return config


def model_source(name: str) -> dict[str, Any]:
    """{"path", "sha256"} of a model folder; for a hub name the revision stands for the hash (None: not known)."""
    if Path(name).is_dir():
        return {"path": name, "sha256": checkpoint_hash(Path(name))}
    return {"path": name, "sha256": getattr(resolve_revision(name), "resolved", None)}


def has_indexer(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is one of ours that selects by an indexer."""
    return isinstance(config, DSAConfig) and issubclass(VARIANTS[config.attention], SparseAttention)


def indexed_attention(config: PreTrainedConfig) -> str:
    """The attention variant with an indexer that a checkpoint has or can be given.

    Raises UserError for one that selects in another way.
    """
    if not isinstance(config, DSAConfig):
        return families.FAMILIES[config.model_type].sparse
    sparse = families.FAMILIES[config.family].sparse
    if config.attention not in (sparse, VARIANTS[sparse].DENSE):
        raise UserError(f"attention={config.attention!r} has no indexer, nor can it be given one: see train.finetune")
    return sparse


def require_indexer(config: PreTrainedConfig, name: str) -> None:
    """Raises UserError if a checkpoint has no indexer: what gives it one, or that nothing can."""
    indexed_attention(config)
    if not has_indexer(config):
        raise UserError(f"{name} has no indexer: run `python -m train.warmup --model {name}` first")


def adapted_config(base: PreTrainedConfig, attention: str | None = None, **options: Any) -> DSAConfig:
    """A checkpoint's configuration with what load_model() was asked for. Raises UserError for what cannot be."""
    ours = isinstance(base, DSAConfig)
    inherited = base.to_dict() if ours else families.dsa_fields(base)
    if attention is None:
        attention = inherited["attention"] if ours else indexed_attention(base)
    elif attention == "dense":
        attention = VARIANTS[inherited["attention"]].DENSE
    given = {key: value for key, value in options.items() if value is not None}
    inherited = {k: v for k, v in inherited.items() if k not in ("model_type", "architectures", "dtype")}
    try:
        config = DSAConfig(**{**inherited, "attention": attention, **given})
    except ValueError as error:
        raise UserError(first_line(error)) from None
    if has_indexer(base) and has_indexer(config) and config.index_share % base.index_share:
        raise UserError(
            f"index_share = {config.index_share}: the checkpoint has one for {base.index_share} layers and can "
            "be given one for a multiple of that"
        )
    return config


def load_model(
    name: str | Path,
    *,
    attention: str | None = None,
    dtype: torch.dtype = torch.float32,
    kept: Callable[[DSAForCausalLM], Iterable[str]] = lambda model: (),
    **options: Any,
) -> DSAForCausalLM:
    """Loads a plain checkpoint (a new indexer is initialised) or a DSA checkpoint, strictly, in eval mode.

    attention: a variant; "dense" is the dense twin of the checkpoint's own; None is the checkpoint's own, the
    family's sparse one ("dsa") for a plain one. What the variant adds to a dense checkpoint is initialised.
    kept: names the model's parameters that stay in the type of the files. What is not converted is mapped into memory
    instead of read.
    `options` are DSAConfig's fields of the variant (index_…, nsa_…); None keeps the checkpoint's or the default.
    Raises UserError when the checkpoint cannot be read, is of another architecture, lacks or holds tensors that it
    should not (only what a new variant adds may be missing), or holds NaN or infinite numbers; or when the machine's
    memory cannot hold it.
    """
    base = load_config(name)
    config = adapted_config(base, attention, **options)
    own = base.attention if isinstance(base, DSAConfig) else families.FAMILIES[base.model_type].dense
    attention = config.attention
    try:
        types = stored_types(name)
        empty = empty_model(config)
        as_stored = {key: types[key] for key in kept(empty) if key in types}
        _check_memory(name, empty, {key: as_stored.get(key, dtype) for key in empty.state_dict()}, types)
        with quiet_transformers():
            # Mismatched sizes are refused below: transformers would say which in its report only, which is quiet here.
            model, info = DSAForCausalLM.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                types=as_stored,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (*UNEXPECTED, SafetensorError, UnpicklingError, RuntimeError) as error:
        for file in Path(name).glob("*.safetensors"):
            if not os.access(file, os.R_OK):
                raise UserError(f"{file} may not be read by this user: chmod a+r it, or copy the folder") from None
        raise UserError(
            f"cannot load the weights of {name}: {first_line(error)}; the file may be truncated or "
            "of another configuration: fetch or train it again"
        ) from None
    given = ", ".join(f"{option}={value}" for option, value in options.items() if value is not None)
    for key, found, expected in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{name} does not fit its config.json{f' with the options that were given ({given})' if given else ''}: "
            f"{key} has the shape {list(found)}, and {list(expected)} by the configuration"
        )
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    added = {key for key in model.state_dict() if is_added(key, attention)}
    expected_missing = set() if attention == own else added
    shared_by_more = isinstance(base, DSAConfig) and config.index_share > base.index_share
    if attention != own or shared_by_more:
        unexpected = {key for key in unexpected if not is_added(key, own)}
    wrong = sorted(missing ^ expected_missing) + sorted(unexpected)
    if wrong:
        raise UserError(f"{name} does not fit the model: {len(wrong)} missing or unexpected tensors, first {wrong[0]}")
    if expected_missing:
        for layer in model.model.layers:
            layer.self_attn.start_from_dense()
    for key, parameter in model.named_parameters():
        # NaN and infinity survive in the extremes, which take a thirtieth of the time of isfinite() on every number.
        if not torch.stack(parameter.aminmax()).to(dtype).isfinite().all():
            raise UserError(f"{name}: {key} holds numbers that are not finite in {dtype}: the checkpoint is broken")
    # transformers does not tie, whatever the configuration says, where the file holds two different matrices.
    model.config.tie_word_embeddings = model.lm_head.weight is model.model.embed_tokens.weight
    return model.eval()


def empty_model(config: DSAConfig) -> DSAForCausalLM:
    """A model without numbers, which takes no memory."""
    with torch.device("meta"):
        model = DSAForCausalLM(config)
    model.tie_weights()
    return model


def parameter_names(model: nn.Module) -> list[str]:
    """Of all parameters, those of one that has several too (tied matrices)."""
    return [name for name, _ in model.named_parameters(remove_duplicate=False)]


def stored_types(name: str | Path) -> dict[str, torch.dtype]:
    """Types of a checkpoint's tensors by their names, where the files that transformers loads are safetensors; those of
    the hub are fetched.

    Raises UserError if they cannot be.
    """
    folder = Path(name)
    if not folder.is_dir():
        try:
            with nullcontext() if console.is_terminal else quiet_transformers():
                folder = Path(snapshot_download(str(name), allow_patterns=list(WEIGHT_FILES)))
        except Exception as error:  # the library that fetches them has errors of its own
            raise UserError(f"the weights of {name} cannot be fetched: {first_line(error)}") from None
    files = {SAFE_WEIGHTS_NAME}
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    types: dict[str, torch.dtype] = {}
    for name_of_file in files:
        with safe_open(folder / name_of_file, framework="pt") as file:
            keys = file.keys()
            found = {key: STORED.get(file.get_slice(key).get_dtype()) for key in keys}
        types |= {key: dtype for key, dtype in found.items() if dtype}
    return types


def _check_memory(
    name: str | Path, empty: DSAForCausalLM, types: Mapping[str, torch.dtype], stored: Mapping[str, torch.dtype]
) -> None:
    """Raises UserError if the weights do not fit: the system would end the process in the middle, without a word.

    types: as they are loaded; what is stored so is mapped, and takes no memory that the system could not take back.
    """
    copied = {
        key: p.numel() * types[key].itemsize for key, p in empty.named_parameters() if stored.get(key) != types[key]
    }
    if (needed := sum(copied.values())) > (free := available_memory()):
        raise UserError(
            f"the weights of {name} take {needed / 2**30:.1f} GiB, and this machine has {free / 2**30:.1f} GiB of "
            "memory free: end other programs, or take a machine with more"
        )


def dense_twin(model: DSAForCausalLM) -> DSAForCausalLM:
    """The dense model with the same parameters (shared, not copied): all but those that its variant added."""
    sparse = model.config.attention
    config = families.dense_config(model.config)
    twin = empty_model(config)
    state = {name: tensor for name, tensor in model.state_dict().items() if not is_added(name, sparse)}
    twin.load_state_dict(state, strict=True, assign=True)
    if config.tie_word_embeddings:  # assigned one by one, the two names hold two parameters
        twin.lm_head.weight = twin.model.embed_tokens.weight
    twin.model.rotary, twin.model.index_rotary = model.model.rotary, model.model.index_rotary
    return twin.eval()


def is_added(parameter: str, attention: str) -> bool:
    """Whether a parameter of this name is what the variant adds to a dense checkpoint."""
    return any(part in parameter for part in VARIANTS[attention].ADDED)


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises UserError if there is none."""
    folder = Path(name)
    # For a folder without tokenizer files transformers makes an empty tokenizer of the model's class.
    if folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json")):
        raise UserError(f"no tokenizer in {name}: tokenizer.json is missing")
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except UNEXPECTED as error:
        raise UserError(f"no tokenizer in {name} ({first_line(error)})") from None


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError if the tokenizer has tokens that a model of this vocabulary lacks."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= vocab_size:
        raise UserError(
            f"the tokenizer does not match the model: it has token id {highest}, the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer that came with the checkpoint"
        )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No report and no bar of transformers' own: what is missing is checked by us, and an error if it matters."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
