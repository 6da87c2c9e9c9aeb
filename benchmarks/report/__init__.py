"""How a run is told: on the terminal, as Markdown with a picture, and in the README."""
