"""Training a LightningModule: the loop, exact resuming, the order of the data, saving."""
