"""Tool calls: how the model is told (prompt), held to (grammar) and understood (parser)."""
