"""One engine over several processes: rank 0 decides and samples, all run their part of every step."""
