"""The adapter to ComfyUI: the only folder, beside `demo/host_model`, that touches the host's internals."""

from .conditioning import MARK, MarkedPrompt, check_one_image, mark, marked
from .denoiser import HostDenoiser, with_denoiser
from .features import image_features, through_features
from .guiding import Guide, with_guides
from .image_clip import ImageClip
from .matching import RowFinder, Text
from .parts import resized, steer_conditioning, steer_over_time
from .paths import file_folders, make_folders, output_folder, routes
from .resume import HOST, kept_training, open_shards, origin, shards_in, training_device, work_name
from .sampling import (
    absent,
    decode,
    empty_latent,
    own_latents,
    progress,
    sample,
    sampler_names,
    scheduler_names,
    sigma_of,
    stop_if_cancelled,
)
from .schedule import marked_at
from .schema import search_aliases
from .text import EncodedPrompt, encode, family_of, text_features
from .upstream import ImageNode, image_nodes_before, texts_before, with_links
from .words import rows_of, rows_with_phrases, rows_with_words, span_of

__all__ = [
    "HOST",
    "MARK",
    "EncodedPrompt",
    "Guide",
    "HostDenoiser",
    "ImageClip",
    "ImageNode",
    "MarkedPrompt",
    "RowFinder",
    "Text",
    "absent",
    "check_one_image",
    "decode",
    "empty_latent",
    "encode",
    "family_of",
    "file_folders",
    "image_features",
    "image_nodes_before",
    "kept_training",
    "make_folders",
    "mark",
    "marked",
    "marked_at",
    "open_shards",
    "origin",
    "output_folder",
    "own_latents",
    "progress",
    "resized",
    "routes",
    "rows_of",
    "rows_with_phrases",
    "rows_with_words",
    "sample",
    "sampler_names",
    "scheduler_names",
    "search_aliases",
    "shards_in",
    "sigma_of",
    "span_of",
    "steer_conditioning",
    "steer_over_time",
    "stop_if_cancelled",
    "text_features",
    "texts_before",
    "through_features",
    "training_device",
    "with_denoiser",
    "with_guides",
    "with_links",
    "work_name",
]
