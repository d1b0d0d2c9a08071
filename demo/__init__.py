"""The model that ships with the project: a small labelled world, a teacher and a distilled student."""
