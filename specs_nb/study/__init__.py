"Does SPECS hold? Benchmarks, statistics, reports, ablations."
