"""The unit of Diversify's steps."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from elrond_core.steering.draws import NATURAL


@pytest.mark.parametrize(("total", "wanted"), [(0.0, "absolute"), (0.5, "token norms")])
def test_natural_steps_keep_their_proportions(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, total: float, wanted: str
) -> None:
    """Calibrated directions of unlike reach do not bend natural steps, whether they have a total or not."""
    core = __import__(f"{pack.__name__}.elrond_core.directions", fromlist=["Directions"])
    steering = __import__(f"{pack.__name__}.nodes.steering", fromlist=["Diversify"])
    provenance = __import__(f"{pack.__name__}.elrond_core.provenance", fromlist=["Provenance"]).Provenance("")
    vectors = torch.eye(3)[:2, None]
    reach = {"intervals": ((-1.0, 1.0), (-0.1, 0.1)), "stops": ((-1.0, 0.0, 1.0), (-0.1, 0.0, 0.1))}
    directions = core.Directions(vectors, torch.ones(2), {}, provenance, natural_std=(1.0, 1.0), **reach)
    seen: list[torch.Tensor] = []

    def steer(conditioning: Any, change: Any, *rest: Any) -> Any:
        seen.append(
            change(
                SimpleNamespace(family="", index_of=lambda *_: 0, concepts=[SimpleNamespace(rows=(0,))], norms=[7.0])
            )[1]
        )
        return conditioning

    monkeypatch.setattr(steering.host, "steer_conditioning", steer)
    settings = {"count": 64, "seed": 1, "lowest": 1.0, "highest": 1.0, "mix": 1, "leading": 0, "both_signs": True}
    settings |= {"start": 0.0, "end": 1.0, "concept": "", "how": NATURAL, "total": total}
    output = steering.Diversify.execute([], directions, unit="auto", **settings)
    assert f"in {wanted}" in output.args[1]
    steps = seen[0][:, 0]
    spreads = steps.std(0)
    assert spreads[0] / spreads[1] == pytest.approx(1.0, abs=0.2)
    if total:
        assert steps.norm(dim=1).tolist() == pytest.approx([7 * total] * 64, abs=1e-5)
