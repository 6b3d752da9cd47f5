"""A backbone with a trained adapter attached permanently, for the measures of a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmadapters.methods import METHODS
from vlmadapters.methods.config import OURS
from vlmlayers.errors import UserError, no_file
from vlmlayers.files import file_checksum


@dataclass(frozen=True)
class Attach:
    """Attaches a trained adapter to a loaded model for as long as that lives."""

    def check(self, method: str | None) -> None:
        """Check the name of a method, which needs no model.

        Raises:
            UserError: There is no such method.
        """
        if method is not None:
            METHODS.config(method)

    def __call__(self, model: Any, path: str | Path, method: str | None = None) -> Any:
        """Attach an adapter and return the model.

        `weights` and `weights_hash` change, so that features and scores of the adapted model are
        never taken for those of the backbone.

        Args:
            model: What `vlmlayers.models.load_model` returns.
            path: `.safetensors` of ours, or the authors' file, which is read with the published
                scale.
            method: As `vlmadapters.files.load_trained`.

        Raises:
            UserError: The file cannot be read, belongs to another backbone or method, or an adapter
                is attached.
        """
        from vlmadapters.files import load_trained, read_info  # bring torch

        path = Path(path)
        if not path.is_file():
            raise UserError(
                f"adapter {path} {no_file(path)}; `vlmlayers train` writes them to adapters/"
            )
        adapter = load_trained(path, model, method=method)
        made = read_info(path).provenance if path.suffix == OURS else {}
        trained_on = str(made.get("source", ""))
        notes = [trained_on] if trained_on else []
        notes += [f"seed {made['seed']}"] if "seed" in made else []
        words = f"{adapter.config.title} {adapter.config.placement}"
        words += f" ({', '.join(notes)})" if notes else ""
        # The checksum of the file enters `weights_hash`, which every stored feature is filed under.
        # So does the code of a method that does not ship: the same numbers in another forward pass.
        digest = file_checksum(path) + METHODS.code(adapter.config.name)
        model.adapt(adapter.attached(model.clip), words, digest, trained_on)
        return model


attach_for_good = Attach()
