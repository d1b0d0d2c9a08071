"""How much of what the demo's shipped directions change falls outside the person, with and without a mask.

    python -m bench.locality

Everything is done by the nodes themselves at their default settings, on the student; the region a leak is measured
against is the person, as the world draws what it measures in the unsteered image. Figures go to
bench/results/locality.json, by directions file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from demo import host

# isort: split
import torch

from demo.evaluate import Demo
from demo.portraits import measure
from demo.portraits.world import role_shares

PACK = host.pack()
from comfyui_elrond.elrond_core.steering.locality import Leak, measure_leak  # noqa: E402
from comfyui_elrond.elrond_core.storage.format import load_directions  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "locality.json"
IMAGES, SEED = 64, 4001
MEASURES = measure.load()
NODES = {node.GET_SCHEMA().node_id: node for node in PACK.NODES}


def run(name: str, **inputs: Any) -> Any:
    """The outputs of a node, whose other inputs are at their defaults."""
    schema = NODES[name].GET_SCHEMA()
    usual = {entry.id: entry.default for entry in schema.inputs if getattr(entry, "default", None) is not None}
    with torch.inference_mode():
        return NODES[name].execute(**{**usual, **inputs}).args


def people(images: torch.Tensor) -> torch.Tensor:
    """Whether a person covers a pixel, float (N, 64, 64), of images (N, 64, 64, 3)."""
    shares, _ = role_shares(MEASURES.measure(images.movedim(-1, 1)))
    # The last is what is seen of the background.
    return (shares[:, -1] < 0.5).float()


def rank(answer: torch.Tensor, person: torch.Tensor) -> float:
    """How often a cell within the person answers more than one beside it (area under the ROC curve)."""
    cover = torch.nn.functional.avg_pool2d(person[:, None], 8)[:, 0]
    pairs = zip(answer, cover, strict=True)
    return float(torch.stack([(a[c > 0.5][:, None] > a[c == 0][None]).float().mean() for a, c in pairs]).mean())


def of_file(path: Path) -> dict[str, Any]:
    """Leaks of a file's directions, averaged over images and then directions."""
    demo, directions = Demo.load("student"), load_directions(path)
    origin = directions.provenance
    positive = run("ElrondEncodeConcept", clip=demo.clip, prompt=origin.prompt, concept=origin.concept)[0]

    def sampled(conditioning: Any) -> Any:
        settings = {"width": 64, "height": 64, "count": IMAGES, "batch_size": IMAGES, "seed": SEED}
        settings |= {"steps": demo.settings.steps, "cfg": demo.settings.cfg, "sampler_name": demo.settings.sampler}
        settings |= {"scheduler": demo.settings.scheduler}
        return run("ElrondSampleRealizations", model=demo.model, positive=conditioning, **settings)[0]

    def picture(latents: Any) -> torch.Tensor:
        with torch.inference_mode():
            return demo.vae.decode(latents["samples"])

    latents = sampled(positive)
    before = picture(latents)
    person = people(before)
    mask, answer = run(
        "ElrondConceptMask", model=demo.model, positive=positive, samples=latents, batch_size=IMAGES, seed=SEED
    )
    # The control is the same mask half an image away.
    elsewhere = mask.roll((mask.shape[1] // 2, mask.shape[2] // 2), (1, 2))
    masks = {"free": None, "masked": mask, "masked_elsewhere": elsewhere}
    found: dict[str, list[Leak]] = {key: [] for key in masks}
    valid: dict[str, list[float]] = {key: [] for key in masks}
    for index in range(len(directions)):
        for key, region in masks.items():
            steered = run(
                "ElrondApplyDirection", conditioning=positive, directions=directions, index=index, mask=region
            )[0]
            after = picture(sampled(steered))
            found[key].append(measure_leak(before.movedim(-1, 1), after.movedim(-1, 1), person))
            valid[key].append(float(MEASURES.valid(after.movedim(-1, 1)).float().mean()))
        print(path.stem, index, {key: round(leaks[-1].mean, 3) for key, leaks in found.items()}, flush=True)
    return {
        "images": IMAGES,
        "region_rank": rank(answer, person),
        "leak_by_direction": {key: [leak.mean for leak in leaks] for key, leaks in found.items()},
        **{
            key: {
                "leak": sum(leak.mean for leak in leaks) / len(leaks),
                "change_inside": _root(torch.stack([leak.inside for leak in leaks])),
                "change_outside": _root(torch.stack([leak.outside for leak in leaks])),
                "valid": sum(valid[key]) / len(leaks),
            }
            for key, leaks in found.items()
        },
    }


def _root(squares: torch.Tensor) -> float:
    return float(squares.mean().sqrt())


def main() -> None:
    """Measure, and keep the figures."""
    files = sorted((ROOT / "demo" / "directions").glob("*.safetensors"))
    figures: dict[str, Any] = {path.stem: of_file(path) for path in files}
    RESULTS.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
