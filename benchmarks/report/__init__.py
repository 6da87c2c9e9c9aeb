"""How a run is told: on the terminal, as a page with a picture, and in the README."""
