"""Text as Lightning data modules: labelled, unlabelled, as a stream to model, as generated sequences."""
