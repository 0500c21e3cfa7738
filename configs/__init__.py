"""The shipped configs: `--config=NAME[:ARG]`, each file a lab note with `get_config(arg)`."""
