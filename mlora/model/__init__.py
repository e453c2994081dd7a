"""The frozen base model, the adapters injected into it, and the batches that it computes."""
