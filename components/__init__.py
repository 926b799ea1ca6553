"""Plain PyTorch and polars: the methods of sidflow, without Flyte and without MLflow."""
