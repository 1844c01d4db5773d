"""The models that the operator has named."""
