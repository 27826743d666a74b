"""Ahead-of-time execution: a step is scheduled once and replayed with no framework in between (Nimble, 2012.02732).

Torch-free: `tasks` (what depends on what), `order` (closures, minimum equivalent graph), `streams` (which task runs
where), `cost` (how long that takes, and which of it pays), `arena` (which buffers share bytes), `buckets` (which
shapes are prepared). With torch: `trace`, `bind`, `fuse`, `cpu`, `cuda`, `executor`.
"""
