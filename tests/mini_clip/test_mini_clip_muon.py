"""Muon: against torch's own, which takes each matrix alone."""

from __future__ import annotations

import pytest
import torch

from mini_clip.muon import Muon, orthogonalise


def test_singular_values_come_near_one_and_directions_stay() -> None:
    matrices = torch.randn(3, 12, 7, generator=torch.Generator().manual_seed(0))
    near = orthogonalise(matrices).float()
    assert near.shape == matrices.shape
    values = torch.linalg.svdvals(near)
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.4
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    turned = u.mT @ near @ v.mT
    assert float((turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max()) < 0.1


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 4), (6, 6), (8, 4), (3, 9)]
    ours = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.3}
    both = (
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        for optimizer in both:
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, atol=2e-3, rtol=0)


def test_momentum_survives_saving() -> None:
    def run(stop: bool) -> torch.Tensor:
        matrices = [torch.eye(4).requires_grad_() for _ in range(2)]
        optimizer = Muon(matrices)
        for step in range(4):
            if stop and step == 2:
                state = optimizer.state_dict()
                optimizer = Muon(matrices)
                optimizer.load_state_dict(state)
            for i, matrix in enumerate(matrices):
                matrix.grad = torch.randn(
                    4, 4, generator=torch.Generator().manual_seed(9 * i + step)
                )
            optimizer.step()
        return torch.stack(matrices).detach()

    assert torch.equal(run(stop=True), run(stop=False))
