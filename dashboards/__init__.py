"""What you see: panels, the W&B mirror, the HTML page, carbon reports and model cards."""
