"""Files: round trips, refusals, atomic writing, and names that stay in their folder."""

import errno
import io
import json
import os
import re
import stat
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elrond_core import __version__
from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.storage import atomic_write as writing
from elrond_core.storage import format as files
from elrond_core.storage import tensors as tensor_files
from elrond_core.storage.names import safe_path

GOLDEN = Path(__file__).parents[1] / "golden"
HERE = Provenance(
    family="SDXL",
    prompt="A picture of a grünes monster",
    concept="grünes monster",
    tokens=("gr", "ünes</w>", "monster</w>"),
    rows=(5, 6, 7),
    token_norm=27.9375,
    sigma=(14.61, 7.5),
    count=4,
    seed=2**63 + 1,
    host="ComfyUI 0.3.75",
    extra={"author": "somebody", "note": "kept"},
)


def directions() -> Directions:
    vectors = torch.eye(12)[:4].reshape(4, 3, 4)
    method = {"name": "pca", "significance": "2.5"}
    names, stars = ("hue", "", "größe", ""), (True, False, False, True)
    reach, densities = (4.5, 3.0, 0.25, 0.0), (1.0, 0.125, 1e-4, 0.0)
    scores = torch.tensor([0.4, 0.3, 0.2, 0.05])
    return Directions(vectors, scores, method, HERE, names, "share", stars, reach, densities)


def gradients() -> Gradients:
    pairs = torch.arange(8).reshape(4, 2)
    vectors = torch.arange(48.0).reshape(4, 3, 4)
    return Gradients(vectors, torch.full((4,), 14.61), pairs[:, 0], pairs[:, 1], HERE, vectors[:2] / 7)


def everything() -> tuple[Directions, Gradients]:
    """One of each kind that has all that a file may leave out."""
    merged = HERE.with_(sigma=(14.5, 7.5), latent_values=65536, seeds=(2**63 + 1, 7))
    several = replace(
        gradients(),
        sigma=torch.tensor([14.5, 7.5, 14.5, 7.5]),
        probe_sigma=torch.tensor([14.5, 7.5]),
        provenance=merged,
    )
    return replace(directions(), provenance=merged), several


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != writing.LOCK_NAME)


def same(one: object, two: object) -> None:
    for name, value in vars(one).items():
        other = getattr(two, name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def test_directions_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "folder" / "monster.safetensors"
    files.save_directions(directions(), path)
    same(directions(), files.load_directions(path, family="SDXL", width=4))
    files.save_directions(files.load_directions(path), path)
    same(directions(), files.load_directions(path))
    assert names(path.parent) == ["monster.safetensors"]


def test_what_is_not_known_of_directions_is_not_known_afterwards(tmp_path: Path) -> None:
    unknown = replace(directions(), natural_std=(), densities=())
    files.save_directions(unknown, tmp_path / "d")
    same(unknown, files.load_directions(tmp_path / "d"))
    rewritten(tmp_path / "d", reach=None, densities=None)
    same(unknown, files.load_directions(tmp_path / "d"))


INTERVAL = ((-0.8, 1.5), (0.0, 0.0), (-2.0, 0.0), (0.0, 0.25))
STOPS = ((-0.75, 0.0, 1.5), (), (-2.0, -1.5, 0.0, 0.0, 0.0), (0.0, 0.0, 0.25))


def test_calibrations_round_trip(tmp_path: Path) -> None:
    """Some directions may have none, and some no usable strength on one side."""
    some = replace(directions(), intervals=INTERVAL, stops=STOPS)
    files.save_directions(some, tmp_path / "d")
    same(some, files.load_directions(tmp_path / "d"))
    with safetensors.safe_open(tmp_path / "d", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["interval"]) == [list(ends) for ends in INTERVAL]
    assert json.loads(metadata["stops"]) == [list(row) for row in STOPS]
    # JavaScript writes 1.0 as 1.
    rewritten(tmp_path / "d", interval="[[-1, 1], [0, 0], [0, 0], [0, 0]]", stops="[[-1, 0, 1], [], [], []]")
    found = files.load_directions(tmp_path / "d")
    assert found.stops[0] == (-1.0, 0.0, 1.0) and all(type(stop) is float for stop in found.stops[0])


def test_directions_that_are_not_calibrated_are_written_as_before(tmp_path: Path) -> None:
    files.save_directions(directions(), tmp_path / "d")
    with safetensors.safe_open(tmp_path / "d", "pt") as file:
        assert not {"interval", "stops"} & set(file.metadata())
    rewritten(tmp_path / "d", interval="[]", stops="[]")
    same(directions(), files.load_directions(tmp_path / "d"))


ENDS = "[[-1, 1], [0, 0], [0, 0], [0, 0]]"


@pytest.mark.parametrize(
    ("interval", "stops"),
    [
        (ENDS, None),
        (None, "[[-1, 0, 1], [], [], []]"),
        (ENDS, "[[-1, 0, 1], [], []]"),
        (ENDS, "[[-1, 0, 1], [], [], [], []]"),
        (ENDS, "{}"),
        (ENDS, "[[-1, 0, 1], [], [], 5]"),
        (ENDS, "[[-1, 0, 1], [], [], null]"),
        ("[[-1, 1], 0, [0, 0], [0, 0]]", "[[-1, 0, 1], [], [], []]"),
        ("[[-1, 1, 2], [0, 0], [0, 0], [0, 0]]", "[[-1, 0, 1], [], [], []]"),
        ("[[-1, 1], [0, 1], [0, 0], [0, 0]]", "[[-1, 0, 1], [], [], []]"),
        ("[[-1, 0.5], [0, 0], [0, 0], [0, 0]]", "[[-1, 0, 1], [], [], []]"),
        ("[[-0.5, 1], [0, 0], [0, 0], [0, 0]]", "[[-1, 0, 1], [], [], []]"),
        (ENDS, "[[0], [], [], []]"),
        (ENDS, "[[-1, 0, 0.5, 1], [], [], []]"),
        (ENDS, "[[-1, 0.5, 1], [], [], []]"),
        (ENDS, "[[0, -1, 0, 1, 0], [], [], []]"),
        (ENDS, "[[-1, 0, NaN], [], [], []]"),
        (ENDS, "[[-1, 0, true], [], [], []]"),
        (ENDS, '[[-1, 0, "1"], [], [], []]'),
        ("[[-1, 1e9], [0, 0], [0, 0], [0, 0]]", "[[-1, 0, 1e9], [], [], []]"),
        (ENDS, f"[{[0] * 203}, [], [], []]"),
    ],
)
def test_calibrations_that_are_none(interval: str | None, stops: str | None, tmp_path: Path) -> None:
    rewritten(tmp_path / "d", interval=interval, stops=stops)
    with pytest.raises(
        ElrondError, match=r"^d has an interval or stops that are no calibration of its 4 directions\.$"
    ):
        files.load_directions(tmp_path / "d")


@pytest.mark.parametrize("stops", [(-1.0, 0.0, float("nan")), (-1.0, 0.0, float("inf")), (1.0, 0.0, -1.0), (0.0, 0.0)])
def test_calibrations_that_are_not_written(stops: tuple[float, ...], tmp_path: Path) -> None:
    bad = replace(directions(), intervals=((-1.0, 1.0), *INTERVAL[1:]), stops=(stops, *STOPS[1:]))
    with pytest.raises(ElrondError, match=r"^Nothing was written: d .*no calibration"):
        files.save_directions(bad, tmp_path / "d")
    assert not names(tmp_path)


def test_gradients_round_trip(tmp_path: Path) -> None:
    files.save_gradients(gradients(), tmp_path / "g")
    same(gradients(), files.load_gradients(tmp_path / "g"))
    without = replace(gradients(), probes=torch.empty(0, 3, 4))
    files.save_gradients(without, tmp_path / "g")
    same(without, files.load_gradients(tmp_path / "g"))
    levels = replace(gradients(), sigma=torch.tensor([9.0, 3, 9, 3]), probe_sigma=torch.tensor([9.0, 3]))
    files.save_gradients(levels, tmp_path / "g")
    same(levels, files.load_gradients(tmp_path / "g"))


@pytest.mark.parametrize("version", ["1", "2"])
def test_golden_files_stay_readable(version: str) -> None:
    # The first files are from before directions had a reach and densities.
    plain = replace(directions(), natural_std=(), densities=()) if version == "1" else directions()
    same(plain, files.load_directions(GOLDEN / f"directions-{version}.safetensors", family="SDXL", width=4))
    same(gradients(), files.load_gradients(GOLDEN / f"gradients-{version}.safetensors"))


@pytest.mark.parametrize("version", ["1", "2"])
def test_golden_files_with_everything_stay_readable(version: str) -> None:
    for thing, kind in zip(everything(), ("directions", "gradients"), strict=True):
        path = GOLDEN / f"{kind}-{version}-everything.safetensors"
        same(thing, getattr(files, f"load_{kind}")(path, family="SDXL", width=4))


def test_files_are_written_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other programs read these files: what changes in them is a change of the format."""
    monkeypatch.setattr(files, "__version__", "0.1.0")
    for thing, kind in zip(everything(), ("directions", "gradients"), strict=True):
        getattr(files, f"save_{kind}")(thing, tmp_path / kind)
        content = [path.read_bytes() for path in (tmp_path / kind, GOLDEN / f"{kind}-2-everything.safetensors")]
        one, other = (tensor_files.header("x", io.BytesIO(each), len(each)) for each in content)
        assert one == other


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    files.save_directions(everything()[0], tmp_path / "d")
    with safetensors.safe_open(tmp_path / "d", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("project_version") == __version__
    checksum = metadata.pop("checksum")
    tensors, text = tensor_files.read(tmp_path / "d")
    assert checksum == tensor_files.checksum(tensors, text) and re.fullmatch("[0-9a-f]{64}", checksum)
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1] == __version__
    decoded = {key: json.loads(text) if text[0] in "[{" else text for key, text in metadata.items()}
    assert decoded == {
        "format_version": "2",
        "kind": "directions",
        "host": "ComfyUI 0.3.75",
        "family": "SDXL",
        "d": "4",
        "prompt": "A picture of a grünes monster",
        "concept": "grünes monster",
        "tokens": ["gr", "ünes</w>", "monster</w>"],
        "rows": [5, 6, 7],
        "token_norm": "27.9375",
        "sigma": [14.5, 7.5],
        "count": "4",
        "seed": "9223372036854775809",
        "seeds": [2**63 + 1, 7],
        "latent_values": "65536",
        "method": {"name": "pca", "significance": "2.5"},
        "score_name": "share",
        "names": ["hue", "", "größe", ""],
        "stars": [True, False, False, True],
        "reach": [4.5, 3.0, 0.25, 0.0],
        "densities": [1.0, 0.125, 1e-4, 0.0],
        "author": "somebody",
        "note": "kept",
    }


@pytest.mark.parametrize(
    "act",
    [
        lambda g: g.at_levels([7.5]),
        lambda g: g.of_row(1),
        lambda g: g.summed_over_rows(),
        lambda g: g.normalised(),
        lambda g: replace(g, provenance=g.provenance.with_(rows=(), tokens=())),
    ],
    ids=["level", "row", "alike", "normalised", "unknown rows"],
)
def test_selections_round_trip(act: Any, tmp_path: Path) -> None:
    chosen = act(everything()[1])
    files.save_gradients(chosen, tmp_path / "g")
    same(chosen, files.load_gradients(tmp_path / "g"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_written_as_the_format_has_them(dtype: torch.dtype, tmp_path: Path) -> None:
    cast = replace(
        gradients(),
        vectors=gradients().vectors.to(dtype),
        sigma=gradients().sigma.to(dtype),
        sources=gradients().sources.int(),
        probes=gradients().probes.to(dtype).requires_grad_(),
    )
    files.save_gradients(cast, tmp_path / "g")
    loaded = files.load_gradients(tmp_path / "g")
    same(replace(cast, **{n: getattr(cast, n).float() for n in ("vectors", "sigma", "probes")}), loaded)
    assert loaded.sources.dtype == torch.int64
    files.save_directions(replace(directions(), vectors=directions().vectors.to(dtype)), tmp_path / "d")
    same(directions(), files.load_directions(tmp_path / "d"))


def test_tensors_that_share_their_memory_are_written(tmp_path: Path) -> None:
    numbers, vectors = torch.arange(4), gradients().vectors
    shared = replace(gradients(), vectors=vectors, sources=numbers, targets=numbers, probes=vectors[1:])
    files.save_gradients(shared, tmp_path / "g")
    same(shared, files.load_gradients(tmp_path / "g"))


def test_the_count_is_that_of_the_vectors(tmp_path: Path) -> None:
    files.save_gradients(replace(gradients(), provenance=HERE.with_(count=0)), tmp_path / "g")
    assert files.load_gradients(tmp_path / "g").provenance.count == 4


def test_whole_numbers_may_stand_for_others(tmp_path: Path) -> None:
    rewritten(tmp_path / "d", reach="[1, 2, 3.5, 0]", densities="[0, 1, 0.5, 1]", sigma="[14]", token_norm="3")
    found = files.load_directions(tmp_path / "d")
    assert (found.natural_std, found.densities) == ((1.0, 2.0, 3.5, 0.0), (0.0, 1.0, 0.5, 1.0))
    assert all(type(number) is float for number in found.natural_std + found.densities + found.provenance.sigma)


def test_metadata_of_others_does_not_replace_ours(tmp_path: Path) -> None:
    mine = replace(directions(), provenance=HERE.with_(extra={"kind": "pickle", "x": "y"}))
    files.save_directions(mine, tmp_path / "d")
    assert files.load_directions(tmp_path / "d").provenance.extra == {"x": "y"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d"
    files.save_directions(directions(), path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ElrondError, match=r"^d could not be written: the disk is full; free some space\.$"):
        files.save_directions(replace(directions(), names=("other",) * 4), path)
    assert names(tmp_path) == ["d"]
    same(directions(), files.load_directions(path))


def of(thing: Any, **changes: Any) -> Any:
    return replace(thing, provenance=thing.provenance.with_(**changes))


BAD = [
    ({"token_norm": 0.0}, "rows, tokens, sigma or token_norm"),
    ({"token_norm": float("nan")}, "rows, tokens, sigma or token_norm"),
    ({"sigma": (float("inf"),)}, "rows, tokens, sigma or token_norm"),
    ({"rows": (5, 6, 7, 8)}, r"of 4 rows, \[5, 6, 7, 8\], and its vectors have 3"),
    ({"rows": (-5, 6, 7)}, "rows, tokens, sigma or token_norm"),
    ({"seed": -5}, "seed that is not a whole number of zero or more"),
    ({"seeds": (1, -5)}, "seeds, rows, tokens, sigma or token_norm"),
    ({"latent_values": -3}, "latent_values that is not a whole number of zero or more"),
    ({"extra": {"note": "x" * 2**22}}, "and 4194304 is the most"),
]


@pytest.mark.parametrize("kind", ["directions", "gradients"])
@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_what_could_not_be_read_is_not_written(kind: str, changes: dict, sentence: str, tmp_path: Path) -> None:
    good = {"directions": directions, "gradients": gradients}[kind]()
    save, load = getattr(files, f"save_{kind}"), getattr(files, f"load_{kind}")
    save(good, tmp_path / "x")
    with pytest.raises(ElrondError, match=rf"^Nothing was written: x .*{sentence}"):
        save(of(good, **changes), tmp_path / "x")
    assert names(tmp_path) == ["x"]
    same(good, load(tmp_path / "x"))


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (replace(gradients(), targets=torch.tensor([0, 1, -2, -3])), "row 2 of targets is negative"),
        (replace(gradients(), sources=torch.tensor([-1, 1, 2, 3])), "row 0 of sources is negative"),
        (replace(gradients(), vectors=gradients().vectors.double() * 1e300), "row 0 of vectors is not finite"),
        (replace(gradients(), sigma=torch.ones(4, 1)), "'sigma' of the wrong type or shape"),
        (replace(gradients(), probes=gradients().probes * torch.nan), "row 0 of response is not finite"),
        (replace(directions(), scores=torch.tensor([1, 1, 1, 1e300], dtype=torch.float64)), "row 3 of scores"),
        (replace(directions(), natural_std=(1.0, 2.0, 3.0, -1.0)), "do not fit its 4 directions"),
    ],
)
def test_tensors_that_are_not_written(changed: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ElrondError, match=rf"^Nothing was written: x.*{sentence}"):
        getattr(files, f"save_{type(changed).__name__.lower()}")(changed, tmp_path / "x")
    assert not names(tmp_path)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (replace(directions(), vectors=directions().vectors * 1.01), "direction 0 has norm 1.01 instead of 1"),
        (replace(directions(), vectors=directions().vectors * torch.nan), "row 0 of vectors is not finite"),
        (replace(directions(), scores=torch.tensor([1, 1, torch.inf, 1])), "row 2 of scores is not finite"),
    ],
)
def test_what_is_not_written(changed: Directions, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ElrondError, match=sentence):
        files.save_directions(changed, tmp_path / "d")
    assert not names(tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    files.save_directions(directions(), tmp_path / "d")
    with pytest.raises(ElrondError, match=r"^d is for SDXL of width 4, and this model is Flux of width 4096\.$"):
        files.load_directions(tmp_path / "d", family="Flux", width=4096)
    with pytest.raises(ElrondError, match=r"^d is for SDXL of width 4, and this model is of width 768\.$"):
        files.load_directions(tmp_path / "d", width=768)
    with pytest.raises(ElrondError, match=r"^d holds directions, not gradients\.$"):
        files.load_gradients(tmp_path / "d")


def rewritten(path: Path, tensors: dict | None = None, kind: str = "directions", /, **metadata: str | None) -> None:
    """A valid file of directions, or of another kind, with some tensors or metadata replaced."""
    whole = dict(zip(("directions", "gradients"), everything(), strict=True))
    getattr(files, f"save_{kind}")(directions() if kind == "directions" else whole[kind], path)
    kept, said = tensor_files.read(path)
    said = {key: value for key, value in {**said, **metadata}.items() if value is not None}
    path.write_bytes(tensor_files.encode({**kept, **(tensors or {})}, said))


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"format_version": "3"}, "format version 3, and this ELROND reads 1 and 2"),
        ({"kind": None}, "was not written by ELROND"),
        ({"prompt": None, "seed": None}, "its metadata lacks prompt, seed"),
        ({"d": "5"}, "says its width is 5, and its vectors have 4"),
        ({"d": "x"}, "a d that is not a whole number"),
        ({"count": "9" * 5000}, "a count that is not a whole number"),
        ({"rows": "[5"}, "a rows that is not JSON"),
        ({"tokens": "[" * 100_000}, "a tokens that is not JSON"),
        ({"rows": '["5"]'}, "rows, tokens, sigma or token_norm"),
        ({"rows": "[true]"}, "rows, tokens, sigma or token_norm"),
        ({"sigma": "[NaN]"}, "rows, tokens, sigma or token_norm"),
        ({"token_norm": "0"}, "rows, tokens, sigma or token_norm"),
        ({"token_norm": "long"}, "rows, tokens, sigma or token_norm"),
        ({"names": "[]"}, "do not fit its 4 directions"),
        ({"stars": "[1, 0, 0, 1]"}, "do not fit its 4 directions"),
        ({"reach": "[1.0, 2.0]"}, "do not fit its 4 directions"),
        ({"reach": "[1.0, 2.0, 3.0, -1.0]"}, "do not fit its 4 directions"),
        ({"reach": "[1, 2, 3, true]"}, "do not fit its 4 directions"),
        ({"reach": "[1, 2, 3, 1" + "0" * 400 + "]"}, "do not fit its 4 directions"),
        ({"reach": "{}"}, "do not fit its 4 directions"),
        ({"sigma": "[1" + "0" * 400 + "]"}, "rows, tokens, sigma or token_norm"),
        ({"rows": "[5, 6, 7, 8]"}, r"of 4 rows, \[5, 6, 7, 8\], and its vectors have 3"),
        ({"rows": "[-5]"}, "rows, tokens, sigma or token_norm"),
        ({"rows": "[5.0, 6.0, 7.0]"}, "rows, tokens, sigma or token_norm"),
        ({"seeds": '["1"]'}, "seeds, rows, tokens, sigma or token_norm"),
        ({"count": "-5"}, "a count that is not a whole number of zero or more"),
        ({"seed": "-5"}, "a seed that is not a whole number of zero or more"),
        ({"seed": "1_0"}, "a seed that is not a whole number of zero or more"),
        ({"latent_values": "-3"}, "a latent_values that is not a whole number of zero or more"),
        ({"reach": "[1.0, 2.0, 3.0, 1e999]"}, "do not fit its 4 directions"),
        ({"densities": "[0.5, 0.5]"}, "do not fit its 4 directions"),
        ({"densities": "[0.5, 0.5, 0.5, 1.5]"}, "do not fit its 4 directions"),
        ({"densities": "[0.5, 0.5, 0.5, NaN]"}, "do not fit its 4 directions"),
        ({"densities": "null"}, "do not fit its 4 directions"),
        ({"method": '{"k": 32}'}, "do not fit its 4 directions"),
        ({"method": '"pca"'}, "do not fit its 4 directions"),
    ],
)
def test_bad_metadata(metadata: dict, sentence: str, tmp_path: Path) -> None:
    rewritten(tmp_path / "d", **metadata)
    with pytest.raises(ElrondError, match=sentence):
        files.load_directions(tmp_path / "d")


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"vectors": directions().vectors * 2}, "direction 0 has norm 2 instead of 1"),
        ({"vectors": directions().vectors + torch.nan}, "row 0 of vectors is not finite"),
        ({"vectors": directions().vectors.double()}, "'vectors' of the wrong type"),
        ({"vectors": directions().vectors.half()}, "'vectors' of the wrong type"),
        ({"vectors": torch.zeros(4, 12)}, "'vectors' of the wrong type or shape, "),
        ({"scores": torch.zeros(3)}, "'scores' of the wrong type or shape, "),
        ({"vectors": torch.zeros(0, 3, 4), "scores": torch.zeros(0)}, "is empty"),
        ({"more": torch.zeros(1)}, "should hold the tensors scores, vectors, and holds more, scores, vectors"),
    ],
)
def test_bad_tensors(tensors: dict, sentence: str, tmp_path: Path) -> None:
    rewritten(tmp_path / "d", tensors)
    with pytest.raises(ElrondError, match=sentence):
        files.load_directions(tmp_path / "d")


@pytest.mark.parametrize(
    ("kind", "tensors", "metadata", "sentence"),
    [
        ("gradients", {}, {"count": "9999"}, "says it is of 9999 gradients, and has 4"),
        ("gradients", {}, {"count": "-5"}, "a count that is not a whole number of zero or more"),
        ("gradients", {}, {"rows": "[5, 6]"}, r"of 2 rows, \[5, 6\], and its vectors have 3"),
        ("gradients", {"targets": torch.tensor([1, 3, 5, -7])}, {}, "row 3 of targets is negative"),
        ("gradients", {"vectors": gradients().vectors + torch.nan}, {}, "row 0 of vectors is not finite"),
        ("gradients", {"response_sigma": torch.tensor([1, torch.inf])}, {}, "row 1 of response_sigma is not finite"),
    ],
)
def test_what_a_file_says_must_be_so(kind: str, tensors: dict, metadata: dict, sentence: str, tmp_path: Path) -> None:
    rewritten(tmp_path / "x", tensors, kind, **metadata)
    with pytest.raises(ElrondError, match=rf"^x.*{sentence}"):
        getattr(files, f"load_{kind}")(tmp_path / "x")


def raw(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> dict:
    return {"vectors": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not a safetensors file, or is cut short"),
        (b"PK\x03\x04" + b"\x00" * 100, "not a safetensors file, or is cut short"),
        (b"\x80\x02ctorch\nobject", "not a safetensors file, or is cut short"),
        (raw(b"[]"), "not a safetensors file, or is cut short"),
        (raw(b"[" * 200_000), "not a safetensors file, or is cut short"),
        (raw(b'{"a": {}, "a": {}}'), "not a safetensors file, or is cut short"),
        (raw(b" " * (4 * 2**20 + 1)), "header of 4194305 bytes"),
        (raw(entry(), b"\x00" * 7), "'vectors' does not fit the file"),
        (raw(entry(shape=[2**60]), b"\x00" * 8), "'vectors' does not fit the file"),
        (raw(entry(shape=[-2]), b"\x00" * 8), "'vectors' does not fit the file"),
        (raw(entry(shape=[2.0]), b"\x00" * 8), "'vectors' does not fit the file"),
        (raw(entry(data_offsets=[8, 0]), b"\x00" * 8), "'vectors' does not fit the file"),
        (raw(entry(dtype="F9"), b"\x00" * 8), "'vectors' does not fit the file"),
        (raw(entry(), b"\x00" * 8), "was not written by ELROND"),
        (raw({"__metadata__": {"kind": 3}}), "metadata that is not text"),
        (raw({"__metadata__": []}), "metadata that is not text"),
    ],
)
def test_damaged_files(content: bytes, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ElrondError, match=rf"^bad.safetensors .*{sentence}.*\.$"):
        files.load_directions(path)


class Largest(TorchDispatchMode):
    """Notes the most bytes that one operation allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage().data_ptr() for each in tree_leaves(args) if isinstance(each, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage().data_ptr() not in known:
                self.size = max(self.size, each.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("kind", ["directions", "gradients"])
def test_values_are_checked_without_a_copy_of_all(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = torch.nn.functional.normalize(torch.randn(50, 8), dim=1)[:, None]
    monkeypatch.setattr(files, "_BLOCK", 64)
    with Largest() as largest:
        files.check_values("x", kind, {"vectors": vectors})
    assert 0 < largest.size <= 64 * 4
    for row in (0, 7, 8, 49):
        bad = vectors.clone()
        bad[row, 0, 3] = torch.nan
        with pytest.raises(ElrondError, match=f"^x: row {row} of vectors is not finite"):
            files.check_values("x", kind, {"vectors": bad})


def test_overlapping_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    files.save_directions(directions(), path)
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["vectors"]["data_offsets"], header["scores"]["data_offsets"] = [0, 192], [0, 16]
    path.write_bytes(raw(header, content[8 + length :]))
    with pytest.raises(ElrondError, match=r"^d is damaged: "):
        files.load_directions(path)


@pytest.mark.parametrize("more", [b"x", bytes(4096)])
def test_what_follows_the_tensors_is_refused(more: bytes, tmp_path: Path) -> None:
    files.save_directions(directions(), tmp_path / "d")
    (tmp_path / "d").write_bytes((tmp_path / "d").read_bytes() + more)
    with pytest.raises(ElrondError, match=r"^d is damaged: there is more in it than its tensors\.$"):
        files.load_directions(tmp_path / "d")


def test_a_file_larger_than_memory_is_refused(tmp_path: Path) -> None:
    """A sparse file takes no room on the disk; nothing of its size is allocated."""
    entry = {"dtype": "F32", "shape": [2**30, 2**10, 2**10], "data_offsets": [0, 2**42]}
    path, most = tmp_path / "d", tensor_files.MOST_BYTES
    for size, sentence in (
        (most + 1, f"has {most + 1} bytes, and {most} is the most"),
        (most, "does not fit the file"),
    ):
        path.write_bytes(raw({"vectors": entry}))
        try:
            os.truncate(path, size)
        except OSError:
            pytest.skip("This file system has no sparse files of this size.")
        with pytest.raises(ElrondError, match=sentence):
            files.load_directions(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ElrondError, match=r"^There is no file d\.$"):
        files.load_directions(tmp_path / "d")
    with pytest.raises(ElrondError, match="could not be read"):
        files.load_directions(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="named pipes of POSIX")
def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "d")
    with pytest.raises(ElrondError, match="is not a regular file"):
        files.load_directions(tmp_path / "d")


def test_what_is_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "g"
    files.save_gradients(gradients(), path)
    loaded = files.load_gradients(path)
    content = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(content) - 300)
        file.write(bytes(300))
    same(gradients(), loaded)
    # Of mapped memory this would be the end of the process.
    os.truncate(path, 0)
    same(gradients(), loaded)


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the header and the tensors another file takes the name, or other bytes take the file's place."""
    path, vectors = tmp_path / "d", torch.eye(128)[:, None]
    # More than a buffer holds, which would still be the old file.
    first, other = (Directions(each, torch.ones(128), {}, Provenance("SDXL")) for each in (vectors, vectors.flip(0)))
    files.save_directions(first, path)
    files.save_directions(other, tmp_path / "other")
    content = (tmp_path / "other").read_bytes()
    tensor = tensor_files.read_tensor

    def replaced(*arguments: Any) -> torch.Tensor:
        if (tmp_path / "other").exists():
            (tmp_path / "other").replace(path)
        return tensor(*arguments)

    def overwritten(*arguments: Any) -> torch.Tensor:
        path.write_bytes(content)
        return tensor(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "read_tensor", replaced)
        same(first, files.load_directions(path))
    same(other, files.load_directions(path))
    files.save_directions(first, path)
    monkeypatch.setattr(tensor_files, "read_tensor", overwritten)
    with pytest.raises(ElrondError, match="does not agree with its checksum"):
        files.load_directions(path)


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    path = tmp_path / "v1.2.safetensors"
    assert files.save_directions(directions(), path, overwrite=False) == path
    (tmp_path / "v1.2-2.safetensors").symlink_to(tmp_path / "nowhere")
    other = replace(directions(), score_name="other")
    assert files.save_directions(other, path, overwrite=False) == tmp_path / "v1.2-3.safetensors"
    same(directions(), files.load_directions(path))
    assert files.save_directions(other, path) == path
    same(other, files.load_directions(path))
    assert files.save_gradients(gradients(), path, overwrite=False).name == "v1.2-4.safetensors"
    assert names(tmp_path) == [*(f"v1.2-{number}.safetensors" for number in (2, 3, 4)), "v1.2.safetensors"]


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_another_program_makes_meanwhile_stays(
    links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that asks for no lock, and where the file system has no links."""
    lexists = os.path.lexists

    def faster(path: Any) -> bool:
        found = lexists(path)
        if path == tmp_path / "d":
            path.write_bytes(b"another program's")
        return found

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os.path, "lexists", faster)
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert files.save_directions(directions(), tmp_path / "d", overwrite=False).name == "d-2"
    assert (tmp_path / "d").read_bytes() == b"another program's"
    same(directions(), files.load_directions(tmp_path / "d-2"))
    assert names(tmp_path) == ["d", "d-2"]


def test_a_file_that_is_open_elsewhere_is_replaced_a_little_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to replace a file while another program reads it."""
    rename, refused = Path.replace, []

    def busy(path: Path, target: Path) -> Path:
        if len(refused) < 3:
            refused.append(target)
            raise PermissionError(errno.EACCES, "Access is denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(writing, "_ATTEMPTS", 4)
    files.save_directions(directions(), tmp_path / "d")
    same(directions(), files.load_directions(tmp_path / "d"))
    assert len(refused) == 3


def test_temporary_files_of_dead_writers_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    dead, live, other = (tmp_path / f".d.{digit * 32}.tmp" for digit in "abg")
    for path in (dead, live, other):
        path.write_bytes(b"part")
    for path in (dead, other):
        os.utime(path, (time.time() - 3700,) * 2)
    files.save_directions(directions(), tmp_path / "d")
    # The last is not named as a temporary file of the pack is.
    assert names(tmp_path) == sorted([live.name, other.name, "d"])


def test_a_change_is_made_of_what_is_in_the_file(tmp_path: Path) -> None:
    shipped, path = tmp_path / "shipped", tmp_path / "folder" / "d"
    files.save_directions(directions(), shipped)

    def starred(index: int) -> Any:
        return lambda d: replace(d, stars=tuple(star or i == index for i, star in enumerate(d.stars)))

    files.update_directions(path, starred(1), source=shipped)
    files.update_directions(path, starred(2), source=shipped)
    assert files.load_directions(path).stars == (True, True, True, True)
    same(directions(), files.load_directions(shipped))
    with pytest.raises(ElrondError, match="There is no file"):
        files.update_directions(tmp_path / "none", starred(1))
    with pytest.raises(ElrondError, match=r"^Nothing was written"):
        files.update_directions(path, lambda d: replace(d, names=("a\nb", "", "", "")))
    assert files.load_directions(path).names == directions().names


def test_a_writer_that_does_not_let_go_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_PATIENCE", 0.05)
    with (
        writing.locked(tmp_path),
        pytest.raises(ElrondError, match=r"^d could not be written: another program has been writing there"),
    ):
        files.save_directions(directions(), tmp_path / "d")
    files.save_directions(directions(), tmp_path / "d")


@pytest.mark.skipif(os.name != "posix", reason="Windows does not flush folders")
@pytest.mark.parametrize("step", ["open", "fsync"])
def test_a_folder_that_cannot_be_flushed_stops_no_save(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Network shares answer EINVAL; a folder that may be written and not listed cannot be opened."""
    original = getattr(os, step)

    def refuse(what: Any, *rest: Any, **options: Any) -> Any:
        if what == tmp_path or (isinstance(what, int) and stat.S_ISDIR(os.fstat(what).st_mode)):
            raise OSError(errno.EINVAL if step == "fsync" else errno.EACCES, "refused")
        return original(what, *rest, **options)

    monkeypatch.setattr(os, step, refuse)
    for name in ("d", "d-2"):
        assert files.save_directions(directions(), tmp_path / "d", overwrite=False).name == name
    same(directions(), files.load_directions(tmp_path / "d-2"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(writing.FileLock, "acquire", refuse)
    files.save_directions(directions(), tmp_path / "d")
    same(directions(), files.load_directions(tmp_path / "d"))


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EROFS, "the disk is read-only; choose another folder"),
        (errno.EACCES, "the folder may not be written to; change its permissions"),
    ],
)
@pytest.mark.parametrize("step", ["mkdir", "open", "fsync"])
def test_a_disk_that_refuses_is_one_sentence_without_a_path(
    step: str, number: int, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "/a/secret/path")

    monkeypatch.setattr(os if step == "fsync" else Path, step, refuse)
    with pytest.raises(ElrondError, match=rf"^d could not be written: {sentence}\.$"):
        files.save_directions(directions(), tmp_path / "folder" / "d")


HOSTILE = "x" * 65536 + "\u202e\x1b[31m\n"


@pytest.mark.parametrize("kind", ["directions", "gradients"])
def test_messages_quote_little_and_on_one_line(kind: str, tmp_path: Path) -> None:
    """Whatever long text a file has in whichever place, the sentence about it stays short."""
    path = tmp_path / "d"
    rewritten(path, {}, kind)
    tensors, metadata = tensor_files.read(path)
    texts = (HOSTILE, json.dumps(HOSTILE), json.dumps([HOSTILE]), "7" * 65536, json.dumps([7] * 20000), '"\\ud800"')
    files_of = [(tensors, {**metadata, key: text}) for key in metadata for text in texts]
    files_of += [({**tensors, HOSTILE: torch.zeros(1)}, metadata), ({HOSTILE: torch.zeros(1)}, metadata)]
    refused = 0
    for changed, said in files_of:
        path.write_bytes(tensor_files.encode(changed, said))
        try:
            getattr(files, f"load_{kind}")(path)
        except ElrondError as error:
            refused += 1
            assert len(str(error)) < 300 and str(error).isprintable(), str(error)[:300]
    assert refused > len(files_of) / 2


@pytest.mark.parametrize("text", ["a\nb", "a\0b", "\x1b[31m", "a\u2028b", "\ud800", "\x9b"])
def test_names_that_are_no_line_of_text_are_neither_written_nor_read(text: str, tmp_path: Path) -> None:
    named = replace(directions(), names=("", "", text, ""))
    code = next(f"U\\+{ord(c):04X}" for c in text if not c.isprintable())
    with pytest.raises(ElrondError, match=f"^Nothing was written: d: the name of direction 2 has {code} in it"):
        files.save_directions(named, tmp_path / "d")
    rewritten(tmp_path / "d", names=json.dumps(named.names))
    with pytest.raises(ElrondError, match=f"^d: the name of direction 2 has {code} in it"):
        files.load_directions(tmp_path / "d")


@pytest.mark.parametrize("key", ["family", "prompt", "concept", "host", "score_name", "tokens", "method", "extra"])
@pytest.mark.parametrize("character", ["\0", "\ud800"])
def test_texts_that_no_program_can_show_are_refused(key: str, character: str, tmp_path: Path) -> None:
    wrapped = {"tokens": (character,), "method": {"name": character}, "extra": {"note": character}}
    of_directions = key in ("score_name", "method")
    bad = (replace if of_directions else of)(directions(), **{key: wrapped.get(key, character)})
    with pytest.raises(ElrondError, match=r"^Nothing was written: (d has|A text has a character that is not Unicode)"):
        files.save_directions(bad, tmp_path / "d")
    assert not names(tmp_path)


def test_names_in_other_scripts_are_welcome(tmp_path: Path) -> None:
    spoken = ("größe", "می\u200cخواهم", "שלום", "👨\u200d👩\u200d👧")
    named = of(replace(directions(), names=spoken), prompt="two\nlines")
    files.save_directions(named, tmp_path / "d")
    same(named, files.load_directions(tmp_path / "d"))


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("monster", "monster.safetensors"),
        ("monster.safetensors", "monster.safetensors"),
        ("v1.2", "v1.2.safetensors"),
        ("animals/größter dog", "animals/größter dog.safetensors"),
        ("animals\\dog", "animals/dog.safetensors"),
        (" console ", "console.safetensors"),
        ("com10", "com10.safetensors"),
        ("犬 الكلب", "犬 الكلب.safetensors"),
        ("x" * 200 + "-2", "x" * 200 + "-2.safetensors"),
    ],
)
def test_good_names(name: str, relative: str, tmp_path: Path) -> None:
    assert safe_path(tmp_path, name) == tmp_path / relative


BAD_NAMES = (
    r"| |.|..|../x|a/../../x|a/..|/etc/passwd|\x|C:x|C:\x|a//b|nul|CON.txt|a/com1|x.|x /y|a*|.safetensors|...|a?"
)


UNSEEN = [
    "a\0b",
    "a\nb",
    "a\u200bb",
    "\u200b",
    "a\u202egpj.b",
    "a\u2066b",
    "\ufeffa",
    "\u3164",
    "a\u00ad",
    "a\ud800",
    "\x9b",
]
PORTS = ["com¹", "LPT³.txt", "a/COM²", "conin$", "CONOUT$.x"]


@pytest.mark.parametrize("name", [*BAD_NAMES.split("|"), *UNSEEN, *PORTS, "x" * 201, "é" * 101, "a/" * 600 + "a"])
def test_bad_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ElrondError, match="cannot be a file name here") as caught:
        safe_path(tmp_path, name)
    assert len(str(caught.value)) < 200 and str(caught.value).isprintable()


def test_links_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ElrondError, match="cannot be a file name here"):
        safe_path(tmp_path, "a/x")


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "out").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ElrondError, match="cannot be a file name here"):
        safe_path(inside, "out/x")


def test_an_exported_direction_is_read_as_it_was_written(tmp_path: Path) -> None:
    """A unit vector times the strength, and times the concept's norm where the strength is relative."""
    for index, strength, relative in ((0, 0.5, True), (2, -3.0, False)):
        path = files.save_delta(directions(), index, strength, tmp_path / "one.safetensors", relative=relative)
        delta, origin = files.load_delta(path)
        scale = strength * (HERE.token_norm if relative else 1.0)
        assert torch.equal(delta, scale * directions().vectors[index])
        assert origin == HERE
        header = json.loads(path.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")["__metadata__"]
        assert (header["name"], float(header["strength"])) == (directions().names[index], scale)
    second = files.save_delta(directions(), 1, 1.0, path, overwrite=False)
    assert second.name == "one-2.safetensors"


def test_an_exported_direction_that_is_damaged_or_another_thing_is_refused(tmp_path: Path) -> None:
    path = files.save_delta(directions(), 0, 1.0, tmp_path / "one.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ElrondError, match="is damaged"):
        files.load_delta(path)
    files.save_directions(directions(), path)
    with pytest.raises(ElrondError, match="holds directions, not delta"):
        files.load_delta(path)
    for strength in (0.0, float("inf"), float("nan")):
        with pytest.raises(ElrondError, match="needs a strength other than 0"):
            files.save_delta(directions(), 0, strength, path)
    with pytest.raises(ElrondError, match="There is no direction 4"):
        files.save_delta(directions(), 4, 1.0, path)


def test_an_exported_direction_of_this_format_is_still_read() -> None:
    delta, origin = files.load_delta(GOLDEN / "delta-2.safetensors")
    assert torch.equal(delta, 0.5 * HERE.token_norm * directions().vectors[0])
    assert origin == HERE
