"""Save, load and export directions and gradients: safetensors files in ComfyUI's output and models folders."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..elrond_core.directions import Directions
from ..elrond_core.errors import ElrondError, NotFoundError
from ..elrond_core.gradients import Gradients
from ..elrond_core.storage import format as files
from ..elrond_core.storage.names import SUFFIX, safe_path
from . import host
from .types import ABSOLUTE, UNIT_INPUT, DirectionsIO, GradientsIO, first_error, in_unit

# Files that an error message names.
_MAX_NAMED = 20


def listed(kind: str) -> list[str]:
    """Names of the pack's files of a kind, newest first. A name that is in several folders is listed once.

    ComfyUI's own lists (`folder_paths.get_filename_list`) have no order, and include dangling links and named pipes.
    """
    times: dict[str, float] = {}
    for folder in host.file_folders():
        for parent, folders, names in os.walk(folder / kind):
            folders.sort()
            for path in (Path(parent, name) for name in sorted(names) if name.endswith(SUFFIX)):
                name = path.relative_to(folder / kind).as_posix().removesuffix(SUFFIX)
                # The file may have been deleted since, and `safe_path` refuses some names.
                with contextlib.suppress(OSError, ElrondError):
                    if safe_path(folder / kind, name).is_file():
                        times.setdefault(name, path.stat().st_mtime)
    return sorted(times, key=lambda name: -times[name])


def find(kind: str, name: str) -> Path:
    """The file of a kind ("directions", "gradients") with a name.

    Raises:
        ElrondError: if the name is no file name.
        NotFoundError: if there is no such file.
    """
    for folder in host.file_folders():
        path = safe_path(folder / kind, name)
        with contextlib.suppress(OSError):
            if path.is_file():
                return path
    names = listed(kind)
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    raise NotFoundError(
        f"There is no {kind} file {files.shown(name)} in models/elrond/{kind} or output/elrond/{kind}; "
        f"there are: {', '.join(names[:_MAX_NAMED]) or 'none yet'}{more}."
    )


def _save(kind: str, thing: Any, name: str, overwrite: bool) -> str:
    """Save under a name, to which a number may be added; returns the resulting name."""
    folder = host.output_folder() / kind
    save = {"directions": files.save_directions, "gradients": files.save_gradients}[kind]
    path = save(thing, safe_path(folder, name), overwrite=overwrite)
    return path.relative_to(folder).as_posix().removesuffix(SUFFIX)


def _fingerprint(kind: str, name: str) -> str:
    """A text that changes with the file, so that the host loads a changed file again."""
    try:
        status = find(kind, name).stat()
    except (OSError, ElrondError):
        return "missing"
    return f"{status.st_mtime_ns}/{status.st_size}"


def _check_name(kind: str, name: str | None) -> bool | str:
    """The answer of `validate_inputs` to a name. None is the name of a wired input, which is not known yet."""
    return first_error((safe_path, host.output_folder() / kind, name))


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
            **host.search_aliases("save sliders"),
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
        return _check_name("directions", name)

    @classmethod
    def execute(cls, directions: Directions, name: str, overwrite: bool) -> io.NodeOutput:
        """Save."""
        saved = _save("directions", directions, name, overwrite)
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
            **host.search_aliases("load sliders", "slider", "concept slider"),
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
        """Accept every file that exists, also a newer one than the list of choices."""
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


class ExportDirection(io.ComfyNode):
    """Write one direction to output/elrond/exports, for programs other than this pack."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ElrondExportDirection",
            display_name="Export Direction (ELROND)",
            category="ELROND/files",
            description="Saves one direction as a plain tensor to add to the word's rows, for diffusers and other "
            "programs.",
            **host.search_aliases("diffusers", "embedding", "textual inversion", "save slider"),
            inputs=[
                DirectionsIO.Input("directions", tooltip="From a fit or Load Directions."),
                io.Int.Input("index", default=0, min=0, max=65535, tooltip="Which direction; 0 is the first."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-1000.0,
                    max=1000.0,
                    step=0.05,
                    tooltip="How far the tensor goes; whoever adds it can still multiply it. 0 is refused.",
                ),
                UNIT_INPUT,
                io.String.Input("name", default="my direction", tooltip="File name; a slash makes a subfolder."),
                _OVERWRITE,
            ],
            outputs=[io.String.Output(display_name="name", tooltip="The name it was saved under.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name: str | None, strength: float | None = None) -> bool | str:
        """Refuse a bad name and a strength of 0 before anything is computed for it."""
        return first_error((safe_path, host.output_folder() / "exports", name), (files.check_strength, strength))

    @classmethod
    def execute(
        cls, directions: Directions, index: int, strength: float, unit: str, name: str, overwrite: bool
    ) -> io.NodeOutput:
        """Save."""
        folder = host.output_folder() / "exports"
        amount = in_unit(directions, {index: strength}, unit)[index]
        path = files.save_delta(
            directions, index, amount, safe_path(folder, name), relative=unit != ABSOLUTE, overwrite=overwrite
        )
        saved = path.relative_to(folder).as_posix().removesuffix(SUFFIX)
        return io.NodeOutput(saved, ui=ui.PreviewText(f"Saved direction {index} as exports/{saved}"))


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
        return _check_name("gradients", name)

    @classmethod
    def execute(cls, gradients: Gradients, name: str, overwrite: bool) -> io.NodeOutput:
        """Save."""
        saved = _save("gradients", gradients, name, overwrite)
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
        """Accept every file that exists, also a newer one than the list of choices."""
        return first_error((find, "gradients", name))

    @classmethod
    def fingerprint_inputs(cls, name: str) -> str:
        """See `_fingerprint`."""
        return _fingerprint("gradients", name)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(files.load_gradients(find("gradients", name)))


NODES = [SaveDirections, LoadDirections, ExportDirection, SaveGradients, LoadGradients]
