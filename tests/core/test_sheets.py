"""Contact sheets."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from PIL import Image

from elrond_core.errors import ElrondError
from elrond_core.sheets import contact_sheet, save_strip


def test_every_image_is_where_its_labels_say() -> None:
    colours = torch.rand(6, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    images = colours.expand(6, 20, 40, 3)
    sheet = contact_sheet(images, ["0 small → large\nscore 0.5", "1"], ["-1", "0", "+1"], "a title", cell=80)
    assert sheet.dtype == "float32" and sheet.min() >= 0 and sheet.max() <= 1
    height, width, _ = sheet.shape
    # Cells are 80 x 40 and end at the lower right; labels are dark on white at the upper left.
    for row in range(2):
        for column in range(3):
            x, y = width - (3 - column) * 82 + 40, height - (2 - row) * 42 + 20
            assert sheet[y, x] == pytest.approx(colours[row * 3 + column, 0, 0].numpy(), abs=0.01)
    assert (sheet[: height - 84] < 0.5).any() and (sheet[height - 84 :, : width - 246] < 0.5).any()


def test_a_sheet_without_an_image_a_cell() -> None:
    with pytest.raises(ElrondError, match="2 x 2 cells cannot hold 3 images"):
        contact_sheet(torch.zeros(3, 8, 8, 3), ["a", "b"], ["c", "d"])


def test_a_strip_is_written(tmp_path) -> None:
    save_strip(torch.rand(3, 16, 16, 3), tmp_path / "new" / "strip.png", cell=32)
    with Image.open(tmp_path / "new" / "strip.png") as strip:
        assert strip.size == (96, 32)
    (tmp_path / "file").touch()
    with pytest.raises(ElrondError, match="could not be written"):
        save_strip(torch.rand(1, 8, 8, 3), tmp_path / "file" / "strip.png")


def test_what_killed_writers_left_goes(tmp_path) -> None:
    dead = tmp_path / f".strip.png.{'a' * 32}.tmp"
    dead.touch()
    os.utime(dead, (1e9, 1e9))
    save_strip(torch.zeros(1, 16, 16, 3), tmp_path / "strip.png")
    assert [path.name for path in tmp_path.iterdir()] == ["strip.png"]


def test_a_strip_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch) -> None:
    path = tmp_path / "strip.png"
    save_strip(torch.zeros(3, 16, 16, 3), path, cell=32)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ElrondError, match=r"^strip\.png could not be written: the disk is full; free some space\.$"):
        save_strip(torch.ones(3, 16, 16, 3), path, cell=32)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
