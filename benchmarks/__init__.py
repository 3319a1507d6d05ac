"""What fastclip buys on this machine: time, memory and error of the loss beside its alternatives.

    python -m benchmarks --quick        under three minutes on two cores
    python -m benchmarks                the whole table
    python -m benchmarks.report RESULTS.json --docs README.md     measured tables into documents
    python -m pytest benchmarks --benchmark-only                  the timed cases, for --benchmark-compare

problems (what is computed) -> truth (float64) -> peers (who computes it) -> measure, gemm, memory (how it is
measured) -> run (in which order) -> results (what is kept) -> report, plots (how it is shown).
"""
