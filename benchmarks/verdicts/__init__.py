"""How what came out is judged: intervals, winners, sentences, and two runs compared."""
