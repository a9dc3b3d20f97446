"""What a report shows of hunts and of verdicts on them."""
