"""This process among those that `torchrun` started."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

from vlmlayers.runs import processes_launched

_PATIENCE = timedelta(hours=24)  # a slow process is not a dead one; torchrun ends the dead


@dataclass(frozen=True)
class Processes:
    """Rank of this process and number of all.

    Attributes:
        rank: Number of this process, from 0.
        world: Number of processes.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Return this process's place; joins the group that `torchrun` describes, if any."""
        if not distributed.is_available():
            return cls()
        if not distributed.is_initialized():
            if processes_launched() < 2 or "MASTER_ADDR" not in os.environ:
                return cls()
            # gloo works on host memory, where the sums lie; NCCL would need a GPU for each process.
            distributed.init_process_group("gloo", timeout=_PATIENCE)
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, batches: int) -> range:
        """Return the batches of this process; together all of them, none twice."""
        # In turn and not in runs: images of one class lie together and may all be large.
        return range(self.rank, batches, self.world)

    def barrier(self) -> None:
        """Wait until every process is here. Host side, also where models are on GPUs."""
        if self.world > 1:
            flag = torch.zeros(1)
            distributed.all_reduce(flag)
