"""Files: round trips, refusals, atomic writing, and names that stay in their folder."""

import json
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from elrond_core import __version__
from elrond_core.decompose.moments import Moments
from elrond_core.directions import Directions
from elrond_core.errors import ElrondError
from elrond_core.gradients import Gradients
from elrond_core.provenance import Provenance
from elrond_core.storage import format as files

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


def everything() -> tuple[Directions, Gradients, Moments]:
    """One of each kind that has all that a file may leave out."""
    merged = HERE.with_(sigma=(14.5, 7.5), latent_values=65536, seeds=(2**63 + 1, 7))
    several = replace(
        gradients(),
        sigma=torch.tensor([14.5, 7.5, 14.5, 7.5]),
        response_sigma=torch.tensor([14.5, 7.5]),
        provenance=merged,
    )
    return replace(directions(), provenance=merged), several, Moments.of(several)


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


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
    unknown = replace(directions(), reach=(), densities=())
    files.save_directions(unknown, tmp_path / "d")
    same(unknown, files.load_directions(tmp_path / "d"))
    rewritten(tmp_path / "d", reach=None, densities=None)
    same(unknown, files.load_directions(tmp_path / "d"))


def test_gradients_round_trip(tmp_path: Path) -> None:
    files.save_gradients(gradients(), tmp_path / "g")
    same(gradients(), files.load_gradients(tmp_path / "g"))
    without = replace(gradients(), response=torch.empty(0, 3, 4))
    files.save_gradients(without, tmp_path / "g")
    same(without, files.load_gradients(tmp_path / "g"))
    levels = replace(gradients(), sigma=torch.tensor([9.0, 3, 9, 3]), response_sigma=torch.tensor([9.0, 3]))
    files.save_gradients(levels, tmp_path / "g")
    same(levels, files.load_gradients(tmp_path / "g"))


def test_moments_round_trip(tmp_path: Path) -> None:
    moments = Moments.of(gradients())
    files.save_moments(moments, tmp_path / "m")
    same(moments, files.load_moments(tmp_path / "m", family="SDXL"))


def test_golden_files_stay_readable() -> None:
    # The file is from before directions had a reach and densities.
    old = replace(directions(), reach=(), densities=())
    same(old, files.load_directions(GOLDEN / "directions-1.safetensors", family="SDXL", width=4))
    same(gradients(), files.load_gradients(GOLDEN / "gradients-1.safetensors"))
    same(Moments.of(gradients()), files.load_moments(GOLDEN / "moments-1.safetensors"))


def test_golden_files_with_everything_stay_readable() -> None:
    for thing, kind in zip(everything(), ("directions", "gradients", "moments"), strict=True):
        same(thing, getattr(files, f"load_{kind}")(GOLDEN / f"{kind}-1-everything.safetensors", family="SDXL", width=4))


def test_what_a_file_says_of_itself(tmp_path: Path) -> None:
    files.save_directions(everything()[0], tmp_path / "d")
    with safetensors.safe_open(tmp_path / "d", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("project_version") == __version__
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1] == __version__
    decoded = {key: json.loads(text) if text[0] in "[{" else text for key, text in metadata.items()}
    assert decoded == {
        "format_version": "1",
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
        lambda g: g.of_rows_alike(),
        lambda g: g.normalised(),
        lambda g: replace(g, provenance=g.provenance.with_(rows=(), tokens=())),
    ],
    ids=["level", "row", "alike", "normalised", "unknown rows"],
)
def test_selections_round_trip(act: Any, tmp_path: Path) -> None:
    chosen = act(everything()[1])
    files.save_gradients(chosen, tmp_path / "g")
    same(chosen, files.load_gradients(tmp_path / "g"))
    files.save_moments(Moments.of(chosen), tmp_path / "m")
    same(Moments.of(chosen), files.load_moments(tmp_path / "m"))


def test_merged_moments_round_trip(tmp_path: Path) -> None:
    whole = Moments.of(gradients())
    whole.merge(Moments.of(replace(gradients(), provenance=HERE.with_(seed=8, sigma=(3.0,)))))
    files.save_moments(whole, tmp_path / "m")
    same(whole, files.load_moments(tmp_path / "m"))
    assert (whole.provenance.count, whole.provenance.seeds) == (8, (HERE.seed, 8))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_written_as_the_format_has_them(dtype: torch.dtype, tmp_path: Path) -> None:
    cast = replace(
        gradients(),
        vectors=gradients().vectors.to(dtype),
        sigma=gradients().sigma.to(dtype),
        sources=gradients().sources.int(),
        response=gradients().response.to(dtype).requires_grad_(),
    )
    files.save_gradients(cast, tmp_path / "g")
    loaded = files.load_gradients(tmp_path / "g")
    same(replace(cast, **{n: getattr(cast, n).float() for n in ("vectors", "sigma", "response")}), loaded)
    assert loaded.sources.dtype == torch.int64
    files.save_directions(replace(directions(), vectors=directions().vectors.to(dtype)), tmp_path / "d")
    same(directions(), files.load_directions(tmp_path / "d"))
    moments = Moments.of(gradients())
    moments.scatter = moments.scatter.to(dtype)
    files.save_moments(moments, tmp_path / "m")
    assert files.load_moments(tmp_path / "m").scatter.dtype == torch.float64


def test_tensors_that_share_their_memory_are_written(tmp_path: Path) -> None:
    numbers, vectors = torch.arange(4), gradients().vectors
    shared = replace(gradients(), vectors=vectors, sources=numbers, targets=numbers, response=vectors[1:])
    files.save_gradients(shared, tmp_path / "g")
    same(shared, files.load_gradients(tmp_path / "g"))


def test_the_count_is_that_of_the_vectors(tmp_path: Path) -> None:
    files.save_gradients(replace(gradients(), provenance=HERE.with_(count=0)), tmp_path / "g")
    assert files.load_gradients(tmp_path / "g").provenance.count == 4


def test_whole_numbers_may_stand_for_others(tmp_path: Path) -> None:
    rewritten(tmp_path / "d", reach="[1, 2, 3.5, 0]", densities="[0, 1, 0.5, 1]", sigma="[14]", token_norm="3")
    found = files.load_directions(tmp_path / "d")
    assert (found.reach, found.densities) == ((1.0, 2.0, 3.5, 0.0), (0.0, 1.0, 0.5, 1.0))
    assert all(type(number) is float for number in found.reach + found.densities + found.provenance.sigma)


def test_metadata_of_others_does_not_replace_ours(tmp_path: Path) -> None:
    mine = replace(directions(), provenance=HERE.with_(extra={"kind": "pickle", "x": "y"}))
    files.save_directions(mine, tmp_path / "d")
    assert files.load_directions(tmp_path / "d").provenance.extra == {"x": "y"}


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d"
    files.save_directions(directions(), path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ElrondError, match=r"^d could not be written: No space left on device\.$"):
        files.save_directions(replace(directions(), names=("other",) * 4), path)
    assert names(tmp_path) == ["d"]
    same(directions(), files.load_directions(path))


def moments(**changes: Any) -> Moments:
    return replace(Moments.of(gradients()), **changes)


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


@pytest.mark.parametrize("kind", ["directions", "gradients", "moments"])
@pytest.mark.parametrize(("changes", "sentence"), BAD)
def test_what_could_not_be_read_is_not_written(kind: str, changes: dict, sentence: str, tmp_path: Path) -> None:
    good = {"directions": directions, "gradients": gradients, "moments": moments}[kind]()
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
        (replace(gradients(), response=gradients().response * torch.nan), "row 0 of response is not finite"),
        (moments(scatter=torch.full((12, 12), torch.nan)), "row 0 of scatter is not finite"),
        (moments(rows=2), r"the shape \[4, 2, 4\] and a mean of 12 values"),
        (moments(count=-4), "a count that is not a whole number"),
        (moments(mean=torch.zeros(3)), "'scatter' of the wrong type or shape"),
        (replace(directions(), scores=torch.tensor([1, 1, 1, 1e300], dtype=torch.float64)), "row 3 of scores"),
        (replace(directions(), reach=(1.0, 2.0, 3.0, -1.0)), "do not fit its 4 directions"),
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
    whole = dict(zip(("directions", "gradients", "moments"), everything(), strict=True))
    getattr(files, f"save_{kind}")(directions() if kind == "directions" else whole[kind], path)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata() | metadata
    kept = {key: value for key, value in header.items() if value is not None}
    safetensors.torch.save_file({**safetensors.torch.load_file(path), **(tensors or {})}, path, kept)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"format_version": "2"}, "format version 2, and this ELROND reads version 1"),
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
        ({"vectors": directions().vectors.half()}, "'vectors' does not fit the file"),
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
        ("moments", {}, {"d": "5"}, r"of 4 gradients of width 5, and has the shape \[4, 3, 4\]"),
        ("moments", {}, {"count": "9"}, r"of 9 gradients of width 4, and has the shape \[4, 3, 4\]"),
        ("moments", {}, {"rows": "[5]"}, r"of 1 rows, \[5\], and its vectors have 3"),
        ("moments", {"shape": torch.tensor([4, 3])}, {}, r"the shape \[4, 3\]"),
        ("moments", {"shape": torch.tensor([4, 2, 4])}, {}, "a mean of 12 values"),
        ("moments", {"shape": torch.tensor([4, -3, -4])}, {}, "row 1 of shape is negative"),
        ("moments", {"mean": torch.full((12,), torch.nan).double()}, {}, "row 0 of mean is not finite"),
        ("moments", {"scatter": torch.full((12, 12), torch.inf).double()}, {}, "row 0 of scatter is not finite"),
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


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    files.save_directions(directions(), path)
    content = path.read_bytes()
    for length in range(0, len(content), 13):
        path.write_bytes(content[:length])
        with pytest.raises(ElrondError):
            files.load_directions(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ElrondError, match=r"^There is no file d\.$"):
        files.load_directions(tmp_path / "d")
    with pytest.raises(ElrondError, match="could not be read"):
        files.load_directions(tmp_path)


@pytest.mark.parametrize(
    ("name", "relative"),
    [
        ("monster", "monster.safetensors"),
        ("monster.safetensors", "monster.safetensors"),
        ("v1.2", "v1.2.safetensors"),
        ("animals/größter dog", "animals/größter dog.safetensors"),
        ("animals\\dog", "animals/dog.safetensors"),
        (" console ", "console.safetensors"),
    ],
)
def test_good_names(name: str, relative: str, tmp_path: Path) -> None:
    assert files.safe_path(tmp_path, name) == tmp_path / relative


BAD_NAMES = (
    r"| |.|..|../x|a/../../x|a/..|/etc/passwd|\x|C:x|C:\x|a//b|nul|CON.txt|a/com1|x.|x /y|a*|.safetensors|...|a?"
)


@pytest.mark.parametrize("name", [*BAD_NAMES.split("|"), "a\0b", "a\nb", "x" * 201])
def test_bad_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(ElrondError, match="cannot be a file name here"):
        files.safe_path(tmp_path, name)


def test_links_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "out").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ElrondError, match="cannot be a file name here"):
        files.safe_path(inside, "out/x")
