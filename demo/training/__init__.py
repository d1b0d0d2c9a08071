"""Training of the portraits' models: autoencoder, teacher and student. `python -m demo.train` runs it all."""
