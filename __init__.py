"""ComfyUI-ELROND: what a model can vary about a word, found and put under your hands (arXiv 2602.10216)."""

WEB_DIRECTORY = "./web"

if __package__:
    # Test runners and type checkers import the repository's root by path; only the host imports it as a package.
    from comfy_api.latest import ComfyExtension, io

    from .nodes import NODES, routes

    class ElrondExtension(ComfyExtension):
        """The pack as ComfyUI loads it."""

        async def get_node_list(self) -> list[type[io.ComfyNode]]:
            """All nodes of the pack."""
            return NODES

    async def comfy_entrypoint() -> ElrondExtension:
        """What ComfyUI calls to load the pack."""
        routes.register()
        return ElrondExtension()


__all__ = ["WEB_DIRECTORY"]
