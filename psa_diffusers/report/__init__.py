"""What is shown of a run: metrics, videos side by side, figures, the HTML report."""
