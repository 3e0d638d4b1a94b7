"""A torch.compile backend and graph optimizer for recommendation models."""
