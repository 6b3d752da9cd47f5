"""CoOp: the words around the class name are learned.

Reference: Zhou, Yang, Loy, Liu, "Learning to Prompt for Vision-Language Models", IJCV 2022.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmadapters.clip.frozen import Backbone
from vlmadapters.clip.walk import State
from vlmadapters.data.task import Task, places
from vlmadapters.methods.base import Method
from vlmadapters.methods.config import MethodConfig
from vlmadapters.methods.configs import ContextConfig, CoOpConfig
from vlmadapters.methods.context import context_prompts, context_state, starting_context
from vlmadapters.methods.official import check_settings, matched_keys
from vlmlayers.errors import UserError

CONTEXT = re.compile(r"ctx(?:\.(\d+))?")


class LearnedContext(Method):
    """Context that is learned at the input of text blocks: what CoOp and related methods share.

    That of block 1 is the authors' `ctx`, and positions are added to it; that of a later block,
    which is ours, overwrites the same tokens there.

    Args:
        config: Where the context is put.
        start: Block to initial values, (word, width) or (context, word, width).
    """

    config: Any
    axes: ClassVar[tuple[int, ...]] = (2,)  # how many axes a context may have
    # Keys of the authors' checkpoints that are no parameters.
    left_out: ClassVar[tuple[str, ...]] = ("token_prefix", "token_suffix")
    official: ClassVar[re.Pattern[str]] = CONTEXT  # the others

    def __init__(self, config: MethodConfig, start: Mapping[int, Tensor]) -> None:
        super().__init__(config)
        self.context = nn.ParameterDict({str(b): nn.Parameter(x) for b, x in start.items()})

    def before(self, x: Tensor, tower: str, block: int, state: State) -> Tensor:
        """Return the tokens that enter a block, the context in its slots."""
        if tower != "text" or str(block) not in self.context:
            return x
        return state.note.write(x, self.context[str(block)], block)

    def official_names(self) -> dict[str, str]:
        """Return our parameter names to the authors': `ctx`, and `ctx.b` at a later block b."""
        ours = {f"context.{b}": "ctx" if b == "1" else f"ctx.{b}" for b in self.context}
        return super().official_names() | ours

    @classmethod
    def is_official_key(cls, key: str) -> bool:
        """Whether a key of the authors' checkpoints is a parameter."""
        return key not in cls.left_out

    @classmethod
    def settings_of(cls, shape: Sequence[int]) -> dict[str, Any]:
        """Return the settings that the shape of a context tells."""
        raise NotImplementedError

    @classmethod
    def config_of_official(
        cls, state: Mapping[str, Tensor], where: str, config: Any = None
    ) -> MethodConfig:
        """Read blocks and sizes from the contexts; what they started from is not in them."""
        kind: Any = cls.Config
        matched_keys(state, cls.official, where, kind.title)
        keys = (CONTEXT.fullmatch(key) for key in state)
        shapes = {int(key[1] or 1): tuple(state[key[0]].shape) for key in keys if key}
        shape = next(iter(shapes.values()), ())
        if len(shape) not in cls.axes:
            raise UserError(f"{where} holds no {kind.title}: its ctx has the shape {shape}")
        found = kind(text=tuple(sorted(shapes)), **cls.settings_of(shape))
        if config is None:
            return found
        return check_settings(config, {"text": found.text, "size": found.size}, where)


class CoOp(LearnedContext):
    """Context words, shared by all classes or learned for each, put around the class name.

    The prompt of a class is [context] name. (or the name in the middle or in front of the context);
    logits are scaled cosines, the loss is cross-entropy.

    Args:
        config: Blocks, words or length, place of the name, whether each class has a context.
        backbone: The frozen CLIP, for widths and initial values.
        task: The classes trained on.
        seed: Seed of random context.

    Reference: Zhou et al., CoOp, IJCV 2022, equations 2 and 3.
    """

    Config: ClassVar[type[ContextConfig]] = CoOpConfig
    varies = False
    config: ContextConfig
    axes: ClassVar[tuple[int, ...]] = (2, 3)

    def __init__(
        self, config: ContextConfig, backbone: Backbone, task: Task, seed: int = 0
    ) -> None:
        if config.class_bound and not task.class_names:
            raise UserError(
                f"{config.title} has a context for each class here; name the classes (one dataset "
                "and kind of classes, or a task)"
            )
        count = len(task.class_names) if config.class_bound else None
        super().__init__(config, starting_context(config, backbone, task.class_names, count, seed))
        self.class_names = task.class_names if config.class_bound else ()

    def prepare(self, backbone: Backbone, task: Task) -> Any:
        """Return the frozen state of the class prompts at the first block with context."""
        words, names = self.config.start_words, task.class_names
        tokens, slots = context_prompts(backbone, names, words, class_at=self.config.class_at)
        state = context_state(backbone, tokens, slots, self.first(backbone, "text"))
        if not self.class_names:
            return state
        which = torch.tensor(self._own(names), device=backbone.device)
        return replace(state, note=replace(state.note, which=which))

    def _own(self, names: Sequence[str]) -> list[int]:
        """Return the number of each class among those trained on."""
        # By name and not by number: a test may list the classes in another order.
        own = places(names, self.class_names)
        if -1 in own:
            raise UserError(
                f"the context was learned for each of {len(self.class_names)} classes "
                f"({', '.join(self.class_names[:3])}, …), and {names[own.index(-1)]!r} is none of "
                "them; test the classes that were trained, or train with class_specific=false"
            )
        return own

    @classmethod
    def settings_of(cls, shape: Sequence[int]) -> dict[str, Any]:
        """Return the settings that the shape of a context tells."""
        each = {"class_specific": True} if len(shape) == 3 else {}
        # The first words are not in the file; without words any length is valid.
        return {"words": "", "length": shape[-2], **each}

    def load_official_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters stored under the authors' names.

        Raises:
            UserError: They are of another method, placement, width, backbone or class list.
        """
        # Before the general check, which would speak of shapes where the class list is wrong.
        for value in state.values():
            if self.class_names and value.ndim == 3 and len(value) != len(self.class_names):
                raise UserError(
                    f"the checkpoint holds contexts of {len(value)} classes, and the task has "
                    f"{len(self.class_names)}; name the classes that it was trained on"
                )
        super().load_official_state_dict(state)
