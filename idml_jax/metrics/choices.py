"""Settings of metrics that the command line shows without loading what uses them; nothing is imported here."""

# Scores that order wrong labels, of `label_errors.Evidence`; the first is the default (docs/audit.md measures them).
SCORES = ("odds", "log_odds", "self_confidence", "normalized_margin", "disagreement")
NEAR = 0.6  # distance of copies as a share of the usual one, see `duplicates`
