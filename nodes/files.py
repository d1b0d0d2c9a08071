"""Saving and loading directions and gradients: safetensors in ComfyUI's output and models folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from comfy_api.latest import io, ui

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError
from ..elrond_core.gradients import Gradients
from ..elrond_core.storage import format as files
from . import host
from .types import DirectionsIO, GradientsIO, first_error

SUFFIX = ".safetensors"


def listed(kind: str) -> list[str]:
    """Names of the pack's files of a kind, newest first, without folder twins."""
    found: dict[str, float] = {}
    for folder in host.file_folders():
        for path in sorted((folder / kind).rglob(f"*{SUFFIX}")) if folder.is_dir() else []:
            name = path.relative_to(folder / kind).as_posix().removesuffix(SUFFIX)
            found.setdefault(name, path.stat().st_mtime)
    return sorted(found, key=lambda name: -found[name])


def find(kind: str, name: str) -> Path:
    """The file of a kind ("directions", "gradients") that a person named.

    Raises:
        ElrondError: if the name is none, or there is no such file.
    """
    for folder in host.file_folders():
        path = files.safe_path(folder / kind, name, SUFFIX)
        if path.is_file():
            return path
    have = ", ".join(listed(kind)) or "none yet"
    raise ElrondError(
        f"There is no {kind} file {name!r} in models/elrond/{kind} or output/elrond/{kind}; there are: {have}."
    )


def _save(kind: str, name: str, overwrite: bool, write: Callable[[Path], None]) -> str:
    path = files.safe_path(host.output_folder() / kind, name, SUFFIX)
    number = 1
    while path.exists() and not overwrite:
        number += 1
        path = files.safe_path(host.output_folder() / kind, f"{name.removesuffix(SUFFIX)}-{number}", SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)
    return path.relative_to(host.output_folder() / kind).as_posix().removesuffix(SUFFIX)


def _fingerprint(kind: str, name: str) -> str:
    """Changes when the file does, so that a graph queued again sees the new one."""
    try:
        status = find(kind, name).stat()
    except ElrondError:
        return "missing"
    return f"{status.st_mtime_ns}/{status.st_size}"


def _good_name(kind: str, name: str | None) -> bool | str:
    """True, or why a file cannot be saved under this name; None is a name that is wired and not known yet."""
    return first_error((files.safe_path, host.output_folder() / kind, name, SUFFIX))


def _name_input(what: str) -> io.String.Input:
    return io.String.Input("name", default=f"my {what}", tooltip="File name; a slash makes a subfolder.")


_OVERWRITE = io.Boolean.Input(
    "overwrite", default=False, tooltip="Replace a file of that name; off, a number is added to the name instead."
)


class SaveDirections(io.ComfyNode):
    """Write directions to output/elrond/directions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondSaveDirections",
            display_name="Save Directions (ELROND)",
            category="ELROND/files",
            description="Saves directions as safetensors under output/elrond/directions, ready to share.",
            inputs=[
                DirectionsIO.Input("directions", tooltip="What to save."),
                _name_input("directions"),
                _OVERWRITE,
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="The same directions, once they are saved."),
                io.String.Output(display_name="name", tooltip="The name it was saved under, for Load Directions."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        """Refuse a bad name before anything is computed for it."""
        return _good_name("directions", name)

    @classmethod
    def execute(cls, directions: Directions, name: str, overwrite: bool) -> io.NodeOutput:
        """Save."""
        saved = _save("directions", name, overwrite, lambda path: files.save_directions(directions, path))
        return io.NodeOutput(directions, saved, ui=ui.PreviewText(f"Saved {len(directions)} directions as {saved}"))


class LoadDirections(io.ComfyNode):
    """Read directions from models/elrond or output/elrond."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondLoadDirections",
            display_name="Load Directions (ELROND)",
            category="ELROND/files",
            description="Loads directions from models/elrond/directions or output/elrond/directions.",
            inputs=[
                io.Combo.Input("name", options=listed("directions") or [""], tooltip="Which file; newest first."),
            ],
            outputs=[
                DirectionsIO.Output(display_name="directions", tooltip="For Apply Direction and Diversify."),
                io.String.Output(display_name="report", tooltip="Where the directions come from."),
            ],
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        """Files that appeared after the node list was read are welcome; ones that are not there are named."""
        return first_error((find, "directions", name))

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        """See `_fingerprint`."""
        return _fingerprint("directions", name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load."""
        directions = files.load_directions(find("directions", name))
        origin = directions.provenance
        lines = [
            f"{len(directions)} directions by {directions.method.get('name', '?')} for {origin.concept!r} "
            f"in {origin.prompt!r}",
            f"made for {origin.family}, width {directions.width}, from {origin.count} gradients",
        ]
        lines += directions.lines()
        return io.NodeOutput(directions, "\n".join(lines))


class SaveGradients(io.ComfyNode):
    """Write gradients to output/elrond/gradients."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondSaveGradients",
            display_name="Save Gradients (ELROND)",
            category="ELROND/files",
            description="Saves gradients as safetensors under output/elrond/gradients; they are the costly part.",
            inputs=[
                GradientsIO.Input("gradients", tooltip="What to save."),
                _name_input("gradients"),
                _OVERWRITE,
            ],
            outputs=[
                GradientsIO.Output(display_name="gradients", tooltip="The same gradients, once they are saved."),
                io.String.Output(display_name="name", tooltip="The name it was saved under, for Load Gradients."),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        """Refuse a bad name before anything is computed for it."""
        return _good_name("gradients", name)

    @classmethod
    def execute(cls, gradients: Gradients, name: str, overwrite: bool) -> io.NodeOutput:
        """Save."""
        saved = _save("gradients", name, overwrite, lambda path: files.save_gradients(gradients, path))
        return io.NodeOutput(gradients, saved, ui=ui.PreviewText(f"Saved {len(gradients)} gradients as {saved}"))


class LoadGradients(io.ComfyNode):
    """Read gradients from models/elrond or output/elrond."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondLoadGradients",
            display_name="Load Gradients (ELROND)",
            category="ELROND/files",
            description="Loads gradients from models/elrond/gradients or output/elrond/gradients.",
            inputs=[
                io.Combo.Input("name", options=listed("gradients") or [""], tooltip="Which file; newest first."),
            ],
            outputs=[GradientsIO.Output(display_name="gradients", tooltip="For Fit PCA, Train SAE, Estimate LID.")],
        )

    @classmethod
    def validate_inputs(cls, name: str | None) -> bool | str:
        """Files that appeared after the node list was read are welcome; ones that are not there are named."""
        return first_error((find, "gradients", name))

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        """See `_fingerprint`."""
        return _fingerprint("gradients", name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(files.load_gradients(find("gradients", name)))


NODES = [SaveDirections, LoadDirections, SaveGradients, LoadGradients]
