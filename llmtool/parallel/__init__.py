"""One model over several ranks: who holds what. Plain integers, no torch: the engine runs it, a test checks it."""
