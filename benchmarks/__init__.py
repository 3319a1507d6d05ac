"""What fastclip buys on this machine: time, memory and error beside its alternatives. docs/benchmarks.md.

    fastclip bench --quick                                        under three minutes on two cores
    fastclip bench                                                everything; make bench, python -m benchmarks
    python -m benchmarks.report RESULTS.json --docs README.md     measured tables into documents
    python -m pytest benchmarks                                   the timed cases under pytest-benchmark

case (what a case is) -> clip, siglip, retrieval, step, loading (the cases; problems, truth, peers are the CLIP loss's)
-> children, memory, timing, ceiling, measure (how it is measured) -> run, suite (in which order) -> results (what is
kept) -> tables, report, plots, bars, capacity, pictures, page (how it is shown) -> guard, agree, merge (how files are
compared and joined). external names benchmarks with an order of their own; gpu*.py are `make gpu`'s.
"""
