"""Runs the long nodes of a ComfyUI graph on many cards and machines, with Ray (docs/many-machines.md).

python -m cluster collect graph.json                            all cards of this machine
python -m cluster collect graph.json --address ray://head:10001 --store s3://bucket/elrond
python -m cluster collect graph.json --concepts "dog, cat, house"
python -m cluster collect graph.json --cards-per-worker 0       without cards
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from . import graph as graphs

NO_RAY = "This needs Ray: pip install 'ray[client]', with the Python that runs ComfyUI."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python -m cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command = top.add_subparsers(dest="command", required=True).add_parser("collect", help="run a graph")
    command.add_argument("graph", type=Path, help="a graph exported from ComfyUI with Export (API)")
    command.add_argument("--concepts", help="words or prompts with a [word]: separated by commas, or a file of lines")
    command.add_argument("--address", default="", help="of a Ray cluster; without it, this machine alone")
    command.add_argument("--cards-per-worker", type=int, default=1, help="0: the processor only")
    command.add_argument("--workers", type=int, help="how many; without it, as many as the cards are enough for now")
    command.add_argument(
        "--store", default="output/cluster", help="folder that all machines share, or an address such as s3://…"
    )
    command.add_argument("--range-seconds", type=float, default=120.0, help="how long a range should take")
    command.add_argument("--threads", type=int, help="threads of a worker's processor; 1 if it has no card")
    command.add_argument("--comfyui", default="", help="ComfyUI's folder on the workers")
    command.add_argument("--comfyui-flags", default="", help="options for ComfyUI's command line, in one text")
    command.add_argument("--allow-mixed", action="store_true", help="workers may differ; the provenance says so")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    given = parser().parse_args(arguments)
    try:
        graph = graphs.load(given.graph)
        concepts = graphs.concepts(given.concepts) if given.concepts else []
        for concept in concepts:
            graphs.with_concept(graph, concept)
        for name, value, least in (
            ("--cards-per-worker", given.cards_per_worker, 0),
            ("--workers", given.workers, 1),
            ("--range-seconds", given.range_seconds, 0),
            ("--threads", given.threads, 1),
        ):
            if value is not None and value < least:
                raise graphs.GraphError(f"{name} must be at least {least}, not {value}.")
    except graphs.GraphError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        import ray
    except ImportError:
        print(NO_RAY, file=sys.stderr)
        return 2
    from .driver import RunError, collect, connect, stream, workers_there
    from .progress import Progress
    from .store import StoreError
    from .worker import Settings

    cards, store = given.cards_per_worker, given.store
    settings = Settings(
        graph=graph,
        concepts=tuple(concepts),
        names=tuple(graphs.file_names(concepts or [graphs.concept_of(graph)])),
        store=store if "://" in store else str(Path(store).resolve()),
        cards=cards,
        threads=given.threads or (0 if cards else 1),
        comfyui=given.comfyui,
        flags=tuple(shlex.split(given.comfyui_flags)),
        mixed=given.allow_mixed,
    )
    try:
        connect(given.address, given.workers or 1, cards, given.comfyui)
        workers = given.workers or workers_there(cards)
        if not workers:
            raise RunError("There is no card: give --workers if an autoscaler brings some, or --cards-per-worker 0.")
        results = collect(settings, workers, given.range_seconds, Progress(stream()))
    except KeyboardInterrupt:
        print("\nInterrupted. Finished ranges are kept: run this again to go on.", file=sys.stderr)
        return 130
    except (RunError, StoreError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    for result in results:
        print(f"{result['name']}: {'; '.join(result['reports'])}")
        for name in [*(f"gradients/{each}" for each in result["gradients"]), *sorted(result["files"])]:
            print(f"  {name}")
        for title, text in sorted(result["texts"].items()):
            print(f"  {title}: " + text.replace("\n", "\n    "))
    return 0


if __name__ == "__main__":
    sys.exit(main())
