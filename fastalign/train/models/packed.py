"""Loading a causal LM, and running it on packed sequences without letting them see each other."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastalign.train.data.specials import stops
from fastalign.train.errors import UserError
from fastalign.train.models import attention as packed
from fastalign.train.models import probe
from fastalign.train.models.probe import Lengths
from fastalign.train.models.router import find_router

# 4.56 brought the calls used here; masks from position_ids are a little older. What a model really does is
# measured, see probe.py.
_OLDEST = (4, 56)
if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < _OLDEST:
    raise UserError(
        f"transformers {transformers.__version__} is too old: fastalign.train needs {_OLDEST[0]}.{_OLDEST[1]} "
        "or newer"
    )

IMPLEMENTATION = {
    "packed": packed.NAME,
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash_attention_2",
}


def load_tokenizer(directory: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory."""
    return from_directory(
        AutoTokenizer.from_pretrained, directory, "tokenizer", trust_remote_code=trust_remote_code
    )


def load_model(directory: str, *, trust_remote_code: bool = False) -> torch.nn.Module:
    """The causal LM of a directory, in float32. Raises `UserError` for a directory that does not hold all of
    its weights."""
    model, info = from_directory(
        AutoModelForCausalLM.from_pretrained,
        directory,
        "causal LM",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        dtype=torch.float32,
        trust_remote_code=trust_remote_code,
    )
    check_sizes(directory, info)
    wrong = sorted(info["missing_keys"])
    if wrong:
        raise UserError(
            f"the model directory {directory} lacks weights of its causal LM: {', '.join(wrong[:3])}"
            + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        )
    return model


def check_sizes(directory: str, info: Mapping[str, Any]) -> None:
    """Refuse weights of other sizes than those of the model that is to be loaded. `info`: what transformers
    says of the loading."""
    for name, found, wanted in sorted(info["mismatched_keys"]):
        there, here = (" x ".join(map(str, shape)) for shape in (found, wanted))
        raise UserError(
            f"the model directory {directory} holds weights of another size: {name} is {there} there, and "
            f"must be {here} here"
        )


def check_device(device: str) -> None:
    """Refuse a device that is not there, or that no operation runs on."""
    if device == "auto":
        return
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"cannot use --device {device}: {str(error).splitlines()[0]}") from None
    if found.type not in ("cpu", "cuda"):
        raise UserError(f"cannot use --device {device}: legal are auto, cpu, cuda and cuda:N")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise UserError(
                f"cannot use --device {device}: torch {torch.__version__} sees {count or 'no'} CUDA "
                f"device{'s' * (count != 1)} here"
            )


def token_ids(tokenizer: Any) -> set[int]:
    """The ids that a tokenizer gives. A model's vocabulary may be padded beyond them."""
    return set(tokenizer.get_vocab().values())


def load_config(directory: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model directory."""
    return from_directory(
        AutoConfig.from_pretrained, directory, "configuration", trust_remote_code=trust_remote_code
    )


def load_stops(directory: str | None, config: Any, model: torch.nn.Module | None = None) -> set[int]:
    """The token ids at which the model's generation stops, by its configuration and its generation settings:
    those of the model in memory, or of the directory."""
    generation = getattr(model, "generation_config", None)
    if (
        model is None
        and directory is not None
        and (Path(directory).expanduser() / "generation_config.json").is_file()
    ):
        generation = from_directory(
            transformers.GenerationConfig.from_pretrained, directory, "generation settings"
        )
    return stops(config, generation)


def from_directory(load: Any, directory: str, what: str, **options: Any) -> Any:
    """What a function of transformers loads from a directory; every way in which that fails is a
    `UserError`."""
    path = Path(directory).expanduser()
    if path.exists() and not path.is_dir():
        raise UserError(
            f"the model directory {directory} is a file; give the directory that holds config.json, weights "
            "and tokenizer"
        )
    if not path.is_dir():
        raise UserError(f"the model directory {directory} does not exist (fetch a model from the hub first)")
    if not (path / "config.json").is_file():
        raise UserError(f"the model directory {directory} has no config.json")
    try:
        return load(str(path), local_files_only=True, **options)
    except Exception as error:  # files that are cut off or not what their names say fail in many ways
        reason = " ".join(str(error).split())[:300]
        named = isinstance(error, (OSError, ValueError, ImportError, RuntimeError)) and reason
        raise UserError(
            f"cannot load the {what} in {directory}: "
            f"{reason if named else f'{type(error).__name__}: {reason}'}"
        ) from error


class PackedModel:
    """A model that reads packed sequences. `rows(batch)` is what it makes of a `fastalign.PackedBatch` of T
    tokens, [T, *].

    Dropout is off (the model stays in evaluation mode) because policy and reference must be the same function
    at step 0. With dtype="bfloat16" the forward pass runs under autocast; weights stay in float32.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        attention: str = "auto",
        dtype: str = "float32",
        device: str = "auto",
        lengths: Lengths | None = None,
    ):
        """lengths: what training will use, and the model is tried at; None: short sequences only."""
        self.lengths = lengths or Lengths(probe.SHORT, 3 * probe.SHORT)
        self.exact = False  # in float32 throughout, while the model is tried
        self._place(model, device, dtype)
        self.router, self.router_note = find_router(model)
        self._scaled = packed.length_scaled(model)
        self._original = model.config._attn_implementation
        self._choose(attention)
        if self.router is not None and not self.router.seen():
            self.router = None
            self.router_note = (
                f"its load-balancing loss is left out: {type(model).__name__} does not compute it"
            )

    def _place(self, model: torch.nn.Module, device: str, dtype: str) -> None:
        """Set `model`, where it is and what it computes in."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            self.model = model.to(self.device).eval()
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"cannot use --device {device}: {str(error).splitlines()[0]}") from None
        if any(p.dtype is not torch.float32 for p in model.parameters()):
            raise UserError(
                "the model's weights must be float32; --dtype bfloat16 chooses the precision of the forward "
                "pass"
            )
        self.dtype = getattr(torch, dtype)

    def can_be_exact(self) -> bool:
        """Whether the model can be tried in float32, so that only the sequences make a difference."""
        return self.attention != "flash_attention_2"

    def _choose(self, attention: str) -> None:
        """Switch the model to this attention; "auto": the first that keeps packed sequences apart."""
        self.attention, self.refused = None, {}
        for name in self._candidates() if attention == "auto" else (attention,):
            reason = self._try(name)
            if reason is None:
                return
            self.refused[name] = reason
        raise UserError(
            f"{type(self.model).__name__} cannot train on packed sequences: "
            + "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        )

    def rows(self, batch: Any) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not say what it makes of a batch")

    def load_weights(self, directory: str, *, trust_remote_code: bool = False) -> None:
        """Take over the weights of a directory that this model was saved in."""
        raise TypeError(f"{type(self).__name__} does not say how it is loaded")

    def forward(self, module: torch.nn.Module, batch: Any) -> Any:
        """The output of the model, or of a part of it, on the packed batch, with what keeps its sequences
        apart."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids[None], "use_cache": False}
        lengths: tuple[int, ...] = ()
        if self.attention == "packed" or self._scaled:
            lengths = tuple(batch.cu_seqlens.diff().tolist())
        if self.attention is not None:  # None: a lone sequence, as transformers itself runs it
            # sdpa and eager build a block-diagonal mask where position_ids start again; it needs
            # attention_mask=None and no cache.
            inputs |= {"position_ids": batch.position_ids[None], "attention_mask": None}
        if self.attention == "packed":
            inputs["packed_lengths"] = lengths
        elif self.attention == "flash_attention_2":
            inputs |= {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
            inputs |= {"max_length_q": int(batch.max_seqlen), "max_length_k": int(batch.max_seqlen)}
        apart = (
            packed.rotary_per_sequence(self._scaled, lengths) if self._scaled else contextlib.nullcontext()
        )
        with apart, self.autocast():
            output = module(**inputs)
        if self.router is not None:
            self.router.see(output)
        return output

    def autocast(self) -> Any:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16 and not self.exact
        )

    def frozen_copy(self) -> PackedModel:
        """An independent copy that takes no gradient: the reference."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).requires_grad_(False)
        twin.router, twin._scaled = None, packed.length_scaled(twin.model)
        return twin

    def vocabulary(self) -> int:
        """How many tokens the model knows: the rows of its embedding, or of its head where that has fewer."""
        return self.vocabulary_weight()[1].shape[0]

    def vocabulary_weight(self) -> tuple[str, torch.Tensor]:
        """(name, weight) of the layer that says how many."""
        layers = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        weight = min(
            (layer.weight for layer in layers if layer is not None), key=lambda weight: weight.shape[0]
        )
        return next(
            (name for name, each in self.model.named_parameters() if each is weight), "its embedding"
        ), weight

    def check_tokens(self, what: str, ids: Iterable[torch.Tensor]) -> None:
        """Refuse token ids that the model does not have. `what`: the model, for the message."""
        extremes = [part.aminmax() for part in ids if part.numel()]
        if not extremes:
            return
        lowest, highest = min(int(low) for low, _ in extremes), max(int(high) for _, high in extremes)
        name, weight = self.vocabulary_weight()
        if lowest < 0 or highest >= weight.shape[0]:
            raise UserError(
                f"the tokenizer gives token id {lowest if lowest < 0 else highest}, but the {what}'s "
                f"vocabulary has {weight.shape[0]} entries "
                f"({name} is {' x '.join(map(str, weight.shape))})"
            )

    def check_generation(self, longest: int) -> None:
        """Refuse to sample sequences of this many tokens where those generated beside one another would
        change each other's positions: the samples would not be drawn from what is scored."""
        limit = min((packed.scaled_beyond(module) for module in self._scaled), default=longest)
        if longest > limit:
            raise UserError(
                f"a sequence may have {longest} tokens, and beyond {limit} this model's rotary frequencies "
                "depend on the longest sequence that is "
                "generated beside it, so samples would not be drawn as they are scored; keep prompt and "
                f"--max-new-tokens within {limit} tokens"
            )

    @contextlib.contextmanager
    def generating(self, settings: transformers.GenerationConfig) -> Iterator[torch.nn.Module]:
        """The model as `generate` needs it: the attention it came with, since what serves packed sequences
        knows no padding, and these generation settings in place of its own."""
        own, self.model.generation_config = self.model.generation_config, settings
        self.restore()
        try:
            with self.autocast():
                yield self.model
        finally:
            self.model.generation_config = own
            self.model.set_attn_implementation(IMPLEMENTATION[self.attention])

    @contextlib.contextmanager
    def unpacked(self, names: Sequence[str]) -> Iterator[None]:
        """Within: a batch is one sequence that the model is given as transformers gives it, with its own
        positions and masks; attention by the first of these implementations that it has."""
        attention = self.attention
        try:
            for name in names:
                with contextlib.suppress(ValueError, ImportError):
                    self.model.set_attn_implementation(name)
                    break
            self.attention = None
            yield
        finally:
            self.attention = attention
            self.model.set_attn_implementation(IMPLEMENTATION[attention])

    def restore(self) -> None:
        """Give the model back the attention it came with."""
        self.model.set_attn_implementation(self._original)

    def _candidates(self) -> tuple[str, ...]:
        flash = (
            self.device.type == "cuda"
            and self.dtype is torch.bfloat16
            and transformers.utils.is_flash_attn_2_available()
        )
        return (("flash_attention_2",) if flash else ()) + ("packed", "sdpa", "eager")

    def _try(self, name: str) -> str | None:
        """Switch the model to this attention and see whether packed sequences stay apart; otherwise say why
        not."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return "the model takes no position_ids"
        if name == "packed" and not getattr(self.model, "_supports_flash_attn", False):
            return "the architecture does not hand what FlashAttention would need to its attention layers"
        if name == "sdpa" and probe.softcapped(self.model):
            return "it would leave out the softcap of the attention logits"
        self.attention = name
        try:
            self.model.set_attn_implementation(IMPLEMENTATION[name])
            if self.model.config._attn_implementation != IMPLEMENTATION[name]:
                return "the architecture does not let its attention be chosen"
            return probe.leak(self)
        except (ValueError, ImportError, TypeError, RuntimeError, IndexError) as error:
            return " ".join(str(error).split())[:200]

    def to_device(self, batch: Any) -> Any:
        """The batch on the model's device."""
        return batch.to(self.device)
