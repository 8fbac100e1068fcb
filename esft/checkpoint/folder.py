"""Checkpoint folders: loading models, reading tensors, and the digest that tells one base from another."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from esft.checkpoint.digest import digest_of, forward_settings
from esft.checkpoint.original_format import original_format
from esft.checkpoint.packed_tensors import ENDS, Named, PackedTensor, packed_format
from esft.checkpoint.source import check_dtypes, check_folder, open_config, weight_files
from esft.errors import InputError, first_line
from esft.experts.model_state import Base
from esft.storage.files import TensorInfo, open_safetensors, safetensors_header
from esft.transformers_internals import tied_names, without_weights


def _by_number(name: str) -> list[tuple[int, str]]:
    """What sorts names by the numbers in them."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class Checkpoint:
    """The safetensors files of a folder: which tensor lies in which file.

    Attributes:
        folder: that holds them.
        stored: the names that the files have of their tensors -> the names of the files.
        config: the configuration.
        trust_remote_code: whether Python files of the folder may be run.
    """

    folder: Path
    stored: dict[str, str]
    config: PreTrainedConfig
    trust_remote_code: bool = False

    @classmethod
    def open(cls, folder: str | Path, trust_remote_code: bool = False) -> Checkpoint:
        """Raises InputError when the folder has no config, and no safetensors weights or two sets of them."""
        if check_folder(folder) is None:
            raise InputError(f"{folder}: no such folder")
        config = open_config(folder, trust_remote_code)
        files = weight_files(folder)
        check_dtypes(folder, files, config)
        return cls(Path(folder), files, config, trust_remote_code)

    @cached_property
    def skeleton(self) -> PreTrainedModel:
        """The model without its weights, which tells what the checkpoint's tensors are.

        Raises InputError for a configuration that no model can be made of.
        """
        try:
            named = getattr(transformers, (self.config.architectures or [""])[0], None)
            # Of a bare model with a head for language, loading makes the one with the head.
            has_head = type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING
            bare = MODEL_MAPPING.get(type(self.config), None) if has_head else None
            with torch.device("meta"):
                if isinstance(named, type) and issubclass(named, PreTrainedModel) and named is not bare:
                    return without_weights(named, self.config)
                return AutoModelForCausalLM.from_config(self.config, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # whatever a model's constructor says of values that it cannot use
            raise InputError(f"{self.folder / 'config.json'}: makes no model ({first_line(error)})") from error

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name -> file name. The names are those of the model with a head, where the files have none, too."""
        return {self._prefix + name: file for name, file in self.stored.items()}

    @cached_property
    def _prefix(self) -> str:
        """Where a model with a head keeps the one without, whose names the files have; empty where they have its own.

        transformers loads both. Only a head that is tied to an embedding need not be in the files.
        """
        own, prefix = self.skeleton.state_dict(), f"{self.skeleton.base_model_prefix}."
        if self.stored.keys() & own.keys() or not any(prefix + name in own for name in self.stored):
            return ""
        original = {name for name, _ in original_format(self.skeleton)(own, own.__getitem__)}
        return "" if self.stored.keys() & original else prefix

    @cached_property
    def as_in_memory(self) -> bool:
        """Whether the files hold the tensors as the model does, and not in the original format."""
        own = self.skeleton.state_dict()
        original = dict(original_format(self.skeleton)(own, own.__getitem__))
        # The shapes too: a family may keep the names and only transpose.
        held = {(name, info.shape) for header in self._headers.values() for name, info in header.items()}
        matches = [{(name, tuple(t.shape)) for name, t in form.items()} & held for form in (own, original)]
        return len(matches[0]) > len(matches[1])

    def misfit(self) -> str | None:
        """The first tensor that the model has and the files lack, or have in another shape.

        None where all fit, and where the files hold some in few bits, under names of their own.
        """
        if getattr(self.config, "quantization_config", None) is not None:
            return None
        own = self.skeleton.state_dict()
        wanted = own if self.as_in_memory else dict(original_format(self.skeleton)(own, own.__getitem__))
        for name, tensor in wanted.items():
            held = next(iter(self.names_of(self.tied.get(name, name))), None)
            if held is None:
                return f"tensor {name} is missing"
            if (shape := self.info(held).shape) != tensor.shape:
                return f"tensor {held} has shape {shape}, and the configuration's model has {tuple(tensor.shape)}"
        return None

    @cached_property
    def _headers(self) -> dict[str, dict[str, TensorInfo]]:
        headers = {file: safetensors_header(self.folder / file) for file in set(self.stored.values())}
        return {file: {self._prefix + name: info for name, info in held.items()} for file, held in headers.items()}

    def info(self, name: str) -> TensorInfo:
        """Where in its file a tensor lies. Raises InputError where the index is wrong about the file."""
        file = self.files[name]
        if name not in self._headers[file]:
            raise InputError(f"{self.folder / file}: holds no tensor {name}, as the index says it does")
        return self._headers[file][name]

    def names(self) -> set[str]:
        """Of all weights, in the original format."""
        if not self.as_in_memory:
            format = packed_format(self.config, str(self.folder / "config.json"))
            codes, scales = ENDS.get(format or "", ("", ""))
            return {name.removesuffix(codes) for name in self.files if not scales or not name.endswith(scales)}
        own = self.skeleton.state_dict()
        return {name for name, _ in original_format(self.skeleton)(own, own.__getitem__)}

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the weights, as far as the configuration says it."""
        dtype = self.config.get_text_config().dtype
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def digest(self, rounded: torch.dtype | None = None) -> str:
        """The digest of these weights; equal to ``model_digest`` of the model loaded from them."""
        return digest_of(self.tensors(), rounded)

    def base(self, rounded: torch.dtype | None = None) -> Base:
        """What tells these weights from other bases; ``model_base`` of the model loaded from them."""
        return Base(str(self.folder), self.digest(rounded), self.dtype, forward_settings(self.config))

    def tensors(self) -> Iterator[Named]:
        """The model's weights in the files, under the names of the original format, layer by layer.

        What is not converted stays in the files until it is looked at. Raises InputError for one that cannot be read.
        """
        with ExitStack() as stack:
            held: dict[str, Callable[[], Tensor]] = {}
            for file in sorted(set(self.files.values())):
                handle = stack.enter_context(open_safetensors(self.folder / file))
                for name in handle.keys():  # noqa: SIM118
                    if self.belongs(own := self._prefix + name):
                        held[self.tied.get(own, own)] = partial(handle.get_tensor, name)
            held = dict(sorted(held.items(), key=lambda item: _by_number(item[0])))
            if self.as_in_memory:
                yield from original_format(self.skeleton)(held, lambda name: held[name]())
            else:
                yield from self._packed(held)

    def _packed(self, held: dict[str, Callable[[], Tensor]]) -> Iterator[Named]:
        """The same tensors; where the checkpoint keeps a weight as codes and scales, these two as one."""
        format = packed_format(self.config, str(self.folder / "config.json"))
        codes, scales = ENDS.get(format or "", ("", None))
        for name, read in held.items():
            own = name[: len(name) - len(codes)]
            if scales is not None and name.endswith(codes) and own + scales in held:
                packed = PackedTensor(str(format), (read(), held[own + scales]()))
                packed.check(f"{self.folder / self.files[name]}: {own}")
                yield own, packed
            elif scales is None or not name.endswith(scales):
                yield name, read()

    @cached_property
    def _stacks(self) -> set[str]:
        """The paths of the layers that hold experts; a tower beside them has a number of layers of its own."""
        layers = ((name, _LAYER.search(name)) for name in self.files if ".experts." in name)
        return {name[: layer.start()] for name, layer in layers if layer}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Tensors that are another one under a second name: that name in the files -> the other one's.

        As in transformers, two that the files hold with different values are not tied, whatever the configuration says.
        """
        state, found = self.skeleton.state_dict(), {}
        to_stored = original_format(self.skeleton)
        for pair in tied_names(self.skeleton).items():
            names = pair if self.as_in_memory else [next(to_stored([name], state.__getitem__))[0] for name in pair]
            if not self.files.keys() >= set(names) or self._equal(*names):
                found[names[0]] = names[1]
        return found

    def _equal(self, *names: str) -> bool:
        kinds = {(info.dtype, info.shape) for info in map(self.info, names)}
        with ExitStack() as stack:
            handles = {name: stack.enter_context(open_safetensors(self.folder / self.files[name])) for name in names}
            tensors = (handles[name].get_tensor(name.removeprefix(self._prefix)) for name in names)
            return len(kinds) == 1 and torch.equal(*tensors)

    def names_of(self, name: str) -> list[str]:
        """Under which names the files hold a tensor: one, or each of those that are tied; none where they lack it."""
        return [own for own in (name, *(n for n, first in self.tied.items() if first == name)) if own in self.files]

    def belongs(self, name: str) -> bool:
        """Whether a tensor is a weight of the model: some files hold further prediction layers or what is computed."""
        layer = _LAYER.search(name)
        text = self.config.get_text_config()
        beyond = layer is not None and int(layer[1]) >= text.num_hidden_layers and name[: layer.start()] in self._stacks
        return not (beyond or name.endswith("inv_freq"))
