"""A world of portraits whose every factor is known, its captions, and a network that reads the factors back.

The pictures are put together from layers of "Personas" by Draftbit (https://personas.draftbit.com/), licensed under
CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/). `atlas.mjs` draws the layers and names what was changed.
"""
