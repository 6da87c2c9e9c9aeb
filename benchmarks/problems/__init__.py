"""What is differentiated, and the judge of the answers."""
