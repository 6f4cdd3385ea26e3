"""From `--model` to a loaded pipeline: model cards, aliases, kinds of pipelines, loading."""
