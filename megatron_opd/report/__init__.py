"""What a run tells its user: metrics files, the ledger of rollouts, the progress bar, the plot.

Only rank 0 writes. May import `config`, `data` and `errors`; knows nothing of models or of the training step, only of
the numbers in `metrics.jsonl`.
"""
