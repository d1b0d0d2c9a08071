"""A TopK sparse autoencoder of gradients: step 6 of ELROND (arXiv 2602.10216).

The model follows Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093). It is trained by
`elrond_core.decompose.sae_training`. Names are those of sparsify: pre-activations, top activations and their indices.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import ElrondError
from ..seeding import generator
from ..storage import tensors as tensor_files
from ..storage.atomic_write import atomic_write, make_folder, reason

_KIND, _VERSION = "sae", "1"


class Activations(NamedTuple):
    """A sparse code of B gradients.

    Attributes:
        top_acts: float, (B, k): activations of the active latents, zero or more.
        top_indices: int64, (B, k): which latents these are.
    """

    top_acts: torch.Tensor
    top_indices: torch.Tensor


class TopKSAE(torch.nn.Module):
    """z = TopK(ReLU(W_enc (g/scale - b_dec) + b_enc)); ĝ/scale = W_dec z + b_dec.

    A new model has random unit atoms, an encoder tied to them, and no biases.

    Args:
        rows: R, rows of the concept.
        width: d, the width of a row.
        latents: size of the dictionary.
        k: latents that are active at once.
        scale: length of a typical gradient. The model works on gradients divided by it, so that training depends
            neither on the diffusion model nor on the noise level.
        seed: fixes the atoms.
        device: device of the parameters.
        dtype: type of the parameters.

    Attributes:
        W_enc: (latents, R·d).
        b_enc: (latents,).
        W_dec: (latents, R·d): one atom of unit norm a latent.
        b_dec: (R·d,).
        scale: float64, ().
    """

    scale: torch.Tensor

    def __init__(
        self,
        rows: int,
        width: int,
        latents: int,
        k: int,
        *,
        scale: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.rows, self.width, self.k = rows, width, k
        atoms = torch.randn(latents, rows * width, generator=generator(seed, "sae decoder")).to(device, dtype)
        atoms /= atoms.norm(dim=1, keepdim=True)
        self.W_enc = torch.nn.Parameter(atoms.clone())
        self.b_enc = torch.nn.Parameter(torch.zeros_like(atoms[:, 0]))
        self.W_dec = torch.nn.Parameter(atoms)
        self.b_dec = torch.nn.Parameter(torch.zeros_like(atoms[0]))
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64, device=device))

    @property
    def latents(self) -> int:
        """Size of the dictionary."""
        return len(self.W_dec)

    @property
    def dictionary(self) -> torch.Tensor:
        """The atoms, (latents, R, d), each of unit norm."""
        return self.W_dec.unflatten(1, (self.rows, self.width))

    def encode(self, gradients: torch.Tensor) -> Activations:
        """The sparse code of gradients (B, R, d), as they were collected.

        Raises:
            ElrondError: if they have other rows or another width.
        """
        if gradients.shape[1:] != (self.rows, self.width):
            raise ElrondError(
                f"This autoencoder is of gradients of {self.rows} x {self.width} values, and these have "
                f"{tuple(gradients.shape[1:])}."
            )
        scaled = (gradients.flatten(1).to(self.scale) / self.scale).to(self.W_enc)
        return top_activations(self.pre_activations(scaled), self.k)

    def decode(self, top_acts: torch.Tensor, top_indices: torch.Tensor) -> torch.Tensor:
        """The gradients (B, R, d) that a sparse code stands for."""
        scaled = self.weighted_atoms(top_acts, top_indices) + self.b_dec
        return (scaled * self.scale).to(scaled).unflatten(1, (self.rows, self.width))

    def forward(self, gradients: torch.Tensor) -> torch.Tensor:
        """The reconstruction (B, R, d) of gradients (B, R, d)."""
        return self.decode(*self.encode(gradients))

    def pre_activations(self, scaled: torch.Tensor) -> torch.Tensor:
        """What TopK chooses from, (B, latents), for gradients (B, R·d) divided by the scale."""
        # W_enc b_dec is subtracted from the bias, not b_dec from the batch: its gradient is then that of a vector.
        bias = self.b_enc - self.W_enc @ self.b_dec
        return torch.addmm(bias, scaled, self.W_enc.T)

    def weighted_atoms(self, top_acts: torch.Tensor, top_indices: torch.Tensor) -> torch.Tensor:
        """Sums (B, R·d) of the active atoms times their activations, without the bias, divided by the scale."""
        # A lookup of k atoms: much less than a product with the whole dictionary.
        return torch.nn.functional.embedding_bag(top_indices, self.W_dec, per_sample_weights=top_acts, mode="sum")

    def save(self, path: Path) -> None:
        """Write the model as a safetensors file: its parameters by name, and k, rows and width as metadata.

        Raises:
            ElrondError: if the file cannot be written.
        """
        metadata = {"format_version": _VERSION, "kind": _KIND}
        metadata |= {"k": str(self.k), "rows": str(self.rows), "width": str(self.width)}
        try:
            make_folder(path.parent)
            atomic_write(path, tensor_files.encode(self.state_dict(), metadata))
        except OSError as error:
            raise ElrondError(f"{path.name} could not be written: {reason(error)}.") from error

    @classmethod
    def load(cls, path: Path) -> TopKSAE:
        """Read a model that `save` wrote, onto the CPU.

        Raises:
            FileNotFoundError: if there is no file.
            ElrondError: if it is damaged, or not an autoencoder.
        """
        state, metadata = tensor_files.read(path)
        if (metadata.get("kind"), metadata.get("format_version")) != (_KIND, _VERSION):
            raise ElrondError(f"{path.name} does not hold an autoencoder of format version {_VERSION}.")
        try:
            k, rows, width = (int(metadata[key]) for key in ("k", "rows", "width"))
            # Before a model of any size is made.
            if min(rows, width) < 1 or state["W_dec"].shape[1:] != (rows * width,) or not 1 <= k <= len(state["W_dec"]):
                raise ValueError("k, rows and width do not fit the dictionary")
            model = cls(rows, width, len(state["W_dec"]), k, dtype=state["W_dec"].dtype)
            model.load_state_dict(state)
        except (KeyError, ValueError, RuntimeError) as error:
            raise ElrondError(f"{path.name} is damaged: its tensors are not those of an autoencoder.") from error
        return model

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"rows={self.rows}, width={self.width}, latents={self.latents}, k={self.k}"


def top_activations(pre_activations: torch.Tensor, k: int) -> Activations:
    """TopK(ReLU(pre-activations)) of (B, latents)."""
    # ReLU after TopK gives the same, of fewer values.
    values, indices = pre_activations.topk(k, dim=1, sorted=False)
    return Activations(values.relu(), indices)
