"""Training: losses, discriminators, schedules, and the loops for the tokenizer (SAT) and the generator (AAR)."""
