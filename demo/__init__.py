"""The model that ships with the project: drawn portraits, a teacher and a distilled student."""
