"""llmtool beside what a user would pick instead: the same model, the same requests, interleaved in one run.

    python -m benchmarks.peers setup     # an environment for each peer and its model files, in LLMTOOL_PEERS
    python -m benchmarks.peers run       # measures cell by cell; a run that was cut goes on where it stopped
    python -m benchmarks.peers report    # ratios and verdicts of what is measured so far

catalogue.py: who is compared and how each is started. workload.py: the requests. measure.py: what is measured.
report.py: the targets. README.md: how a figure comes about, and what each peer needs to run at all.
"""
