"""How a suite is run: a process a case, a process a contestant, and a file of what came out."""
